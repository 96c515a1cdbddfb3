"""What residents cost in memory, and whether loading, unloading and answering for long makes the process grow."""

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model.runner import ModelRunner
from scripts.bench.serve.serving_adapters import write_random_adapter

CYCLES = 1000
MANY = 32
REQUESTS = 5000


def own_bytes() -> int:
    """Bytes of this process's own memory now, in memory or swapped out.

    Pages of files are left out: the system takes those, and gives them back, as it is short of memory.
    """
    gc.collect()
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if words and words[-1] == "kB"}
    return 1024 * sum(kilobytes[name] for name in ("RssAnon:", "RssShmem:", "VmSwap:"))


def measure_memory(base: ResolvedBase, scratch: Path) -> dict[str, Any]:
    """Bytes a resident adapter takes against its file: of its tensors, and of the process over 32 adapters."""
    figures: dict[str, Any] = {"resident_over_file": {}}
    with InferenceEngine.from_base(base.folder, max_rows=4) as engine:
        for dtype in (torch.bfloat16, torch.float32):
            for rank in (4, 8, 16):
                folder = write_random_adapter(
                    base.folder, scratch / f"{dtype}-{rank}", seed=rank, rank=rank, dtype=dtype
                )
                size = (folder / "adapter_model.safetensors").stat().st_size
                figures["resident_over_file"][f"{dtype}-{rank}"] = engine.load(folder).nbytes / size
        many = [write_random_adapter(base.folder, scratch / f"m{i}", seed=i, rank=8) for i in range(MANY + 4)]
        for folder in many[MANY:]:
            engine.load(folder)
        before = own_bytes()
        for folder in many[:MANY]:
            engine.load(folder)
        size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in many[:MANY])
        figures[f"process_growth_over_{MANY}_files"] = (own_bytes() - before) / size
    return figures


def measure_cycles(base: ResolvedBase, scratch: Path) -> dict[str, Any]:
    """Growth of the process over 1,000 times unloading and loading a 5 MB adapter, from disk each time."""
    folder = write_random_adapter(base.folder, scratch / "adapter", seed=0, rank=8)
    with InferenceEngine.from_base(base.folder, max_rows=4) as engine:

        def cycle(times: int) -> None:
            for _ in range(times):
                engine.unload(folder)
                engine.load(folder)

        cycle(50)
        samples = [own_bytes()]
        for _ in range(10):
            cycle(CYCLES // 10)
            samples.append(own_bytes())
    return {"cycles": CYCLES, "growth": samples[-1] / samples[0] - 1, "samples_bytes": samples}


def measure_requests(base: ResolvedBase, scratch: Path) -> dict[str, Any]:
    """Growth of the process over 5,000 requests for 8 adapters, on a small random Llama with the base's tokenizer."""
    tokenizer = load_tokenizer(base.folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(scratch / "small")
    folders = [write_random_adapter(scratch / "small", scratch / f"s{i}", seed=i, rank=8) for i in range(8)]

    def ask(engine: InferenceEngine, count: int) -> None:
        requests = [
            GenerationRequest(prompt=f"number {i} " * (1 + i % 7), adapter=folders[i % 8], max_new_tokens=1 + i % 5)
            for i in range(count)
        ]
        for at in range(0, count, 100):
            engine.generate_many(requests[at : at + 100])

    with InferenceEngine(ModelRunner(model, rows=16), tokenizer, "small") as engine:
        ask(engine, 500)
        samples = [own_bytes()]
        for _ in range(10):
            ask(engine, REQUESTS // 10)
            samples.append(own_bytes())
    return {"requests": REQUESTS, "growth": samples[-1] / samples[0] - 1, "samples_bytes": samples}

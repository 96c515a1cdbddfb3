"""The engine on the device at hand: the same tokens as PEFT's own `generate`, and its speed beside it.

Decoding with and without recorded steps, and what an adapter that is copied to the device costs the steps that run.
"""

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.serving import EngineStatus, GenerationRequest, InferenceEngine
from scripts.gpu_check.sizes import Sizes, make_adapter, make_base, synchronise

RANKS = (8, 16, 4)
MOST_LOADS = 200


def engine_laws(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A mixed batch in fp32, greedy, against PEFT's `generate` of each row alone; and the base's weights after it."""
    base = make_base(sizes.proven, scratch, torch.float32, sizes.device)
    adapters = _adapters(base, sizes, scratch)
    rows = [(prompt_of(i, 5 + 11 * i), [None, *adapters][i % (len(adapters) + 1)]) for i in range(9)]
    theirs = [peft_answer(base, adapter, [prompt], sizes)[0] for prompt, adapter in rows]
    for graphs in (False, True):
        engine = InferenceEngine.from_base(
            base, device=sizes.device.type, dtype="float32", max_rows=len(rows), graphs=graphs
        )
        before = engine.base_digest()
        with engine:
            results = engine.generate_many([_request(prompt, adapter, sizes.answer) for prompt, adapter in rows])
            again = engine.generate_many([_request(prompt, adapter, sizes.answer) for prompt, adapter in rows[:1]])
            status = engine.status()
            unchanged = engine.base_digest() == before
        del engine
        _free()
        ours = [list(result.token_ids) for result in results]
        differ = [index for index, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their]
        yield (
            f"mixed batch, {'recorded steps' if graphs else 'plain steps'}",
            {
                "ok": not differ and unchanged and list(again[0].token_ids) == ours[0],
                "rows that differ": differ,
                "base unchanged": unchanged,
                "forward": status.forward,
                "why": status.reasons,
                **recorded(status),
            },
        )


def recorded(status: EngineStatus) -> dict[str, Any]:
    """What became of the recorded steps."""
    return {"graphs": status.graphs, "replayed": status.graphs_replayed, "why no graphs": status.no_graphs}


def engine_figures(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Answer tokens per second: the engine with as many adapters as there are, beside transformers with PEFT and one."""
    for size in sizes.measured[:1]:
        base = make_base(size, scratch, torch.bfloat16, sizes.device)
        adapters = _adapters(base, sizes, scratch)
        for graphs in (True, False):
            name = f"{size}, engine, {'recorded' if graphs else 'plain'} steps"
            engine = InferenceEngine.from_base(
                base, device=sizes.device.type, max_rows=max(sizes.batches), graphs=graphs
            )
            with engine:
                for rows in sizes.batches:
                    found = _engine_speed(engine, [adapters[i % len(adapters)] for i in range(rows)], sizes)
                    yield f"{name}, {rows} rows", {**found, **recorded(engine.status())}
                if graphs:
                    yield f"{size}, engine, adapters on their way", _copies_beside_steps(engine, adapters, sizes)
            del engine
            _free()
        for rows in sizes.batches:
            prompts = [prompt_of(i, 128) for i in range(rows)]
            yield f"{size}, transformers + PEFT, {rows} rows", _generate_speed(base, adapters[0], prompts, sizes)


def _engine_speed(engine: InferenceEngine, adapters: list[Path], sizes: Sizes) -> dict[str, Any]:
    requests = [_request(prompt_of(i, 128), adapter, sizes.answer) for i, adapter in enumerate(adapters)]
    engine.generate_many(requests)
    began = time.perf_counter()
    answers = engine.generate_many(requests)
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {"tokens_per_second": tokens / seconds, "adapters": len(set(adapters))}


def _copies_beside_steps(engine: InferenceEngine, adapters: list[Path], sizes: Sizes) -> dict[str, Any]:
    """Seconds of one row's answer alone and while another adapter is brought to the device again and again."""
    request, other = _request(prompt_of(0, 128), adapters[0], sizes.answer), adapters[1]
    engine.generate(request)
    seconds, loads = [], 0
    with ThreadPoolExecutor(1) as asking:
        for beside in (False, True):
            began = time.perf_counter()
            answer = asking.submit(engine.generate, request)
            while beside and loads < MOST_LOADS and not answer.done():
                engine.unload(other)
                engine.load(other)
                loads += 1
            answer.result()
            seconds.append(time.perf_counter() - began)
    return {"seconds_alone": seconds[0], "seconds_beside_loads": seconds[1], "loads": loads}


def prompt_of(seed: int, length: int) -> list[int]:
    """Token ids of a prompt, bytes alone."""
    draw = torch.Generator().manual_seed(seed)
    return [int(one) for one in torch.randint(0, 256, (length,), generator=draw)]


def peft_answer(base: Path, adapter: Path | None, prompts: list[list[int]], sizes: Sizes) -> list[list[int]]:
    """Greedy answers by transformers and PEFT, of prompts of one length."""
    model = _peft_model(base, adapter, torch.float32, sizes)
    answers = _generate(model, prompts, sizes)
    del model
    _free()
    return answers


def _peft_model(base: Path, adapter: Path | None, dtype: torch.dtype, sizes: Sizes) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.to(sizes.device)
    return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


def _generate(model: Any, prompts: list[list[int]], sizes: Sizes) -> list[list[int]]:
    ids = torch.tensor(prompts, device=sizes.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=sizes.answer,
            min_new_tokens=sizes.answer,
        )  # fmt: skip
    return [row[ids.shape[1] :].tolist() for row in out]


def _generate_speed(base: Path, adapter: Path, prompts: list[list[int]], sizes: Sizes) -> dict[str, Any]:
    model = _peft_model(base, adapter, torch.bfloat16, sizes)
    _generate(model, prompts, sizes)
    synchronise(sizes.device)
    began = time.perf_counter()
    answers = _generate(model, prompts, sizes)
    synchronise(sizes.device)
    seconds = time.perf_counter() - began
    del model
    _free()
    return {"tokens_per_second": sum(map(len, answers)) / seconds, "adapters": 1}


def _adapters(base: Path, sizes: Sizes, scratch: Path) -> list[Path]:
    return [
        make_adapter(base, scratch / f"{base.name}-adapter-{seed}", rank, seed, sizes.device)
        for seed, rank in enumerate(RANKS)
    ]


def _request(prompt: list[int], adapter: Path | None, answer: int) -> GenerationRequest:
    # PEFT's `generate` is held to the same number of tokens by leaving the end token out of the choice.
    return GenerationRequest(prompt_token_ids=prompt, adapter=adapter, max_new_tokens=answer, min_tokens=answer)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

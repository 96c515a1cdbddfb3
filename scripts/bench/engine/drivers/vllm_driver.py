"""Answers the questions of `peers` by vLLM, in vLLM's own environment: `vllm_driver.py BASE ADAPTER...`."""

import os
import sys

from scripts.bench.engine.drivers.lines import Question, quiet_output, serve


def main() -> None:
    """Read requests until there are no more."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    out = quiet_output()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base, adapters = sys.argv[1], sys.argv[2:]
    llm = LLM(
        model=base, enable_lora=bool(adapters), max_lora_rank=16, max_loras=max(1, len(adapters)), enforce_eager=True,
        max_model_len=2048, max_num_seqs=16, enable_prefix_caching=True, dtype="bfloat16",
    )  # fmt: skip
    loaded = [LoRARequest(f"a{number}", number + 1, folder) for number, folder in enumerate(adapters)]

    def answer(asked: Question) -> int:
        settings = SamplingParams(temperature=0.0, max_tokens=asked["new"], min_tokens=asked["new"], ignore_eos=True)
        rows = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        which = [None if number is None else loaded[number] for number in asked["adapters"]]
        answers = llm.generate(rows, settings, lora_request=which if any(which) else None, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in answers)

    serve(out, answer)


if __name__ == "__main__":
    main()

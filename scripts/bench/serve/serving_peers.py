"""The other ways to serve adapters on this machine, called as their documentation says."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from adapterhub_lite.bases import load_base_model


class Peft:
    """One base with several adapters loaded by PEFT."""

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        self._base = base
        model = load_base_model(base)
        self.model: Any = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0").eval()
        for i, folder in enumerate(adapters[1:], start=1):
            self.model.load_adapter(folder, adapter_name=f"a{i}")
        self.count = len(adapters)

    def step(self, adapter: int | list[int] | None, rows: int, context: int) -> Callable[[], object]:
        """A function that computes one decode step: the base, one adapter for all rows, or one for each row."""
        names = [f"a{i}" for i in adapter] if isinstance(adapter, list) else None
        options = {"adapter_names": names} if names else {}
        # The base by itself: switching adapters off and on around each step would be counted otherwise.
        model = load_base_model(self._base) if adapter is None else self.model

        def run(ids: torch.Tensor, cache: DynamicCache) -> None:
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)

        cache = DynamicCache(config=model.config)
        if isinstance(adapter, int):
            self.switch(adapter)
        with torch.inference_mode():
            run(torch.arange(100, 100 + context).repeat(rows, 1), cache)
        token = torch.full((rows, 1), 5)

        def one() -> None:
            with torch.inference_mode():
                if isinstance(adapter, int) and self.model.active_adapter != f"a{adapter}":
                    self.switch(adapter)
                run(token, cache)
                cache.crop(-1)

        return one

    def switch(self, adapter: int) -> float:
        """Make an adapter the active one; return the seconds it took."""
        started = time.perf_counter()
        self.model.set_adapter(f"a{adapter}")
        return time.perf_counter() - started

    def one_by_one(self, prompts: list[list[int]], new: int) -> None:
        """Switch and generate for each prompt in turn."""
        for i, prompt in enumerate(prompts):
            self.switch(i % self.count)
            ids = torch.tensor([prompt])
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )

    def mixed(self, tokenizer: Any, prompts: list[list[int]], new: int) -> None:
        """Generate for all prompts in one padded batch with an adapter for each row."""
        names = [f"a{i % self.count}" for i in range(len(prompts))]
        transformers_batch(self.model, tokenizer, prompts, new, adapter_names=names)


def transformers_batch(model: Any, tokenizer: Any, prompts: list[list[int]], new: int, **options: Any) -> None:
    """Generate for all prompts in one batch, padded on the left."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model.generate(**padded, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


_CONTINUOUS: dict[Path, Any] = {}


def transformers_continuous(base: Path, prompts: list[list[int]], new: int) -> None:
    """Generate for all prompts with transformers' continuous batching; the model is loaded at the first call."""
    if base not in _CONTINUOUS:
        _CONTINUOUS[base] = load_base_model(base)
    model = _CONTINUOUS[base]
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # The manager and its cache are made at the first call, outside of what is measured.
    out = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64),
        persistent_manager=True,
    )
    made = sum(len(answer.generated_tokens) for answer in out.values())
    if made != len(prompts) * new:
        raise RuntimeError(f"continuous batching made {made} tokens, wanted {len(prompts) * new}")

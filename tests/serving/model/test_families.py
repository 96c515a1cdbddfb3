"""Every family that transformers has is served as its own `generate` answers, or refused when it is loaded."""

import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import AdapterRejectedError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.weights import find_families
from adapterhub_lite.serving.model.runner import ForwardKind
from tests.checkout import ROOT
from tests.serving.model.families import FAMILIES, build

PROMPTS = (
    "Hi",
    # 58 tokens, and 12 more: across 64, where longrope takes its other factors.
    "Once upon a time, in a village by the sea, there lived an ",
    "Once upon a time, in a village by the sea, there lived an old man with his three",
)
# Which end early, and so leave the batch while others go on.
WRITTEN = (5, 12, 9)
# PEFT refuses their out_proj, as it does Mamba's.
MAMBA_LIKE = ("falcon_h1", "nemotron_h")


def plain_adapter(base: Path, folder: Path, seed: int, rank: int) -> Path:
    """A PEFT adapter on the linear layers of a base, its B random so that it changes every answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # Each linear layer that PEFT takes: not some of Mamba's, nor routers that return more than a product.
    refused = {"out_proj"} if "mamba" in model.config.model_type or model.config.model_type in MAMBA_LIKE else set()
    targets = [path for family in find_families(model) for path in family.paths if path.split(".")[-1] not in refused]
    wrapped = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    wrapped.save_pretrained(folder)
    return folder


class Own:
    """What transformers and PEFT write themselves."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def take(self, adapters: list[Path]) -> None:
        """Load the adapters, each under its folder's name."""
        from peft import PeftModel

        for adapter in adapters:
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(adapter, adapter.name)
            else:
                self._model = PeftModel.from_pretrained(self._model, adapter, adapter_name=adapter.name)
        self._model.eval()

    def answer(self, adapter: Path | None, ids: list[int], written: int) -> list[int]:
        """The tokens that follow `ids`, by `generate`."""
        prompt = torch.tensor([ids])
        if adapter is not None:
            self._model.set_adapter(adapter.name)
        with nullcontext() if adapter or not hasattr(self._model, "disable_adapter") else self._model.disable_adapter():
            out = self._model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=written, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        answer: list[int] = out[0, len(ids) :].tolist()
        return answer


FOUND: dict[str, str] = {}  # family -> how it is served


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_as_its_own_generate_answers(family: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    try:
        base = build(family, tmp_path / "base", byte_tokenizer)
        own = Own(base)
        own.answer(None, [1, 2, 3], 2)
    except Exception as error:
        FOUND[family] = "transformers itself cannot run it in this size"
        pytest.skip(f"{FOUND[family]}: {type(error).__name__}: {str(error)[:80]}")
    adapters = [plain_adapter(base, tmp_path / f"r{rank}", rank, rank) for rank in (8, 4)]
    own.take(adapters)
    with InferenceEngine.from_base(base, dtype="float32", end_tokens=frozenset(), device="cpu") as engine:
        FOUND[family] = engine.status().forward
        try:
            for adapter in adapters:
                engine.load(adapter)
        except AdapterRejectedError as error:
            # PEFT puts LoRA on the experts' parameters, or names modules otherwise than the base's files do.
            assert "target_parameters" in str(error) or "(0 of 0 modules)" in str(error)
            FOUND[family] += "; the base alone"
            adapters = []
        asked = [
            (
                adapter,
                prompt,
                written,
                engine.submit(GenerationRequest(prompt, adapter=adapter, max_new_tokens=written)),
            )
            for (prompt, written), adapter in itertools.product(zip(PROMPTS, WRITTEN, strict=True), [None, *adapters])
        ]
        answers = [handle.result() for *_, handle in asked]
    for (adapter, prompt, written, _), answer in zip(asked, answers, strict=True):
        expected = own.answer(adapter, byte_tokenizer.encode(prompt), written)
        assert list(answer.token_ids) == expected, (family, adapter, prompt)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_was_found() -> None:
    """The page is written with ADAPTERHUB_WRITE_DOCS=1; what stands in it must be so."""
    if FOUND.keys() != FAMILIES.keys():
        pytest.skip("only some families were tried")
    assert sum(how in set(ForwardKind) for how in FOUND.values()) >= 60, "served with adapters"
    page = ROOT / "docs" / "bases.md"
    head, mark, table = page.read_text().partition("| family | served |\n|---|---|\n")
    rows = [f"| {family} | {how} |\n" for family, how in sorted(FOUND.items()) if not how.startswith("transformers")]
    if os.environ.get("ADAPTERHUB_WRITE_DOCS"):
        page.write_text(head + mark + "".join(rows))
    else:
        stale = set(table.splitlines(keepends=True)) - set(rows)
        assert not stale, f"no longer so, write the page again with ADAPTERHUB_WRITE_DOCS=1: {sorted(stale)}"

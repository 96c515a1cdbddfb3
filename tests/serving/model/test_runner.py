"""Steps against PEFT's logits: mixed rows, prompts in pieces, moved rows, other models, 8-bit and 4-bit layers."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.sources import FolderSource
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Part, read_adapter_weights
from adapterhub_lite.serving.model.cache.regions import SMALLEST
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

IDS = [[7, 8, 9], [40, 41], list(range(60, 90)), [5], [9, 8, 7, 6, 5, 4], [100] * 9, [3, 4]]


def read(runner: ModelRunner, folder: Path) -> AdapterWeights:
    files = FolderSource().locate(folder)
    return read_adapter_weights(files.weights, runner.families, files.scaling_of, max_rank=16, subject="test")


@pytest.fixture(params=["fused, compiled", "fused", "hosted, compiled", "hosted"])
def runner(request: pytest.FixtureRequest, tiny_base: Path) -> ModelRunner:
    if "compiled" in request.param and find_compiler() is None:
        pytest.skip("no C compiler on this machine")
    model = load_base_model(tiny_base, dtype=torch.float32)
    kind = ForwardKind.LEAN if "fused" in request.param else ForwardKind.PACKED
    return ModelRunner(model, rows=len(IDS), kind=kind, native="compiled" in request.param)


def run(runner: ModelRunner, slices: list[RowSlice]) -> torch.Tensor:
    return runner.forward(pack(slices))


@torch.inference_mode()
def test_every_row_has_its_own_logits(runner: ModelRunner, alone: Any, adapters: dict[str, Path]) -> None:
    folders: list[Path | None] = [None, *adapters.values()]
    for row, folder in enumerate(folders):
        runner.lora.place(row, (Part(read(runner, folder)),) if folder else ())
    logits = run(runner, [RowSlice(row, 0, ids) for row, ids in enumerate(IDS)])
    for row, folder in enumerate(folders):
        truth = alone.logits(IDS[row], *([folder] if folder else []))
        torch.testing.assert_close(logits[row], truth, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_pieces_of_a_prompt_and_then_tokens_give_the_logits_of_the_whole(
    runner: ModelRunner, alone: Any, adapters: dict[str, Path]
) -> None:
    ids = list(range(60, 120))
    runner.lora.place(1, (Part(read(runner, adapters["wide"])),))
    run(runner, [RowSlice(0, 0, ids[:50])])
    for start, end in itertools.pairwise((0, 7, 8, 40, 59, 60)):
        both = run(runner, [RowSlice(0, 50 + start % 5, [5]), RowSlice(1, start, ids[start:end])])
    torch.testing.assert_close(both[1], alone.logits(ids, adapters["wide"]), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_moved_row_goes_on_as_before(runner: ModelRunner, alone: Any, adapters: dict[str, Path]) -> None:
    part = (Part(read(runner, adapters["small"])),)
    runner.lora.place(3, part)
    run(runner, [RowSlice(row, 0, IDS[2]) for row in range(4)])
    runner.cache.move(3, 0)
    runner.lora.place(0, part)
    runner.lora.leave(3)
    got = run(runner, [RowSlice(0, len(IDS[2]), [11])])
    torch.testing.assert_close(got[0], alone.logits([*IDS[2], 11], adapters["small"]), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rows_far_apart_in_length_and_a_growing_cache(
    runner: ModelRunner, alone: Any, adapters: dict[str, Path]
) -> None:
    long = [i % 250 for i in range(480)]
    run(runner, [RowSlice(0, 0, IDS[0])])
    runner.cache.reserve(1, 2000)
    run(runner, [RowSlice(1, 0, long)])
    both = run(runner, [RowSlice(0, 3, [1]), RowSlice(1, 480, [2])])
    torch.testing.assert_close(both[0], alone.logits([*IDS[0], 1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], alone.logits([*long, 2]), atol=1e-4, rtol=1e-4)
    runner.idle()
    assert runner.cache.places == runner.rows * SMALLEST


@torch.inference_mode()
def test_larger_ranks_and_blends_refill_the_rows_that_are_in_use(
    runner: ModelRunner, alone: Any, adapters: dict[str, Path]
) -> None:
    small, wide, partial = (read(runner, adapters[name]) for name in ("small", "wide", "partial"))
    runner.lora.place(0, (Part(small),))
    runner.lora.place(1, (Part(small, 0.5), Part(wide, -1.5), Part(partial, 2.0)))
    logits = run(runner, [RowSlice(row, 0, IDS[2]) for row in range(3)])
    blend = ((adapters["small"], 0.5), (adapters["wide"], -1.5), (adapters["partial"], 2.0))
    for row, parts in enumerate((((adapters["small"], 1.0),), blend, ())):
        torch.testing.assert_close(logits[row], alone.logits(IDS[2], *parts), atol=1e-4, rtol=1e-4)


def test_both_passes_hold_the_same_base(tiny_base: Path) -> None:
    digests = {
        ModelRunner(load_base_model(tiny_base, dtype=dtype), rows=1, kind=kind).base_digest()
        for kind in (ForwardKind.LEAN, ForwardKind.PACKED)
        for dtype in (torch.float32,)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("kind", [ForwardKind.LEAN, ForwardKind.PACKED])
def test_a_changed_base_has_another_digest(tiny_base: Path, kind: ForwardKind) -> None:
    runner = ModelRunner(load_base_model(tiny_base, dtype=torch.bfloat16), rows=1, kind=kind)
    before = runner.base_digest()
    with torch.inference_mode():
        runner._tensors["model.norm.weight"].data[0] += 1
    assert runner.base_digest() != before


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose layers are wide enough for blocks of 64 weights, and an adapter for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wider")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes says which faster kernels it would like to have
def test_bank_over_quantised_layers(kind: str, wider: tuple[Path, Path]) -> None:
    from peft import PeftModel

    from adapterhub_lite.adapter_format.quantization import Quantization

    base, adapter = wider

    def load() -> Any:
        return load_base_model(base, dtype=torch.float32, quantization_config=Quantization(kind).bitsandbytes())

    peft = PeftModel.from_pretrained(load(), adapter).eval()
    runner = ModelRunner(load(), rows=2)
    assert runner.kind == ForwardKind.PACKED
    before = runner.base_digest()
    runner.lora.place(1, (Part(read(runner, adapter)),))
    logits = run(runner, [RowSlice(row, 0, IDS[2]) for row in range(2)])
    with peft.disable_adapter():
        plain = peft(input_ids=torch.tensor([IDS[2]])).logits[0, -1].float()
    adapted = peft(input_ids=torch.tensor([IDS[2]])).logits[0, -1].float()
    assert (plain - adapted).abs().max() > 0.1 * plain.abs().max()
    for got, wanted in zip(logits, (plain, adapted), strict=True):
        # Quantised layers compute in bfloat16 or int8, whose rounding follows the shape of the batch.
        torch.testing.assert_close(got, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0)
    assert runner.base_digest() == before


@pytest.mark.slow
def test_a_prompt_of_ten_thousand_tokens_beside_short_ones(
    tiny_base: Path, byte_tokenizer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    """Read in pieces while others write; the base is the tiny one with room for as many positions."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    long_base = AutoModelForCausalLM.from_pretrained(tiny_base)
    long_base.config.max_position_embeddings = 16_384
    long_base.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    adapter = make_adapter(1)
    prompt = "".join(chr(97 + i * i % 26) for i in range(10_000))
    ids = torch.tensor([byte_tokenizer.encode(prompt)])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), adapter).eval()
    with torch.inference_mode():
        truth = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with InferenceEngine.from_base(tmp_path, device="cpu", max_rows=4) as engine:
        short = [GenerationRequest(prompt=text, max_new_tokens=12) for text in ("one", "two", "three")]
        alone = [engine.generate(request).token_ids for request in short]
        whole = GenerationRequest(prompt=prompt, adapter=adapter, max_new_tokens=8)
        results = engine.generate_many([whole, *short])
    assert results[0].token_ids == tuple(truth[0, ids.shape[1] :].tolist())
    assert [result.token_ids for result in results[1:]] == alone

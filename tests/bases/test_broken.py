"""Bases whose files are damaged or contradict each other: refused before anything is computed, with what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterhub_lite.bases import base_fingerprint, load_base_model, load_tokenizer
from adapterhub_lite.bases.encoding import ends_in
from adapterhub_lite.bases.structure import structure_for, structure_in
from adapterhub_lite.errors import BrokenBaseError
from adapterhub_lite.memory import estimate_memory
from tests.fixture_types import MakeAdapter

Damage = Callable[[Path], object]
QUERY = "model.layers.0.self_attn.q_proj"
LAST = "model.layers.1.mlp.up_proj.weight"


def configured(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))

    return change


def weighted(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return write


def written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def cut(at: int) -> Damage:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:at])

    return write


def spoil(tensors: dict[str, Tensor], value: float) -> None:
    tensors[LAST][3, 5] = value


# What is done to a sound base -> what the refusal names.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "an activation that there is not": (configured(hidden_act="nope"), "nope"),
    "heads that do not divide": (configured(num_attention_heads=5), "multiple of the number of attention heads"),
    "a word for a number": (configured(num_hidden_layers="two"), "num_hidden_layers"),
    "a dtype that there is not": (configured(dtype="float99"), "float99"),
    "a family that there is not": (configured(model_type="nope"), "model type `nope`"),
    "padding outside the vocabulary": (configured(pad_token_id=5000), "Padding_idx"),
    "rotations that there are not": (configured(rope_parameters={"rope_type": "nope", "factor": 2.0}), "nope"),
    "a configuration that is cut": (written("config.json", '{"a":'), "config.json is not JSON"),
    "a configuration that is a list": (written("config.json", "[]"), "no JSON object but a list"),
    "ends that are not JSON": (written("generation_config.json", "{"), "generation_config.json is not JSON"),
    "a tokenizer that is cut": (written("tokenizer.json", "{"), "the tokenizer of the base"),
    "more layers than weights": (configured(num_hidden_layers=3), r"lack model\.layers\.2.* and 6 more weights"),
    "fewer layers than weights": (configured(num_hidden_layers=1), r"hold model\.layers\.1.* has no place"),
    "another vocabulary": (configured(vocab_size=300), "cannot use the weights"),
    "another family": (configured(model_type="gpt2"), "lack"),
    "a weight that is missing": (weighted(lambda found: found.pop(LAST)), f"lack {LAST} of LlamaForCausalLM"),
    "a head that is missing": (configured(tie_word_embeddings=False), "lack lm_head.weight"),
    "a bias without a place": (weighted(lambda found: found.update({f"{QUERY}.bias": torch.ones(32)})), "has no place"),
    "a scale without its packing": (
        weighted(lambda found: found.update({f"{QUERY}.weight_scale": torch.ones(1)})),
        "has no place",
    ),
    "another shape": (
        weighted(lambda found: found.update({f"{QUERY}.weight": torch.ones(30, 32)})),
        "cannot use the weights",
    ),
    "whole numbers": (
        weighted(lambda found: found.update({f"{QUERY}.weight": torch.ones(32, 32, dtype=torch.int8)})),
        "as whole numbers",
    ),
    "a value that is no number": (weighted(lambda found: spoil(found, float("nan"))), f"NaN or infinity in {LAST}"),
    "a value without end": (weighted(lambda found: spoil(found, -float("inf"))), f"NaN or infinity in {LAST}"),
    "weights that are cut": (cut(9000), "truncated"),
    "a header that is cut": (cut(20), "truncated"),
    "no header": (cut(3), "truncated"),
}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns(".*")))


@pytest.mark.parametrize("what", DAMAGES)
def test_it_is_refused_with_what_is_wrong(what: str, base: Path, recwarn: pytest.WarningsRecorder) -> None:
    damage, named = DAMAGES[what]
    damage(base)
    with pytest.raises(BrokenBaseError, match=named) as refused:
        base_fingerprint(base)
        structure_in(base)
        load_tokenizer(base)
        ends_in(base)
        load_base_model(base)
    assert str(base) in str(refused.value) and "\n" not in str(refused.value)


def test_an_adapter_beside_it_is_not_put_on(base: Path, make_adapter: MakeAdapter) -> None:
    """transformers would, in silence: the same folder would then be another base."""
    shutil.copytree(make_adapter(seed=1), base, dirs_exist_ok=True)
    for read in (load_base_model, base_fingerprint):
        with pytest.raises(BrokenBaseError, match="holds an adapter"):
            read(base)


@pytest.mark.parametrize("what", ["an activation that there is not", "padding outside the vocabulary"])
def test_so_does_a_plan(what: str, base: Path) -> None:
    DAMAGES[what][0](base)
    with pytest.raises(BrokenBaseError, match=DAMAGES[what][1]):
        estimate_memory(str(base), "lora-fp32", batch_size=1, sequence_length=16)


def test_a_configuration_in_memory_is_no_folder_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for name in ("", "org/model"):
        config = LlamaConfig(vocab_size=8, pad_token_id=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
        config.name_or_path = name
        with pytest.raises(BrokenBaseError, match="Padding_idx") as refused:
            structure_for(config)
        assert "deleted" not in str(refused.value)


def test_parts_that_a_family_leaves_out_may_lie_there(base: Path) -> None:
    before = load_base_model(base).state_dict()
    weighted(
        lambda found: found.update(
            {
                "model.vision_tower.layers.0.mlp.fc1.weight": torch.ones(4, 4),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.multi_modal_projector.weight": torch.ones(4, 4),
            }
        )
    )(base)
    after = load_base_model(base).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_base_saved_without_its_head_is_not_one(tiny_base: Path, tmp_path: Path) -> None:
    """AutoModel saves the layers alone: of a tied head nothing is missing, of another it is."""
    from transformers import AutoConfig, AutoModel

    for tied in (True, False):
        folder = tmp_path / f"{tied}"
        model = AutoModel.from_config(AutoConfig.from_pretrained(tiny_base, tie_word_embeddings=tied))
        model.save_pretrained(folder)
        if tied:
            ours = load_base_model(folder)
            torch.testing.assert_close(ours.get_input_embeddings().weight, model.embed_tokens.weight)
        else:
            with pytest.raises(BrokenBaseError, match=r"lack lm_head\.weight"):
                load_base_model(folder)

"""What is read from strangers: sound configurations pass and come out plain; paths and names of people do not."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.adapter_format.binding import bind
from adapterhub_lite.adapter_format.folder import survey_folder
from adapterhub_lite.adapter_format.lora_config import ACTING, SPENT, ConfigProblems, LoraConfigFile, read_lora_config
from adapterhub_lite.adapter_format.strict_reading import (
    TensorEntry,
    all_finite,
    nonfinite_tensors,
    read_tensor_entries,
    strict_json,
)
from adapterhub_lite.errors import ReferenceSyntaxError
from adapterhub_lite.registry import AdapterReference
from adapterhub_lite.registry.operations.intake import scrub


def _read(**changes: Any) -> Any:
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **changes}
    return read_lora_config(json.dumps(plain).encode())


def test_whatever_peft_saves_by_default_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = read_lora_config((tmp_path / "adapter_config.json").read_bytes())
    written = json.loads(config.to_peft(base_id="org/base", revision="a" * 40))
    assert written["base_model_name_or_path"] == "org/base" and written["revision"] == "a" * 40
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    again = LoraConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.target_modules) == (8, 32, {"q_proj", "v_proj"})
    assert read_lora_config(json.dumps(written).encode()).deciding() == config.deciding()


def test_every_inert_key_of_peft_is_known() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    assert {f.name for f in fields(LoraConfig)} <= {*ACTING, *SPENT, *LoraConfigFile.model_fields}


def test_problems_of_a_configuration_come_together() -> None:
    with pytest.raises(ConfigProblems) as caught:
        _read(r=-1, lora_alpha="x", megatron_core="os", surprise=1)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/ann/data/rows.jsonl", "rows.jsonl"),
        ("trained on /Users/ann/My/rows.jsonl, twice", "trained on rows.jsonl, twice"),
        ("C:\\Users\\ann\\rows.jsonl", "rows.jsonl"),
        ("~/runs/7/", "folder"),
        ("file:///root/x/y", "y"),
        ("https://huggingface.co/org/repo", "https://huggingface.co/org/repo"),
        ("org/repo", "org/repo"),
        ("3/4 of it and/or none", "3/4 of it and/or none"),
    ],
)
def test_paths_are_scrubbed(text: str, clean: str) -> None:
    assert scrub({"a": [text]}) == {"a": [clean]}
    assert scrub([float("nan"), 1.5, {"a": float("-inf")}]) == [None, 1.5, {"a": None}]


@pytest.mark.parametrize(
    "text",
    ["", "a:", "a:0", "a:-1", "a:01", "@prod", "a@", "a@7", "a b", "../a", "a:1@b", "sha256:abc", "a" * 65, None, 3],
)
def test_what_is_no_reference_is_refused(text: Any) -> None:
    with pytest.raises(ReferenceSyntaxError, match="Wanted an adapter as"):
        AdapterReference.parse(text)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}(:[1-9][0-9]{0,5}|@[A-Za-z][A-Za-z0-9]{0,9})?", fullmatch=True))
def test_references_survive_a_round_trip(text: str) -> None:
    assert str(AdapterReference.parse(text)) == text


@given(st.binary(max_size=300))
def test_no_bytes_break_the_header_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    for written in (content, struct.pack("<Q", len(content)) + content):
        path.write_bytes(written)
        try:
            read_tensor_entries(path)
        except ValueError:
            continue


@given(st.binary(max_size=200))
def test_no_bytes_break_the_json_reader(content: bytes) -> None:
    try:
        assert isinstance(strict_json(content, what="it", limit=150), dict)
    except ValueError as error:
        assert str(error).startswith("it ")


def test_every_exponent_is_looked_at(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        fine = torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0], dtype=dtype)
        found = {"fine": fine, **{f"bad{i}": fine.clone() for i in range(3)}}
        for index, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            found[f"bad{index}"][-1] = value
        save_file(found, tmp_path / "x.safetensors")
        path = tmp_path / "x.safetensors"
        assert set(nonfinite_tensors(path, read_tensor_entries(path))) == {"bad0", "bad1", "bad2"}


def test_weights_in_several_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    (problem,) = survey_folder(tmp_path).problems
    assert "adapter_model.safetensors is missing; its weights are in several files" in problem


def test_a_pattern_that_fits_no_module_is_noted() -> None:
    config = _read(rank_pattern={"q_proj": 4, "nothing": 2}, alpha_pattern={"other": 3})
    shapes = {"lora_A.weight": (4, 16), "lora_B.weight": (16, 4)}
    entries = [TensorEntry(f"base_model.model.m.q_proj.{part}", "F32", shape, 0, 0) for part, shape in shapes.items()]
    notes = " ".join(bind(config, entries, {"m.q_proj": (16, 16)}).notes)
    assert "rank_pattern names no adapted module with nothing" in notes and "with other" in notes
    assert "q_proj" not in notes


# dtype -> (bytes of a value, mask of its exponent): a value is finite unless all bits of the mask are set.
EXPONENTS = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}


@given(st.data(), st.sampled_from(sorted(EXPONENTS)))
def test_finite_is_what_the_exponents_say(data: st.DataObject, dtype: str) -> None:
    width, mask = EXPONENTS[dtype]
    # Few different bytes, so that exponents of ones are met often; as whole values.
    byte = st.sampled_from((0x00, 0x7B, 0x7C, 0x7F, 0x80, 0xFB, 0xFC, 0xFF))
    block = bytes(data.draw(st.lists(byte, max_size=6 * width).map(lambda found: found[: len(found) // width * width])))
    values = np.frombuffer(block, dtype=f"<u{width}")
    assert all_finite(block, dtype) == (not ((values & mask) == mask).any())

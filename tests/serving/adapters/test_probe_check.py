"""`load(verify="probes")`: the engine itself is asked what the adapter answered when it was recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import BaseMismatchError, IntegrityError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine


@pytest.fixture
def base(tiny_base: Path) -> ResolvedBase:
    return resolve_base(tiny_base)


@pytest.fixture
def probed(registered: AdapterRegistry, adapters: dict[str, Path], base: ResolvedBase) -> AdapterRegistry:
    """A registry with the adapters "small" and "wide" once more, with probes, as version 2."""
    for name in ("small", "wide"):
        registered.add(adapters[name], name, base=base, verify="probes")
    return registered


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_adapter_answers_as_recorded(
    dtype: str, native: bool | None, probed: AdapterRegistry, make_engine: Callable[..., InferenceEngine]
) -> None:
    engine = make_engine(registry=probed, dtype=dtype, native=native)
    running = [engine.submit(GenerationRequest(prompt="abc", adapter="wide", max_new_tokens=40)) for _ in range(3)]
    loaded = engine.load("small:2", pin=True, verify="probes")
    assert (loaded.digest, loaded.pinned) == (probed.resolve("small:2").digest, True)
    for handle in running:
        assert handle.result().adapter == "wide:2"


def _with_config(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**found, **changes}))


def _with_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("change", [lambda folder: _with_config(folder, lora_alpha=7), _with_weights])
def test_one_that_answers_otherwise_is_not_let_in(
    change: Callable[[Path], None], probed: AdapterRegistry, base: ResolvedBase, engine: InferenceEngine,
    make_engine: Callable[..., InferenceEngine], tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "changed"
    shutil.copytree(probed.export("small:2", tmp_path / "out"), folder)
    (folder / "adapterhub.json").unlink()
    change(folder)
    probed.add(folder, "changed", base=base)
    with pytest.raises(BaseMismatchError, match="does not behave on this engine as recorded"):
        make_engine(registry=probed).load("changed", verify="probes")
    with pytest.raises(BaseMismatchError, match="does not behave on this engine"):
        engine.load(folder, verify="probes")


def test_what_cannot_be_asked_is_said(
    probed: AdapterRegistry, engine: InferenceEngine, make_engine: Callable[..., InferenceEngine], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="carries no probes"):
        make_engine(registry=probed).load("small:1", verify="probes")
    folder = probed.export("small:2", tmp_path / "out")
    path = folder / "probes.safetensors"
    tensors = load_file(path)
    tensors["tokens"][0, 0] = 999_999
    save_file(tensors, path, metadata={"format": "adapterhub-probes-1", "dtype": "float32"})
    with pytest.raises(IntegrityError, match="token 999999"):
        engine.load(folder, verify="probes")

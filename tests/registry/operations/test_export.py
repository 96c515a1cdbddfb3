"""Layouts for other programs: vLLM's resolver folder, and GGUF through llama.cpp's own converter."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, UsageError
from adapterhub_lite.merging.deltas import read_factors
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations import export as exporting
from adapterhub_lite.registry.operations.export import export_gguf, export_vllm

# What llama.cpp's converter is asked for: --base FOLDER --outfile FILE ADAPTER_FOLDER.
CONVERTER = """
import json, pathlib, sys
assert sys.argv[1] == "--base" and sys.argv[3] == "--outfile"
folder = pathlib.Path(sys.argv[5])
if not (pathlib.Path(sys.argv[2]) / "config.json").exists():
    sys.exit("no such base")
assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
pathlib.Path(sys.argv[4]).write_bytes(b"GGUF" + (folder / "adapter_model.safetensors").read_bytes()[:8])
"""


def test_the_folder_that_vllm_resolves(
    registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    manifests = [registry.add(adapter, "sql", base=base), registry.add(other_adapter, "event", base=base)]
    folders = export_vllm(registry.store, manifests, tmp_path / "cache")
    assert folders == [tmp_path / "cache" / "sql", tmp_path / "cache" / "event"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        # What the resolver itself looks at before it takes an adapter.
        found = json.loads((folder / "adapter_config.json").read_text())
        assert found["peft_type"] == "LORA" and found["base_model_name_or_path"] == base.model_id
    with pytest.raises(UsageError, match="not empty"):
        export_vllm(registry.store, manifests[:1], tmp_path / "cache")
    with pytest.raises(UsageError, match="one version of each"):
        export_vllm(registry.store, [manifests[0], manifests[0]], tmp_path / "two")


@pytest.mark.parametrize(
    ("lora", "reason"),
    [({"use_dora": True}, "merge --into-base"), ({"rank_pattern": {"q_proj": 2}}, "not a plain LoRA")],
)
def test_what_vllm_cannot_serve_is_said(
    lora: dict[str, Any], reason: str, registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    manifest = registry.add(make_adapter(**lora), "sql", base=base)
    with pytest.raises(ConfigurationError, match=reason):
        export_vllm(registry.store, [manifest], tmp_path / "cache")


def test_gguf_goes_through_the_converter(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = registry.add(adapter, "sql", base=base)
    out = tmp_path / "out" / "sql.gguf"
    monkeypatch.delenv("LLAMA_CPP_CONVERTER", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match="not on the path"):
        export_gguf(registry.store, manifest, out, base=base)
    script = tmp_path / "convert_lora_to_gguf.py"
    script.write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP_CONVERTER", str(script))
    with pytest.raises(ConfigurationError, match="no such base"):
        export_gguf(registry.store, manifest, out, base=ResolvedBase("tiny", "tiny", tmp_path))
    with pytest.raises(UsageError, match="on this machine"):
        export_gguf(registry.store, manifest, out)
    assert not out.exists() and list(out.parent.iterdir()) == []
    assert export_gguf(registry.store, manifest, out, base=base).read_bytes().startswith(b"GGUF")
    with pytest.raises(UsageError, match="already"):
        export_gguf(registry.store, manifest, out, base=base)


@pytest.mark.skipif(
    not (os.environ.get("LLAMA_CPP_CONVERTER") or shutil.which(exporting.CONVERTER)),
    reason="there is no llama.cpp converter: see `adapterhub-lite doctor`",
)
def test_the_real_converter_keeps_every_delta(
    registry: AdapterRegistry, make_adapter: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    import torch
    from gguf import GGUFReader

    manifest = registry.add(make_adapter(seed=1, targets=("v_proj", "down_proj"), alpha=12), "sql", base=base)
    made = GGUFReader(export_gguf(registry.store, manifest, tmp_path / "sql.gguf", base=base))
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in made.tensors}
    scaling = made.fields["adapter.lora.alpha"].contents() / manifest.lora.rank
    wanted = read_factors(registry.file(manifest, "adapter_model.safetensors"), manifest.lora)
    assert len(found) == 2 * len(wanted) == 8
    for layer in range(2):
        for here, there in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
            a, b = (found[f"blk.{layer}.{there}.weight.lora_{part}"] for part in "ab")
            torch.testing.assert_close(scaling * b @ a, wanted[f"model.layers.{layer}.{here}"].delta())

"""The plugin for a vLLM that others run: which names it resolves, to which bytes, and what it says of the others."""

import asyncio
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.sign import generate_key
from adapterhub_lite.serving.vllm import resolver as plugin
from adapterhub_lite.serving.vllm.resolver import RegistryResolver
from tests.checkout import ROOT


@pytest.fixture
def resolver(registry: AdapterRegistry) -> RegistryResolver:
    return RegistryResolver(registry.home)


def test_names_that_never_move_are_resolved_to_verified_files(
    resolver: RegistryResolver, registry: AdapterRegistry, tiny_base: Path
) -> None:
    manifest = registry.resolve("sql:2")
    folders = {resolver.folder(str(tiny_base), name) for name in ("sql:2", manifest.digest)}
    (folder,) = folders
    assert folder is not None and {one.name for one in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    weights = registry.file(manifest, "adapter_model.safetensors")
    assert (folder / "adapter_model.safetensors").read_bytes() == weights.read_bytes()
    assert folder.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["sql", "sql@prod", "org/sql-lora", "org/sql-lora@prod"])
def test_a_name_that_may_move_is_refused_with_the_reason(
    resolver: RegistryResolver, tiny_base: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=r"may mean other bytes tomorrow.*Ask for.*(sql:\d or sha256:|org/sql-lora:3)"):
        resolver.folder(str(tiny_base), name)


@pytest.mark.parametrize("name", ["nobody", "nobody:3", "sql:99", "sha256:" + "0" * 64, "../../etc", "/etc", "a b"])
def test_what_the_registry_has_not_is_left_to_others(resolver: RegistryResolver, tiny_base: Path, name: str) -> None:
    assert resolver.folder(str(tiny_base), name) is None


def test_another_base_is_refused(
    resolver: RegistryResolver, registry: AdapterRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for a base with the fingerprint"):
        resolver.folder(str(tmp_path), "sql:2")
    with pytest.raises(ValueError, match="this vLLM serves org/other"):
        resolver.folder("org/other", "sql:2")
    assert resolver.folder(resolve_base(tiny_base).model_id, "sql:2") is not None


def test_a_repository_is_pulled_only_where_it_is_allowed(resolver: RegistryResolver, tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="does not pull"):
        asyncio.run(resolver.resolve_lora(str(tiny_base), "org/sql-lora:3"))


def test_a_package_that_vllm_did_not_bring_is_named(
    home: Path, tiny_base: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = AdapterRegistry(home)
    registry.add(make_adapter(), "sql", base=resolve_base(tiny_base))
    generate_key(home, "default")
    registry.sign("sql:1")
    registry.trust.require(True)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ValueError, match=r"'sql:1' cannot be looked up: the package 'cryptography.*' is not installed"):
        asyncio.run(RegistryResolver(home).resolve_lora(str(tiny_base), "sql:1"))


def test_vllm_is_told_of_it_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, registry: AdapterRegistry, tiny_base: Path
) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"adapterhub": f"{plugin.__name__}:register"}
    known: dict[str, Any] = {}
    resolving, asking = types.ModuleType("vllm.lora.resolver"), types.ModuleType("vllm.lora.request")
    resolving.LoRAResolverRegistry = types.SimpleNamespace(register_resolver=known.__setitem__)  # type: ignore[attr-defined]
    asking.LoRARequest = types.SimpleNamespace  # type: ignore[attr-defined]
    for module in (resolving, asking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("ADAPTERHUB_HOME", str(registry.home))
    plugin.register()
    found = asyncio.run(known["adapterhub"].resolve_lora(str(tiny_base), "sql:1"))
    assert found.lora_name == "sql:1" and (Path(found.lora_path) / "adapter_config.json").exists()
    assert asyncio.run(known["adapterhub"].resolve_lora(str(tiny_base), "nobody")) is None

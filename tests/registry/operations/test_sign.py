"""Signatures: made, verified, required; a changed byte or a stranger's key is named."""

import shutil
from pathlib import Path

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, UnknownNameError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.intake import import_adapter
from adapterhub_lite.registry.operations.sign import generate_key


@pytest.fixture
def signed(registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path) -> tuple[str, Path]:
    """The public key, and the exported folder of a version signed with it."""
    public_key = generate_key(registry.home)
    registry.add(adapter, "sql", base=base)
    registry.sign("sql")
    return public_key, registry.export("sql", tmp_path / "signed")


@pytest.fixture
def there(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "there")


def test_a_signature_travels_and_verifies(signed: tuple[str, Path], there: AdapterRegistry) -> None:
    public_key, folder = signed
    import_adapter(there.store, folder, name="renamed")
    assert there.show("renamed").signed
    assert there.verify("renamed") is None, "valid, but nobody we know"
    there.trust.trust("ann", public_key)
    assert there.verify("renamed") == "ann"
    there.trust.distrust("ann")
    assert there.verify("renamed") is None


def test_the_policy_refuses_the_unsigned_and_the_unknown(
    signed: tuple[str, Path], registry: AdapterRegistry, there: AdapterRegistry, tmp_path: Path
) -> None:
    public_key, folder = signed
    there.trust.require(True)
    with pytest.raises(AdapterRejectedError, match="key that is not trusted"):
        import_adapter(there.store, folder)
    unsigned = tmp_path / "unsigned"
    shutil.copytree(folder, unsigned)
    (unsigned / "adapterhub.sig.json").unlink()
    with pytest.raises(AdapterRejectedError, match="not signed"):
        import_adapter(there.store, unsigned)
    there.trust.trust("ann", public_key)
    assert import_adapter(there.store, folder).reference == "sql:1"
    there.trust.require(False)
    assert import_adapter(there.store, unsigned).reference == "sql:1"


def test_a_wrong_signature_is_refused_without_any_policy(signed: tuple[str, Path], there: AdapterRegistry) -> None:
    folder = signed[1]
    path = folder / "adapterhub.sig.json"
    good = path.read_text()
    swapped = good.translate(str.maketrans("0123456789", "1234567890"))
    for wrong in (swapped, "{}", "[]", good.replace("ed25519", "none")):
        path.write_text(wrong)
        with pytest.raises(IntegrityError, match="signature"):
            import_adapter(there.store, folder)
    path.write_text(good)
    manifest = folder / "adapterhub.json"
    manifest.write_text(manifest.read_text().replace('"task": null', '"task": "better"'))
    with pytest.raises(IntegrityError, match="not a signature over this manifest"):
        import_adapter(there.store, folder)


def test_verify_reads_every_byte(signed: tuple[str, Path], registry: AdapterRegistry) -> None:
    path = registry.file(registry.resolve("sql"), "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not what was signed"):
        registry.verify("sql")


def test_keys_are_private_and_not_overwritten(registry: AdapterRegistry, adapter: Path, base: ResolvedBase) -> None:
    generate_key(registry.home, "ann")
    assert (registry.home / "keys" / "ann.pem").stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="already"):
        generate_key(registry.home, "ann")
    with pytest.raises(UsageError, match="name for the key"):
        generate_key(registry.home, "../ann")
    registry.add(adapter, "sql", base=base)
    with pytest.raises(UnknownNameError, match="Known: ann"):
        registry.sign("sql", key="anne2")
    with pytest.raises(IntegrityError, match="not signed"):
        registry.verify("sql")


def test_a_damaged_policy_trusts_nobody_silently(registry: AdapterRegistry) -> None:
    with pytest.raises(UsageError, match="64 hex"):
        registry.trust.trust("ann", "abc")
    with pytest.raises(UnknownNameError):
        registry.trust.distrust("ann")
    (registry.home / "trust.json").write_text('{"required": "no"}')
    with pytest.raises(UsageError, match="not a trust policy"):
        registry.trust.read()

"""Signatures: made, verified, required; a changed byte or a stranger's key is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, UnknownNameError, UsageError
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.pull import pull_locked
from adapterhub_lite.registry.operations.intake import import_adapter
from adapterhub_lite.registry.operations.lock import Lock, verify_lock, write_lock
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
        import_adapter(there.store, folder, name="sql")
    unsigned = tmp_path / "unsigned"
    shutil.copytree(folder, unsigned)
    (unsigned / "adapterhub.sig.json").unlink()
    with pytest.raises(AdapterRejectedError, match="not signed"):
        import_adapter(there.store, unsigned, name="sql")
    there.trust.trust("ann", public_key)
    assert import_adapter(there.store, folder, name="sql").reference == "sql:1"
    there.trust.require(False)
    assert import_adapter(there.store, unsigned, name="sql").reference == "sql:1"


def test_a_wrong_signature_is_refused_without_any_policy(signed: tuple[str, Path], there: AdapterRegistry) -> None:
    folder = signed[1]
    path = folder / "adapterhub.sig.json"
    good = path.read_text()
    swapped = good.translate(str.maketrans("0123456789", "1234567890"))
    for wrong in (swapped, "{}", "[]", good.replace("ed25519", "none")):
        path.write_text(wrong)
        with pytest.raises(IntegrityError, match="signature"):
            import_adapter(there.store, folder, name="sql")
    path.write_text(good)
    manifest = folder / "adapterhub.json"
    manifest.write_text(manifest.read_text().replace('"task": null', '"task": "better"'))
    with pytest.raises(IntegrityError, match="not a signature over this manifest"):
        import_adapter(there.store, folder, name="sql")


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


@pytest.fixture
def strict(there: AdapterRegistry, signed: tuple[str, Path]) -> AdapterRegistry:
    """A registry that requires signatures and trusts the one key."""
    there.trust.trust("ann", signed[0])
    there.trust.require(True)
    return there


def test_a_signature_covers_name_version_and_base(
    signed: tuple[str, Path], strict: AdapterRegistry, there: AdapterRegistry
) -> None:
    """Passed off as another adapter, as a newer version, or with an origin that says what it was, it is worth nothing."""
    folder = signed[1]
    path = folder / "adapterhub.json"
    original = json.loads(path.read_text())
    lies: list[dict[str, Any]] = [{"name": "event"}, {"version": 9}, {"base": {**original["base"], "id": "org/other"}}]
    for lie in lies:
        told = {"origin": {"name": original["name"], "version": original["version"]}}
        for content in (original | lie, original | lie | told):
            path.write_text(json.dumps(content))
            with pytest.raises(IntegrityError, match="not a signature over this manifest"):
                import_adapter(strict.store, folder, name="sql")
    assert strict.list() == []
    path.write_text(json.dumps(original))
    assert import_adapter(strict.store, folder, name="mine").reference == "mine:1"
    assert strict.verify("mine") == "ann" and strict.resolve("mine"), "whatever it is called here"


def test_a_signature_without_its_scheme_is_worth_nothing_now(
    signed: tuple[str, Path], registry: AdapterRegistry, there: AdapterRegistry
) -> None:
    folder = signed[1]
    path = folder / "adapterhub.sig.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "scheme"}
    path.write_text(json.dumps(old))
    assert import_adapter(there.store, folder, name="sql").reference == "sql:1"
    assert not there.show("sql").signed, "taken as unsigned"
    there.trust.trust("ann", signed[0])
    there.trust.require(True)
    with pytest.raises(AdapterRejectedError, match="older kind"):
        import_adapter(there.store, folder, name="other")


def test_the_policy_holds_for_what_is_here_already(
    signed: tuple[str, Path], registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    registry.add(adapter, "plain", base=base)
    registry.trust.trust("ann", signed[0])
    assert [reference for reference, _ in registry.trust.audit()] == ["plain:1"]
    registry.trust.require(True)
    for attempt in (
        lambda: registry.resolve("plain"),
        lambda: registry.hold("plain"),
        lambda: registry.export("plain", tmp_path / "out"),
    ):
        with pytest.raises(AdapterRejectedError, match="not signed, and the policy requires"):
            attempt()
    assert registry.resolve("sql") and registry.show("plain") and registry.list("plain")
    registry.sign("plain")
    assert registry.resolve("plain").reference == "plain:1" and registry.trust.audit() == []
    registry.trust.distrust("ann")
    with pytest.raises(AdapterRejectedError, match="key that is not trusted"):
        registry.resolve("plain")
    assert len(registry.trust.audit()) == 2


def test_the_policy_holds_for_what_is_pulled(
    signed: tuple[str, Path], registry: AdapterRegistry, strict: AdapterRegistry, adapter: Path, base: ResolvedBase,
    hub_server: HubServer,
) -> None:  # fmt: skip
    """Plain PEFT cannot be signed; what was pulled before the policy falls, until its publisher signs it."""
    api = HfApi(endpoint=hub_server.url, token=False)
    api.create_repo("org/plain")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        api.upload_file(path_or_fileobj=adapter / name, path_in_repo=name, repo_id="org/plain")
    with pytest.raises(AdapterRejectedError, match="nobody can have signed it"):
        strict.pull("org/plain", adopt=True, base=base, endpoint=hub_server.url)
    registry.add(adapter, "poem", base=base)
    registry.push("poem", "org/poem", endpoint=hub_server.url)
    strict.trust.require(False)
    strict.pull("org/poem", endpoint=hub_server.url)
    strict.trust.require(True)
    for offline in (False, True):
        with pytest.raises(AdapterRejectedError, match="not signed"):
            strict.pull("org/poem", endpoint=hub_server.url, offline=offline)
    registry.sign("poem")
    signature = (registry.home / "manifests" / "poem" / "1.sig").read_bytes()
    api.upload_file(path_or_fileobj=signature, path_in_repo="adapterhub.sig.json", repo_id="org/poem")
    assert strict.pull("org/poem", revision="main", endpoint=hub_server.url).manifest.reference == "poem:1"
    assert strict.resolve("poem").reference == "poem:1" and strict.verify("poem") == "ann"


def test_the_policy_holds_for_what_a_lock_names(
    signed: tuple[str, Path], registry: AdapterRegistry, strict: AdapterRegistry, adapter: Path, base: ResolvedBase,
    hub_server: HubServer, tmp_path: Path,
) -> None:  # fmt: skip
    """A lock says which bytes, not whose: unsigned they are refused, missing here or pulled before the policy."""
    registry.add(adapter, "poem", base=base)
    registry.push("poem", "org/poem", endpoint=hub_server.url)
    lock = write_lock(registry.store, ["poem"], tmp_path / "lock", sources={"poem": "org/poem"}, bases=[base])
    with pytest.raises(AdapterRejectedError, match="not signed"):
        pull_locked(strict.store, lock, endpoint=hub_server.url, bases=[base])
    assert strict.list() == [] and list(strict.store.objects) == []
    strict.trust.require(False)
    assert [one.reference for one in pull_locked(strict.store, lock, endpoint=hub_server.url)] == ["poem:1"]
    strict.trust.require(True)
    with pytest.raises(AdapterRejectedError, match="not signed"):
        pull_locked(strict.store, lock, endpoint=hub_server.url)
    (problem,) = verify_lock(strict.store, lock, bases=[base])
    assert problem.startswith("poem:1: it is not signed")
    alone = Lock(adapters=(lock.adapters[0].model_copy(update={"source": None}),))
    with pytest.raises(UsageError, match=r"not signed.*does not say where"):
        pull_locked(strict.store, alone)
    registry.sign("poem")
    signature = (registry.home / "manifests" / "poem" / "1.sig").read_bytes()
    api = HfApi(endpoint=hub_server.url, token=False)
    commit = api.upload_file(path_or_fileobj=signature, path_in_repo="adapterhub.sig.json", repo_id="org/poem")
    newer = Lock(adapters=(lock.adapters[0].model_copy(update={"revision": commit.oid}),))
    pull_locked(strict.store, newer, endpoint=hub_server.url)
    assert verify_lock(strict.store, lock, bases=[base]) == [] and strict.verify("poem") == "ann"

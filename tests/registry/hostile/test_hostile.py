"""Every hostile or broken adapter is refused with its reason, and nothing large is allocated on the way."""

import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.fit import inspect_adapter
from adapterhub_lite.errors import AdapterHubError, AdapterRejectedError, BaseMismatchError, IntegrityError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.intake import import_adapter
from tests.registry.hostile.case import Case, Spoil
from tests.registry.hostile.corpus import CASES
from tests.registry.hostile.files import LEFT_ALONE

BUDGET_BYTES = 64 << 20


@pytest.fixture(scope="session")
def parcel(adapter: Path, base: ResolvedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    elsewhere = AdapterRegistry(tmp_path_factory.mktemp("elsewhere"))
    elsewhere.add(adapter, "sql", base=base)
    return elsewhere.export("sql", tmp_path_factory.mktemp("parcel") / "sql")


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The names of all files that this process opens from now on."""
    names: list[str] = []
    sys.addaudithook(lambda event, found: names.append(str(found[0])) if event == "open" else None)
    return names


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_it_is_refused(
    case: Case, registry: AdapterRegistry, adapter: Path, parcel: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(adapter if case.door == "add" else parcel, folder)
    case.spoil(folder)
    assert base.fingerprint
    tracemalloc.start()
    try:
        with pytest.raises(AdapterHubError, match=case.reason) as caught:
            if case.door == "add":
                registry.add(folder, "sql", base=base)
            else:
                import_adapter(registry.store, folder, base=base, name="sql")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, AdapterRejectedError | IntegrityError | BaseMismatchError)
    assert len(str(caught.value)) < 6000
    assert peak < BUDGET_BYTES
    assert registry.list() == [] and list(registry.store.objects) == []
    assert not any((registry.home / "staging").iterdir())


@pytest.mark.parametrize(
    ("name", "spoil", "entry"), LEFT_ALONE, ids=[name.replace(" ", "-") for name, *_ in LEFT_ALONE]
)
def test_what_does_not_belong_is_left_alone(
    name: str,
    spoil: Spoil,
    entry: str,
    registry: AdapterRegistry,
    adapter: Path,
    base: ResolvedBase,
    tmp_path: Path,
    opened: list[str],
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(adapter, folder)
    (folder / "README.md").unlink(missing_ok=True)
    spoil(folder)
    opened.clear()
    assert inspect_adapter(folder, base=base).left_alone == [entry]
    manifest = registry.add(folder, "sql", base=base)
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    stranger = next(path for path in folder.iterdir() if path.name not in manifest.files)
    assert str(stranger) not in opened and str(folder / "adapter_config.json") in opened
    assert len(list(registry.store.objects)) == 2


def test_all_problems_come_in_one_report(
    registry: AdapterRegistry, adapter: Path, base: ResolvedBase, tmp_path: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(adapter, folder)
    chosen = ["negative rank", "auto_mapping", "layer replication", "NaN", "probes that are none", "script in the card"]
    for name in chosen:
        next(case for case in CASES if case.name == name).spoil(folder)
    with pytest.raises(AdapterRejectedError) as caught:
        registry.add(folder, "sql", base=base)
    report = "\n".join(caught.value.problems)
    for word in ("r: ", "auto_mapping", "layer_replication", "NaN or infinite", "no safetensors file", "<script"):
        assert word in report
    assert len(caught.value.problems) == len(chosen)


def test_the_sound_ones_pass(registry: AdapterRegistry, adapter: Path, parcel: Path, base: ResolvedBase) -> None:
    registry.add(adapter, "mine", base=base)
    import_adapter(registry.store, parcel, base=base, name="sql")

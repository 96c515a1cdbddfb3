"""The bases that can be trained on: which there are, what they are called, and what becomes of a run on another one."""

import shutil
from pathlib import Path

import pytest

from adapterhub_app.backend import Backend
from adapterhub_app.bases import base_named, base_of_run, bases_here, is_served, serving_words
from adapterhub_app.display.task import adapter_choices, describe_task
from adapterhub_app.durations import MOST_KINDS, Durations
from adapterhub_app.tabs.run_panel import elsewhere_words
from adapterhub_app.tabs.task_cards import draw_cards
from adapterhub_app.training import Source, look_at
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.runs.folder import Run, read_run
from adapterhub_lite.runs.state import RunState, now, write_state
from adapterhub_lite.training.settings import TrainingRecipe
from tests.app.world import World
from tests.fixture_types import MakeAdapter


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A base of the same shape with another number in its weights, and so with another fingerprint."""
    folder = shutil.copytree(tiny_base, tmp_path / "other base", ignore=shutil.ignore_patterns(".*"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def backend(world: World, tmp_path: Path) -> Backend:
    """The world's engine over a home of its own, with nothing in it."""
    return Backend(world.engine, AdapterRegistry(tmp_path / "home"), "tiny", base=world.base)


def run_on(backend: Backend, base: Path | str, fingerprint: str, key: str = "k") -> Run:
    """A run that was trained on a base."""
    folder = backend.registry.home / "runs" / "own" / key
    state = RunState(
        name="own", stage="stopped", created=now(), changed=now(), base=str(base), base_fingerprint=fingerprint
    )
    write_state(folder, state)
    found = read_run(folder)
    assert found is not None
    return found


def test_the_served_base_comes_first_then_what_lies_here_once_each(
    backend: Backend, tiny_base: Path, other_base: Path
) -> None:
    assert list(bases_here(backend)) == ["tiny"]
    shutil.copytree(tiny_base, backend.registry.home / "bases" / "smollm2-135m")
    for key, folder in (("a", other_base), ("b", tiny_base), ("c", other_base.with_name("gone"))):
        run_on(backend, folder, "?", key)
    twin = shutil.copytree(other_base, other_base.parent / "twin" / other_base.name)
    run_on(backend, twin, "?", "d")
    here = bases_here(backend)
    assert list(here) == ["tiny", "smollm2-135m", "other base", "other base (2)"]
    assert {here["other base"].folder, here["other base (2)"].folder} == {other_base, twin}
    assert base_named(backend, None) == base_named(backend, "tiny") == backend.base
    assert base_named(backend, "smollm2-135m").folder == backend.registry.home / "bases" / "smollm2-135m"
    with pytest.raises(UsageError, match=r"is not on this machine\. Pick one of: tiny, smollm2-135m"):
        base_named(backend, str(other_base))


def test_rows_are_laid_out_and_planned_on_the_base_that_was_picked(backend: Backend, other_base: Path) -> None:
    run_on(backend, other_base, "?")
    look = look_at(backend, Source(task="sql"), TrainingRecipe(), "other base")
    assert look.base.folder == other_base and look.preview is not None
    assert look_at(backend, Source(task="sql"), TrainingRecipe()).base == backend.base


def test_a_run_on_another_base_finds_it_by_its_fingerprint_and_says_how_to_chat_with_it(
    backend: Backend, other_base: Path
) -> None:
    other = resolve_base(other_base)
    run = run_on(backend, other_base, other.fingerprint)
    assert not is_served(backend, run) and base_of_run(backend, run).folder == other_base
    words = elsewhere_words(backend, run)
    assert serving_words(other) == f"adapterhub-lite demo --base '{other_base}'" and serving_words(other) in words
    assert "**tiny**" in words
    own = run_on(backend, "tiny", backend.engine.base_fingerprint, "own")
    assert is_served(backend, own) and base_of_run(backend, own) == backend.base
    shutil.rmtree(other_base)
    with pytest.raises(UsageError, match="not on this machine as it was when the run began"):
        base_of_run(backend, run)
    assert "not on this machine" in elsewhere_words(backend, run)


def test_pickers_offer_what_the_served_base_can_answer_with(
    backend: Backend, other_base: Path, make_adapter: MakeAdapter
) -> None:
    served, other = backend.engine.base_fingerprint, resolve_base(other_base)
    for seed, name, base in ((0, "here", backend.base), (1, "elsewhere", other), (2, "moved", backend.base)):
        backend.registry.add(make_adapter(seed=seed), name, base=base)
    backend.registry.set_alias("moved", "prod", version=1)
    backend.registry.add(make_adapter(seed=3), "moved", base=other)
    assert [value for _, value in adapter_choices(backend.registry, served)] == ["here", "moved@prod"]
    cards = draw_cards(backend, "here")
    assert 'data-task="here"' in cards and "elsewhere" not in cards and 'data-task="moved"' not in cards
    assert "it cannot answer here" in describe_task("elsewhere", backend.registry, served)
    assert "it cannot answer here" not in describe_task("moved@prod", backend.registry, served)


def test_durations_are_those_of_the_last_time_that_succeeded_and_are_bounded() -> None:
    durations = Durations()
    assert durations.waiting("read", "Reads") == "Reads…" and not durations.is_quick("read")
    with pytest.raises(UsageError), durations.measure("read"):
        raise UsageError("no")
    assert durations.last("read") is None
    with durations.measure("read"):
        pass
    assert durations.is_quick("read") and durations.waiting("read", "Reads") == "Reads… (0 s the last time)"
    for number in range(2 * MOST_KINDS):
        with durations.measure(str(number)):
            pass
    assert len(durations._seconds) == MOST_KINDS and durations.last("read") is None

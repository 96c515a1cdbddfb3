"""Planning on the page: the choice with its reasons, bars that add up, and no path of this machine taken."""

from typing import Any

import pytest

from adapterhub_app.tabs.plan import GPU, PlanRequest, answer_plan, base_choices
from adapterhub_lite.errors import AdapterHubError, OutOfMemoryError, UsageError
from tests.app.world import World


def test_the_choice_comes_first_and_its_bars_add_up(world: World) -> None:
    found = answer_plan(world.backend(), PlanRequest("tiny", memory_gib=16))
    chosen = found.bars[0][0]
    assert found.text.startswith(f"### {chosen}\n")
    total = sum(gib for preset, _, gib in found.bars if preset == chosen)
    assert 0 < total < 16
    assert "Not chosen" in found.text


def test_a_gpu_elsewhere_can_be_planned_for(world: World) -> None:
    assert "cuda" in answer_plan(world.backend(), PlanRequest("tiny", memory_gib=24, device=GPU)).text


@pytest.mark.parametrize("base", ["/etc", "../x", "~/models", "", "a b/c"])
def test_a_base_is_picked_or_a_hub_id_and_never_a_path(world: World, base: str) -> None:
    with pytest.raises(UsageError, match="Expected a base"):
        answer_plan(world.backend(), PlanRequest(base))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [({"memory_gib": 0}, UsageError), ({"batch_size": 0}, AdapterHubError), ({"memory_gib": 0.2}, OutOfMemoryError)],
)
def test_what_cannot_be_planned_is_a_sentence(world: World, wrong: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        answer_plan(world.backend(), PlanRequest("tiny", **wrong))


def test_the_base_served_is_offered_first(world: World) -> None:
    assert base_choices(world.backend())[0] == "tiny"

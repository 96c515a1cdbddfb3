"""Blending: weights become a task, and a saved blend is a version with parents and a measured error."""

import pytest

from adapterhub_app.access import Access
from adapterhub_app.display.task import Task
from adapterhub_app.tabs.blend import blend_of, save_blend
from adapterhub_lite.errors import UnknownNameError, UsageError
from adapterhub_lite.serving import GenerationRequest
from tests.app.world import World


def test_parts_without_an_adapter_or_a_weight_are_left_out() -> None:
    assert blend_of(("sql", None, "event"), (0.5, 1.0, 0.0)) == Task((("sql", 0.5),))
    assert str(blend_of(("sql", "", "event@prod"), (0.7, 0, -0.25))) == "sql*0.7+event@prod*-0.25"


@pytest.mark.parametrize("picked", [(None, None, None), ("sql", None, None)])
def test_nothing_to_blend_asks_for_something(picked: tuple[str | None, ...]) -> None:
    with pytest.raises(UsageError, match="nothing to blend"):
        blend_of(picked, (0.0, 0.5, 0.5))


def test_a_saved_blend_answers_as_the_live_one_and_tells_its_error(world: World) -> None:
    blend = blend_of(("sql:1", "event:1", None), (0.7, 0.3, 0))
    lines = save_blend(world.backend(), None, blend, "mix", "cat", None)
    manifest = world.registry.resolve("mix")
    assert [parent.reference for parent in manifest.parents] == ["sql:1", "event:1"]
    assert manifest.reference in lines[0] and "Measured error" in lines[2]
    assert manifest.recipe is not None and manifest.recipe.relative_error < 1e-6
    messages = [{"role": "user", "content": "hello"}]
    live, saved = (
        world.engine.generate(GenerationRequest(messages=messages, adapter=adapter, max_new_tokens=8)).text
        for adapter in (str(blend), "mix")
    )
    assert live == saved


def test_saving_needs_a_name_and_the_admin_role(world: World) -> None:
    blend = Task((("sql", 1.0), ("event", 1.0)))
    with pytest.raises(UsageError, match="needs a name"):
        save_blend(world.backend(), None, blend, " ", "cat", None)
    with pytest.raises(UsageError, match="only an admin may save a blend"):
        save_blend(world.backend(Access(open_role="viewer")), None, blend, "mix2", "cat", None)
    with pytest.raises(UnknownNameError):
        save_blend(world.backend(), None, Task((("nobody", 1.0),)), "mix2", "cat", None)
    assert "mix2" not in {manifest.name for manifest in world.registry.list()}

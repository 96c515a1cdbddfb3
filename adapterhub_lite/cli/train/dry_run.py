"""`train --dry-run`: what a run would do and need, without reading a weight."""

from dataclasses import asdict

from adapterhub_lite.cli.output import say, would
from adapterhub_lite.training.settings import TYPICAL_LENGTH, TrainingRecipe


def rehearse(
    name: str,
    recipe: TrainingRecipe,
    rows: int,
    data_id: str,
    data: object,
    base: str,
    home: str | None,
    as_json: bool,
    devices: int,
) -> None:
    """Say which rows would be learned by which settings, and what the planner thinks of it."""
    from adapterhub_lite.memory import plan_memory
    from adapterhub_lite.training.data.lengths import measure_rows

    lengths = measure_rows(base, data, max_length=recipe.max_length, settings=recipe) if data is not None else None
    plan = plan_memory(
        base,
        batch_size=recipe.batch_size,
        sequence_length=lengths.of_step(recipe.batch_size) if lengths else recipe.max_length or TYPICAL_LENGTH,
        world_size=devices,
        rank=recipe.rank,
        target_modules=recipe.target_modules,
        preset=recipe.memory_preset,
        home=home,
    )
    if not as_json:
        if lengths:
            say(lengths.described())
        say(plan.described())
    length = f"{recipe.steps} steps" if recipe.steps > 0 else f"{recipe.epochs:g} epochs"
    would(
        f"train {name} for {length} of {recipe.batch_size} x {recipe.accumulation} from {rows} rows of "
        f"{data_id} on {base}, with the preset {plan.preset.name}, on {devices} device{'s' if devices > 1 else ''}",
        as_json,
        rows=rows,
        preset=plan.preset.name,
        predicted_bytes=plan.predicted.total,
        settings=asdict(recipe),
    )

"""`train --dry-run`: what a run would do and need, without reading a weight."""

from dataclasses import asdict
from typing import Any

from adapterhub_lite.bases.resolve import EMBEDDED_BASES
from adapterhub_lite.cli.output import say, would
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.training.settings import TYPICAL_LENGTH, TrainingRecipe, token_texts


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
    *,
    first: str = "",
) -> None:
    """Say which rows would be learned by which settings, and what the planner thinks of it; `first` is done before."""
    from adapterhub_lite.memory import plan_memory
    from adapterhub_lite.training.data.lengths import measure_rows

    length = f"{recipe.steps} steps" if recipe.steps > 0 else f"{recipe.epochs:g} epochs"
    act = f"{first}train {name} for {length} of {recipe.batch_size} x {recipe.accumulation} from {rows} rows of {data_id} on {base}"
    source = base
    if base in EMBEDDED_BASES:
        made = adapterhub_home(home) / "bases" / base
        if not (made / "config.json").is_file():
            # Lengths and plan need its tokenizer and its configuration.
            return would(
                f"fetch {base}, which is not here yet, then {act}", as_json, rows=rows, settings=asdict(recipe)
            )
        source = str(made)
    lengths = None
    if data is not None:
        added = token_texts(recipe.added_tokens) or ()
        lengths = measure_rows(source, data, max_length=recipe.max_length, settings=recipe, added_tokens=added)
    planned, targets = with_new_rows(source, recipe) if recipe.added_tokens else (source, recipe.target_modules)
    plan = plan_memory(
        planned,
        batch_size=recipe.batch_size,
        sequence_length=lengths.of_step(recipe.batch_size) if lengths else recipe.max_length or TYPICAL_LENGTH,
        world_size=devices,
        rank=recipe.rank,
        target_modules=targets,
        preset=recipe.memory_preset,
        home=home,
    )
    if not as_json:
        tokens = plan.predicted.workload.sequence_length
        assumed = f"rows of {tokens} tokens are assumed, the longest there may be; rows of --data are measured"
        say(lengths.described() if lengths else assumed)
        say(plan.described())
        measured = ", laid out and measured" if lengths else ""
        say(
            f"Checked: the settings; {rows} rows, which were read{measured}; what fits. No weight was read, nothing fetched."
        )
    would(
        f"{act}, with the preset {plan.preset.name}, on {devices} device{'s' if devices > 1 else ''}",
        as_json,
        rows=rows,
        preset=plan.preset.name,
        predicted_bytes=plan.predicted.total,
        settings=asdict(recipe),
    )


def with_new_rows(base: str, recipe: TrainingRecipe) -> tuple[Any, Any]:
    """What is planned for a run with added tokens: the base's configuration with their rows, and the adapter that has them."""
    from adapterhub_lite.memory import GivenAdapter
    from adapterhub_lite.training.arguments import AdapterTrainingArguments
    from adapterhub_lite.training.data.lengths import tokenizer_of
    from adapterhub_lite.training.data.vocabulary import new_tokens, with_tokens
    from adapterhub_lite.training.model.adapters import to_be_planned
    from adapterhub_lite.training.model.new_rows import check_can_bring

    args = AdapterTrainingArguments(output_dir="unused", **{**recipe.arguments(), "report_to": "none"})
    own, _ = tokenizer_of(base)
    added = new_tokens(with_tokens(own, args.added_tokens or []), own)
    check_can_bring(added, args)
    grown, adapter = to_be_planned(base, added, args, None)
    return grown, GivenAdapter.of(adapter)

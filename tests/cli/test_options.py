"""One dataclass is the source of a verb's options and of its YAML keys."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adapterhub_lite.cli.main import VERBS, build_app, in_options
from adapterhub_lite.cli.options import build_settings
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.settings import TrainingRecipe


def test_every_setting_is_an_option_of_train_with_its_help() -> None:
    text = CliRunner().invoke(build_app(), ["train", "--help"], env={"COLUMNS": "200"}).output
    for field in fields(TrainingRecipe):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split()[0] in text


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("steps: 7\nrank: 4\nlearning_rate: 1\n")
    recipe = build_settings(TrainingRecipe, {"rank": 16}, config)
    assert (recipe.steps, recipe.rank, recipe.learning_rate, recipe.batch_size) == (
        7,
        16,
        1,
        TrainingRecipe().batch_size,
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("stepz: 7\n", "unknown setting stepz"),
        ("steps: many\n", "steps is 'many', expected int"),
        ("- 1\n", "contains no settings"),
        ("steps: [\n", "could not be read as YAML"),
        ("steps: 0\nrank: -1\n", "steps is 0.*rank is -1"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str, complaint: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(ConfigurationError, match=complaint):
        build_settings(TrainingRecipe, {}, config)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 119, 120])
def test_help_cuts_no_name_of_an_option(verb: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = CliRunner().invoke(build_app(), [verb, "--help"], env={"COLUMNS": str(columns)}).output
    command = typer.main.get_command(build_app()).commands[verb]  # type: ignore[attr-defined]
    names = {option for one in command.params for option in one.opts if option.startswith("--")}
    assert names <= set(re.findall(r"--[\w-]+", text)) and "…" not in text


def test_an_error_names_options_to_who_typed_options_and_keys_to_who_wrote_a_file() -> None:
    text = "name the columns (prompt_column and completion_column=x, or template), not runs/prompt_column.jsonl"
    said = in_options(text, ["preview", "rows.jsonl"])
    assert said == (
        "name the columns (--prompt-column and --completion-column=x, or template), not runs/prompt_column.jsonl"
    )
    assert in_options(text, ["train", "sql", "--config", "run.yaml"]) == text
    assert in_options(text, []) == text and in_options(text, ["list"]) == text

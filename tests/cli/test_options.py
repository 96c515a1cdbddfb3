"""One dataclass is the source of a verb's options and of its YAML keys."""

from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapterhub_lite.cli.main import build_app
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

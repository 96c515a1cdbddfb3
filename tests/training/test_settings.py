"""Each setting is described once: what a recipe, the arguments and two command lines say of it is the same."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training import AdapterTrainingArguments, TrainingRecipe
from adapterhub_lite.training.settings import CHOICES, RunSettings

# The command line takes fewer values than a Python caller may give.
NARROWER = {"target_modules", "report_to", "added_tokens"}


def test_a_recipe_is_a_selection_of_the_arguments() -> None:
    described = {one.name: one for one in fields(AdapterTrainingArguments)}
    hints, recipe_hints = get_type_hints(AdapterTrainingArguments), get_type_hints(TrainingRecipe)
    # How rows are read is no argument of the trainer's.
    for one in (one for one in fields(TrainingRecipe) if "setting" in one.metadata):
        argument = described[one.metadata["setting"]]
        assert one.default == argument.default, one.name
        assert one.metadata["help"] == argument.metadata["help"], one.name
        if one.name not in NARROWER:
            assert recipe_hints[one.name] == hints[argument.name], one.name


def test_the_arguments_of_a_default_recipe_are_the_default_arguments(tmp_path: Path) -> None:
    plain = AdapterTrainingArguments(output_dir=str(tmp_path))
    chosen = AdapterTrainingArguments(output_dir=str(tmp_path), **TrainingRecipe().arguments())
    assert {**plain.to_dict()} == {**chosen.to_dict()}
    assert plain.set_by_hand == chosen.set_by_hand


def test_what_is_transformers_own_keeps_its_type() -> None:
    ours, theirs = get_type_hints(AdapterTrainingArguments), get_type_hints(TrainingArguments)
    assert {name: ours[name] for name in theirs} == theirs


def test_the_choices_are_those_of_the_types() -> None:
    hints = get_type_hints(RunSettings)
    assert {name: hints[name].__args__ for name in CHOICES} == CHOICES


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"learning_rate": RunSettings.learning_rate, "target_modules": "all-linear", "rank": RunSettings.rank}),
        (
            ["--rank", "4", "--alpha", "4", "--loraplus_lr_ratio", "16"],
            {"rank": 4, "alpha": 4, "loraplus_lr_ratio": 16},
        ),
        (["--target_modules", "q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--target-modules", "attention"], {"target_modules": "attention"}),
        (["--bf16", "False", "--no_proof", "--padding_free", "false"], {"proof": False, "padding_free": False}),
        (["--lr_scheduler_type", "linear", "--report_to", "none"], {"report_to": []}),
        (["--overlong", "drop", "--base_dtype", "float32"], {"overlong": "drop", "base_dtype": "float32"}),
        (["--save_strategy", "no", "--activation_checkpointing"], {"activation_checkpointing": True}),
    ],
)
def test_hf_argument_parser_takes_them_all(tmp_path: Path, given: list[str], expected: dict[str, Any]) -> None:
    parser = HfArgumentParser([AdapterTrainingArguments])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *given], look_for_args_file=False)
    assert {name: getattr(args, name) for name in expected} == expected


def test_hf_argument_parser_reads_files_and_dicts(tmp_path: Path) -> None:
    parser = HfArgumentParser([AdapterTrainingArguments])
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\nmax_steps: 2\ntarget_modules: [q_proj]\n")
    (from_yaml,) = parser.parse_yaml_file(str(tmp_path / "run.yaml"))
    (from_dict,) = parser.parse_dict({"output_dir": str(tmp_path), "max_steps": 2, "target_modules": ["q_proj"]})
    assert (from_yaml.max_steps, from_yaml.target_modules) == (from_dict.max_steps, from_dict.target_modules)


def test_a_wrong_value_is_named_by_arguments_and_recipe_alike(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"rank": 0, "learning_rate": -1.0, "overlong": "cut", "init_lora": "olora"}
    for build in (lambda: AdapterTrainingArguments(output_dir=str(tmp_path), **wrong), lambda: TrainingRecipe(**wrong)):
        with pytest.raises(ConfigurationError) as caught:
            build()
        assert all(f"{name} is {value!r}, expected" in str(caught.value) for name, value in wrong.items())
    with pytest.raises(ConfigurationError, match="batch_size is 0, expected 1 or more"):
        TrainingRecipe(batch_size=0)

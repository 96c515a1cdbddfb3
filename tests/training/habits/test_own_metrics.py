"""A script's habits of metrics: what it computes, asks for and overrides is its own, under the names that it gave."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training import AdapterTrainer
from tests.training.habits.conftest import Bench, assert_same_run, token_rows

# The names under which an evaluation here says more than the `Trainer`'s, and the one they share.
NAMES = ("loss", "token_accuracy", "entropy", "tokens")


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_metric_of_the_users_stays_whatever_its_name(bench: Bench, name: str, by_batch: bool) -> None:
    def metrics(found: Any, compute_result: bool = True) -> dict[str, float]:
        return {name: 7.25}

    given = {"keywords": {"compute_metrics": metrics}, "batch_eval_metrics": by_batch}
    plain, ours = (make(**given).evaluate(bench.rows) for make in (bench.plain, bench.ours))
    assert ours[f"eval_{name}"] == plain[f"eval_{name}"] == 7.25
    assert ours.keys() >= {f"eval_{one}" for one in NAMES}


def test_a_loss_with_the_prefix_is_the_trainers_as_there(bench: Bench) -> None:
    given = {"keywords": {"compute_metrics": lambda found: {"eval_loss": 7.25}}, "per_device_eval_batch_size": 32}
    plain, ours = (make(**given).evaluate(bench.rows) for make in (bench.plain, bench.ours))
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4) != 7.25
    trainer = bench.ours(**given)
    trainer.evaluate(bench.rows)
    assert trainer.compute_metrics is given["keywords"]["compute_metrics"]


def test_a_metric_sees_all_that_label_names_say(bench: Bench) -> None:
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.label_ids)
        return {"rows": float(len(found.label_ids[1]))}

    given = {"label_names": ["labels", "attention_mask"], "keywords": {"compute_metrics": metrics}}
    plain, ours = (make(**given).evaluate(bench.rows) for make in (bench.plain, bench.ours))
    assert ours["eval_rows"] == plain["eval_rows"] == len(bench.rows)
    for wanted, found in zip(*seen, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # Where nothing looks at batches they are packed, and hold no mask.
    assert bench.ours(label_names=given["label_names"]).evaluate(bench.rows)["eval_loss"] > 0


def test_a_label_that_no_batch_would_have_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigurationError, match=r"label_names has 'weights'.*data_collator"):
        bench.ours(label_names=["labels", "weights"])
    collator = DataCollatorForSeq2Seq(bench.tokenizer, padding=True)
    given = {"label_names": ["labels", "weights"], "keywords": {"data_collator": collator}}
    # As there: without all of them, there is nothing to evaluate by.
    plain, ours = (make(**given).predict(bench.rows) for make in (bench.plain, bench.ours))
    assert plain.label_ids is ours.label_ids is None


class CountsRows:
    """Looks at each batch that it is given, as a script for the `Trainer` may."""

    rows = 0
    real = 0

    def training_step(self, model: Any, inputs: Any, *more: Any) -> torch.Tensor:
        type(self).rows += len(inputs["input_ids"])
        type(self).real += int(inputs["attention_mask"].sum())
        made: torch.Tensor = super().training_step(model, inputs, *more)  # type: ignore[misc]
        return made


class PlainRows(CountsRows, Trainer):
    """transformers' own with such a step."""


class AdapterRows(CountsRows, AdapterTrainer):
    """Ours with such a step."""


def test_a_step_of_a_subclass_is_given_a_row_per_sequence(bench: Bench) -> None:
    plain, ours = bench.plain(cls=PlainRows), bench.ours(cls=AdapterRows, preflight=False)
    assert not ours.packing.packs and "training_step" in ours.packing.reason
    assert_same_run(plain, ours)
    assert (AdapterRows.rows, AdapterRows.real) == (PlainRows.rows, PlainRows.real)


class Guesses:
    """Returns tokens in place of logits, as many scripts do to save memory."""

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        assert len(inputs["input_ids"]) == 4 and "attention_mask" in inputs
        return outputs.loss, outputs.logits.argmax(-1), inputs["labels"]


class PlainGuesses(Guesses, Trainer):
    """transformers' own with such a step."""


class AdapterGuesses(Guesses, AdapterTrainer):
    """Ours with such a step."""


def test_a_prediction_of_a_subclass_is_given_a_row_per_sequence(bench: Bench) -> None:
    plain, ours = (
        make.evaluate(bench.rows) for make in (bench.plain(cls=PlainGuesses), bench.ours(cls=AdapterGuesses))
    )
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_a_set_that_was_never_given_is_named_with_those_that_were(bench: Bench) -> None:
    trainer = bench.ours(keywords={"eval_dataset": {"near": token_rows(8), "far": token_rows(8, 1)}})
    assert trainer.evaluate("near")["eval_loss"] > 0
    with pytest.raises(DataError, match=r"no evaluation set 'fra'.*'near', 'far'"):
        trainer.evaluate("fra")

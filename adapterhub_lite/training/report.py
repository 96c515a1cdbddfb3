"""What came of a run: base beside adapter on held-out rows, written into `report.json` of the run's folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.runs.state import REPORT_FILE
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.evaluation import generate_answers
from adapterhub_lite.training.run.run_trainer import RunTrainer
from adapterhub_lite.training.samples import asked_and_wanted, last_words

ROWS_AT_A_TIME = 8


def write_report(trainer: RunTrainer, held_out: Dataset, count: int, run: Path, *, loss: float) -> None:
    """Let base and adapter answer the first `count` held-out rows, measure the base's loss on all, and write it down.

    `loss` is the adapter's, in nats per token, from the evaluation that the run ended with.

    Rows of plain text, which ask nothing, and rows that call tools are compared by loss alone. Of a run that trained
    all weights there is no base left to ask: nothing is written.
    """
    model = trainer.bare_model()
    if not isinstance(model, PeftModel):
        return
    losses, answers = {"adapter": loss}, dict[str, list[str]]()
    rows = held_out.select(range(min(count, len(held_out))))
    try:
        asked, wanted = asked_and_wanted(rows)
    except (ConfigurationError, DataError):
        asked, wanted = [], []
    for who in ("base", "adapter"):
        with _answering(model, who):
            if who == "base":
                losses[who] = _quiet_loss(trainer)
            answers[who] = [
                answer
                for start in range(0, len(asked), ROWS_AT_A_TIME)
                for answer in generate_answers(model, trainer.processing_class, asked[start : start + ROWS_AT_A_TIME])
            ]
    if not trainer.is_world_process_zero():
        return
    found: dict[str, Any] = {"held_out": len(held_out), "loss": losses}
    if asked:
        found["exact_match"] = {
            who: sum(one.strip() == right.strip() for one, right in zip(given, wanted, strict=True)) / len(wanted)
            for who, given in answers.items()
        }
    found["rows"] = [
        {"prompt": last_words(question), "wanted": right, "base": base, "adapter": adapter}
        for question, right, base, adapter in zip(asked, wanted, answers["base"], answers["adapter"], strict=True)
    ]
    (run / REPORT_FILE).write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")


def _quiet_loss(trainer: RunTrainer) -> float:
    """The loss on the held-out rows of the model as it is now, of which nobody is told: it is no part of the run."""
    told, history = trainer.callback_handler.callbacks, list(trainer.state.log_history)
    trainer.callback_handler.callbacks = []
    try:
        return float(trainer.evaluate()["eval_loss"])
    finally:
        trainer.callback_handler.callbacks, trainer.state.log_history = told, history


@contextmanager
def _answering(model: PeftModel, who: str) -> Iterator[None]:
    if who == "adapter":
        yield
        return
    with model.disable_adapter():
        yield

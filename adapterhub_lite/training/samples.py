"""Answers to the same held-out rows at each evaluation: on the terminal, in `samples.jsonl`, in TensorBoard and trackio."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.runs.folder import SAMPLES_FILE
from adapterhub_lite.training.evaluation import Turns, generate_answers, question_of
from adapterhub_lite.training.run.run_trainer import RunTrainer

# Of a text on the terminal.
SHOWN = 100


class SampleCallback(TrainerCallback):
    """Lets the model in training answer a few rows at each evaluation. `say` writes a line for people.

    Raises:
        ConfigurationError: the rows are plain text, which asks nothing.
    """

    def __init__(self, trainer: RunTrainer, rows: Iterable[Mapping[str, Any]], say: Callable[[str], object]) -> None:
        self.trainer, self.say = trainer, say
        self.asked, self.wanted = asked_and_wanted(rows)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer, show and keep. Every process answers, because an engine may have split the weights; the first writes."""
        found = generate_answers(self.trainer.bare_model(), self.trainer.processing_class, self.asked)
        if not state.is_world_process_zero:
            return
        lines = []
        for asked, wanted, answer in zip(self.asked, self.wanted, found, strict=True):
            prompt = last_words(asked)
            lines.append({"step": state.global_step, "prompt": prompt, "wanted": wanted, "found": answer})
            self.say(f"step {state.global_step}: {short(prompt)} -> {short(answer)} (wanted {short(wanted)})")
        with (Path(str(args.output_dir)) / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._report(state.global_step, as_markdown(lines))

    def _report(self, step: int, text: str) -> None:
        for one in self.trainer.callback_handler.callbacks:
            writer = getattr(one, "tb_writer", None)
            if writer is not None:
                writer.add_text("samples", text, step)
            if type(one).__name__ == "TrackioCallback":
                import trackio

                trackio.log({"samples": trackio.Markdown(text)})


def asked_and_wanted(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Turns | str], list[str]]:
    """What each row asks, as training lays it out, and the answer it wants.

    Raises:
        ConfigurationError: the rows are plain text, which asks nothing.
        DataError: a row does not end with an answer in words.
    """
    asked: list[Turns | str] = []
    answers: list[str] = []
    for row in rows:
        given = {key: value for key, value in row.items() if value is not None}
        if isinstance(given.get("text"), str):
            raise ConfigurationError("samples are answers, and these rows are plain text. Leave out samples.")
        turns, wanted = question_of(given)
        # A raw prompt is asked as it is trained, without the chat template.
        asked.append(given["prompt"] if isinstance(given.get("prompt"), str) else turns)
        answers.append(wanted)
    return asked, answers


def last_words(asked: Turns | str) -> str:
    """The question of a row for people: the raw prompt, or its last turn."""
    return asked if isinstance(asked, str) else str(asked[-1].get("content"))


def as_markdown(lines: list[dict[str, Any]]) -> str:
    """The answers as a table."""
    rows = [
        [str(line[key]).replace("|", "\\|").replace("\n", " ") for key in ("prompt", "wanted", "found")]
        for line in lines
    ]
    return "\n".join(["| prompt | wanted | found |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def short(text: str) -> str:
    """A text on one line, cut for the terminal."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")

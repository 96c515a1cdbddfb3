"""What does it cost to prepare chat rows: ours beside TRL's, in seconds of the processor and bytes of memory?

    python -m scripts.bench.train.rows                 # 50,000 rows from a JSONL file, ours and TRL's
    python -m scripts.bench.train.rows --rows 5000     # fewer

Each side reads the same file in a process of its own and gives token ids and a mask of the answers: TRL by
`assistant_only_loss=True`, for which it needs a template with generation marks; ours by the base's own template, and by the
marked one too. Memory is how much the process grew over what it had after its imports; seconds are those of the processor, so
that other work does not count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.report import write_result
from scripts.bench.train.train_step import BASE, chats

NAME = "rows"
SIDES = ("ours", "ours_marked", "trl")
MOST_TOKENS = 1024
# What the base's template writes, with marks around what the assistant says.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare_ours(path: Path, tokenizer: Any) -> Any:
    """The table of tokens and labels that training reads."""
    from adapterhub_lite.training.data.rows import load_rows
    from adapterhub_lite.training.data.tokenization import tokenize_rows

    return tokenize_rows(load_rows(path), tokenizer, max_length=MOST_TOKENS).table


def prepare_trl(path: Path, tokenizer: Any, model: Any) -> Any:
    """The table that TRL's trainer makes of the same rows."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(path.parent / "trl"),
        max_length=MOST_TOKENS,
        assistant_only_loss=True,
        report_to="none",
        use_cpu=True,
    )
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train_dataset


def counted(table: Any) -> tuple[int, int]:
    """Tokens of a table, and how many of them are learned."""
    masked = "labels" not in table.column_names
    tokens = learned = 0
    for batch in table.iter(batch_size=1000):
        tokens += sum(map(len, batch["input_ids"]))
        masks = batch["assistant_masks" if masked else "labels"]
        learned += sum(value > 0 if masked else value >= 0 for mask in masks for value in mask)
    return tokens, learned


def measure(side: str, path: Path, folder: Path) -> dict[str, Any]:
    """Time one side in this process, imports and the loading of tokenizer and model apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template if side == "ours" else MARKED
    if side == "trl":
        import trl

        trl.SFTTrainer.__doc__  # noqa: B018 - its modules are imported on first use
        prepare: Callable[[], Any] = partial(prepare_trl, path, tokenizer, AutoModelForCausalLM.from_pretrained(folder))
    else:
        import adapterhub_lite.training.data.tokenization  # noqa: F401 - before the clock

        prepare = partial(prepare_ours, path, tokenizer)
    before, started, processor = _peak(), time.perf_counter(), time.process_time()
    table = prepare()
    found = {
        "processor_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - started,
        "grown_bytes": _peak() - before,
    }
    tokens, learned = counted(table)
    return {**found, "tokens": tokens, "learned": learned}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure both sides and write results/rows.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.file, options.base)))
        return
    from adapterhub_lite.bases import resolve_base

    folder = options.base or resolve_base(BASE).folder
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chats(options.rows, 0, "mixed")))
        found: dict[str, Any] = {"rows": options.rows, "load": os.getloadavg()[0]}
        for side in SIDES:
            command = [sys.executable, "-m", "scripts.bench.train.rows", "--side", side, "--file", str(path)]
            done = subprocess.run([*command, "--base", str(folder)], capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, found[side])
    write_result(NAME, found)


if __name__ == "__main__":
    main()

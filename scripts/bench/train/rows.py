"""What does it cost to prepare chat rows: ours beside TRL's, in seconds of the processor and bytes of memory?

    python -m scripts.bench.train.rows                 # 50,000 rows from a JSONL file, ours and TRL's
    python -m scripts.bench.train.rows --rows 5000     # fewer

Each side reads the same file in a process of its own and gives token ids and a mask of the answers. Memory is how much the
process grew over what it had after its imports; seconds are those of the processor, so that other work does not count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.report import write_result
from scripts.bench.train.train_step import BASE, chats

NAME = "rows"
SIDES = ("ours", "trl")
MOST_TOKENS = 1024


def prepare(side: str, path: Path, folder: Path) -> int:
    """Prepare the rows of `path` as `side` does, for the base in `folder`; returns how many tokens there are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if side == "ours":
        from adapterhub_lite.training.data.rows import load_rows
        from adapterhub_lite.training.data.tokenization import tokenize_rows

        return int(sum(tokenize_rows(load_rows(path), tokenizer, max_length=MOST_TOKENS).table["length"]))
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    arguments = SFTConfig(
        output_dir=str(path.parent / "trl"),
        max_length=MOST_TOKENS,
        assistant_only_loss=False,
        report_to="none",
        use_cpu=True,
    )
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    return sum(len(row["input_ids"]) for row in trainer.train_dataset)


def measure(side: str, path: Path, folder: Path) -> dict[str, Any]:
    """Time one side in this process, imports apart."""
    if side == "ours":
        import adapterhub_lite.training.data.tokenization  # noqa: F401 - before the clock
    else:
        import trl

        trl.SFTTrainer.__doc__  # noqa: B018 - its modules are imported on first use
    before, started, processor = _peak(), time.perf_counter(), time.process_time()
    tokens = prepare(side, path, folder)
    return {
        "tokens": tokens,
        "processor_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - started,
        "grown_bytes": _peak() - before,
    }


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

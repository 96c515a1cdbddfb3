"""On a machine without `datasets`, pyarrow and pandas, rows in memory train as they do with them; the rest is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.training.data.reading.tables import MemoryTable
from tests.checkout import ROOT
from tests.training.conftest import LETTERS, chat

# What a table does for us, on either kind; the child of the test has only the one in memory.
RUN = """
import json, sys
hidden = json.loads(sys.argv[2])
for name in hidden:
    sys.modules[name] = None
from pathlib import Path
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.data.held_out import split_rows
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.errors import MissingExtraError

base, _, out, rows, *refused = sys.argv[1:]
trained, held = split_rows(load_rows(json.loads(rows)), 0.2, 3)
losses = {}
for packing in ("none", "bfd", "wrapped"):
    args = AdapterTrainingArguments(
        output_dir=f"{out}/{packing}", max_steps=3, per_device_train_batch_size=4, rank=4, alpha=8, logging_steps=1,
        show_progress=False, use_cpu=True, save_strategy="no", memory_preset="lora-fp32", packing=packing, max_length=64,
        eval_strategy="steps", eval_steps=3,
    )
    trainer = AdapterTrainer(base, args, trained, eval_dataset=held)
    assert isinstance(trainer.train_dataset, Dataset)
    trainer.train()
    record = trainer.record()
    keys = ("loss", "eval_loss")
    lines = [line[key] for line in trainer.state.log_history for key in keys if key in line]
    losses[packing] = [lines, record.data.rows, record.data.fingerprint]
said = []
for path in refused:
    try:
        load_rows(path)
    except MissingExtraError as error:
        said.append(str(error))
print(json.dumps([losses, said, sorted(name for name in ("datasets", "pyarrow", "pandas") if sys.modules.get(name))]))
"""


def ran(base: Path, hidden: list[str], out: Path, *refused: str) -> Any:
    """What the script printed, with these packages hidden from it."""
    rows = [
        {**chat(f"{LETTERS[i % 26]} times {i % 7 + 1}", LETTERS[i % 26] * (i % 7 + 1)), "note": None} for i in range(40)
    ]
    rows[3]["messages"][1]["weight"] = 0.5
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(base), json.dumps(hidden), str(out), json.dumps(rows)]
    done = subprocess.run([*command, *refused], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_in_memory_train_without_datasets_as_with_it(tiny_base: Path, tmp_path: Path) -> None:
    """The same tokens, the same order, the same losses; what needs the package is refused with the command for it."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    refused = [str(tmp_path / "rows.parquet"), str(tmp_path / "folder"), "org/rows"]
    plain, said, loaded = ran(tiny_base, ["datasets", "pyarrow", "pandas"], tmp_path / "plain", *refused)
    usual, _, there = ran(tiny_base, [], tmp_path / "usual")
    assert loaded == [] and {"datasets", "pyarrow"} <= set(there)
    assert plain == usual
    assert len(said) == 3 and all("pip install" in one and "train]" in one for one in said)


@pytest.mark.parametrize("key", ["b", 2, -1, slice(1, 3), [2, 0]])
def test_the_table_in_memory_answers_as_a_dataset_does(key: Any) -> None:
    from datasets import Dataset

    columns = {"a": [1, 2, 3, 4], "b": [[1], [], [2, 3], [4]]}
    ours, theirs = MemoryTable(columns), Dataset.from_dict(columns)
    assert ours[key] == (theirs[key][:] if isinstance(key, str) else theirs[key])
    for made in (lambda table: table.select([3, 1]), lambda table: table.remove_columns(["a"]), lambda table: table):
        assert list(made(ours)) == list(made(theirs))
        assert list(made(ours).iter(batch_size=3)) == list(made(theirs).iter(batch_size=3))
        assert made(ours).column_names == made(theirs).column_names and len(made(ours)) == len(made(theirs))

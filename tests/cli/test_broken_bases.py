"""A base whose files are damaged, at every verb that takes one: one sentence, exit code 2, nothing made."""

import shutil
from pathlib import Path

import pytest

from tests.bases.test_broken import DAMAGES
from tests.cli.outcome import Run

SOME = [
    "a weight that is missing",
    "an activation that there is not",
    "a tokenizer that is cut",
    "weights that are cut",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    return file


@pytest.mark.parametrize("what", SOME)
@pytest.mark.parametrize(
    "verb",
    [
        "doctor --base {base}",
        "train it --data {rows} --base {base} --steps 1",
        "ask base hello --base {base}",
        "serve --base {base}",
    ],
)
def test_a_verb_says_what_is_wrong(
    verb: str, what: str, run: Run, rows: Path, tiny_base: Path, tmp_path: Path, home: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns(".*")))
    DAMAGES[what][0](base)
    outcome = run(*verb.format(base=base, rows=rows).split())
    assert outcome.returncode == 2, outcome
    assert "Traceback" not in outcome.stderr and str(base) in " ".join(outcome.stderr.split())
    assert not list(home.glob("registry/manifests/*"))

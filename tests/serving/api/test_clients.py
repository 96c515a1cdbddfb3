"""The clients that people use, each in its own words: everything works or is refused with its reason, as the docs say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.diagnosis import CLIENTS, client_python
from adapterhub_lite.serving.api.server import ApiServer
from tests.checkout import ROOT

HERE = Path(__file__).parent / "clients"
PAGE = ROOT / "docs" / "how-to" / "clients.md"
ROW = re.compile(r"^\| ([\w-]+) \| (.+?) \| (works|refused: .+?) \|$", re.MULTILINE)
# What they would otherwise fetch from elsewhere.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def an_environment() -> Path:
    """The python of the clients' environment, made once and kept; skips where it cannot be made."""
    python = client_python()
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", CLIENTS], check=True, timeout=120)
        made = subprocess.run(
            [CLIENTS / "bin" / "pip", "install", "--quiet", "-r", HERE / "requirements.txt"],
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        if made.returncode != 0:
            pytest.skip(f"the clients cannot be installed here: {made.stderr.strip().splitlines()[-1][:300]}")
        (CLIENTS / "complete").touch()
        python = client_python()
    assert python is not None
    return python


@pytest.mark.slow
def test_every_client_works_or_is_refused_as_the_page_says(roomy_server: ApiServer, tmp_path: Path) -> None:
    python = an_environment()
    roomy_server.api.dispatcher.engine.tokenizer.save_pretrained(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text("".join(
        json.dumps({"question": f"{n}: ", "choices": ["red", "blue"], "answer": n % 2}) + "\n" for n in range(3)
    ))  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(rows=rows))
    done = subprocess.run(
        [python, "-W", "ignore", HERE / "ask_with_all.py", roomy_server.url, "sql", tmp_path],
        capture_output=True, text=True, timeout=400,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    assert not [one for one in found if one["outcome"] == "wrong"]
    told = {(client, tried): outcome for client, tried, outcome in ROW.findall(PAGE.read_text())}
    assert {(one["client"], one["tried"]) for one in found} == set(told)
    for one in found:
        kind, _, reason = told[one["client"], one["tried"]].partition(": ")
        assert kind == one["outcome"] and reason in one["reason"], one

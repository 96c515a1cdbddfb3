"""A data set on a hub of one's own, from `push_to_hub` to trained, previewed and evaluated, by command line alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi

from adapterhub_lite.hub_server import HubServer

pytestmark = pytest.mark.slow
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}?", "completion": f"{n} {word}"} for n in range(count // 8) for word in WORDS]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_preview_train_and_eval_read_a_data_set_of_the_hub(form: str, tiny_base: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_any", "HF_HOME": str(tmp_path / "hf"),
            "ADAPTERHUB_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        if form == "parquet":
            sets = DatasetDict(train=Dataset.from_list(rows(32)), test=Dataset.from_list(rows(8)))
            code = "import sys, datasets; datasets.load_from_disk(sys.argv[1]).push_to_hub('org/words')"
            sets.save_to_disk(tmp_path / "sets")
            subprocess.run([sys.executable, "-c", code, tmp_path / "sets"], env=environment, check=True)
        else:
            api = HfApi(endpoint=hub.url, token="hf_any")
            api.create_repo("org/words", repo_type="dataset")
            for split, count in (("train", 32), ("test", 8)):
                text = "".join(json.dumps(row) + "\n" for row in rows(count))
                api.upload_file(
                    path_or_fileobj=text.encode(), path_in_repo=f"{split}.jsonl", repo_id="org/words",
                    repo_type="dataset",
                )  # fmt: skip

        def run(*words: str) -> str:
            command = [sys.executable, "-m", "adapterhub_lite", *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        shown = json.loads(run("preview", "org/words", "--base", str(tiny_base), "--json"))
        assert len(shown["rows"]) == 3
        train = ("train", "words", "--data", "org/words", "--base", str(tiny_base), "--steps", "2", "--json")
        assert json.loads(run(*train))
        assert json.loads(run("list", "--json"))[0]["name"] == "words"
        evaluate = ("eval", "words", "--data", "org/words", "--base", str(tiny_base), "--limit", "4", "--json")
        assert json.loads(run(*evaluate))

"""`push_to_hub` of the `Trainer` against the embedded hub: each checkpoint once it is whole, the adapter at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from tests.checkout import ROOT

PROGRAM = """
import sys
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
base, folder = sys.argv[1:]
rows = [{"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
        for i in range(16)]
args = AdapterTrainingArguments(output_dir=folder, max_steps=4, per_device_train_batch_size=4, save_steps=2, rank=4,
                                show_progress=False, use_cpu=True, push_to_hub=True, hub_model_id="org/pushed",
                                hub_strategy="checkpoint", hub_always_push=True)
trainer = AdapterTrainer(base, args, rows)
trainer.train()
trainer.push_to_hub(dataset_name="org/rows")  # as the scripts of TRL end
"""


# A process of its own: the client reads the hub's address once, when it is imported.
@pytest.mark.slow
def test_checkpoints_and_the_adapter_are_pushed(hub_server: HubServer, tiny_base: Path, tmp_path: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tiny_base), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_ENDPOINT": hub_server.url,
            "HF_TOKEN": "anything",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    api = HfApi(endpoint=hub_server.url, token=False)
    assert "org/rows" in Path(api.hf_hub_download("org/pushed", "README.md", cache_dir=tmp_path / "cache")).read_text()
    names = set(api.list_repo_files("org/pushed"))
    assert {"adapter_model.safetensors", "adapter_config.json", "last-checkpoint/hashes.json"} <= names
    assert {name for name in names if name.endswith("optimizer.pt")} == {"last-checkpoint/optimizer.pt"}
    state = api.hf_hub_download("org/pushed", "last-checkpoint/trainer_state.json", cache_dir=tmp_path / "cache")
    assert json.loads(Path(state).read_bytes())["global_step"] == 4

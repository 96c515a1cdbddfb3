"""Training and serving on a device that is not the CPU, without a GPU: the same numbers, no mix of devices, no needless wait.

See `device` for what it is. On the rehearsed device everything goes through torch's operations one by one, so what comes
out is to the last bit or nearly what the CPU gives by the same way. Quantised bases are left out: bitsandbytes makes a tensor of
its own kind of each weight, and reads its memory.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ROOT
from tests.fixture_types import MakeAdapter
from tests.rehearsal.device import NAME
from tests.rehearsal.training import CASES

pytestmark = pytest.mark.slow

# Where a step of training may wait for the device, and how often: where packed rows begin, which tokens are learned, that
# their targets are in the vocabulary, the targets' order, which weights somebody changed, that the loss is finite. The rest is
# transformers' own.
WAITS = {
    "copy to the CPU in training/model/segments.py:of": 1,
    "aten.nonzero.default in losses/tiled.py:tiled_cross_entropy": 1,
    "copy to the CPU in losses/tiled.py:check_targets": 1,
    # The full logits, where they are few; and what a padded batch is asked: whether it has padding, and how many tokens.
    "aten.nonzero.default in losses/causal.py:causal_lm_loss": 1,
    "aten._local_scalar_dense.default in training/model/assembly.py:of": 2,
    "aten._local_scalar_dense.default in training/run/measurement.py:count": 1,
    "copy to the CPU in losses/problem.py:_by_target": 1,
    "copy to the CPU in training/model/master_weights.py:_changed": 1,
    "aten._local_scalar_dense.default in training/trainer.py:compute_loss": 1,
    "aten._local_scalar_dense.default in training/trainer.py:train": 3,
}
COMPARED = ("serving/model/decode_graphs.py:_recorded", "serving/model/tolerances.py:relative_difference")


def run(module: str, *arguments: str) -> Any:
    """What a child printed: the device can be registered only once in a process, and not be taken back."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.rehearsal.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_training_on_the_device_is_training_on_the_cpu(tiny_base: Path, tmp_path: Path) -> None:
    there = run("training", NAME, str(tiny_base), str(tmp_path / "there"), *CASES)
    here = run("training", "cpu", str(tiny_base), str(tmp_path / "here"), *CASES)
    for case in CASES:
        ours, theirs = there[case], here[case]
        assert ours["devices"] == [NAME], f"{case} left weights on {ours['devices']}"
        exact = CASES[case]["memory_preset"] == "lora-fp32"
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4 if exact else 2e-2), case
        if exact:
            assert ours["trained"] == pytest.approx(theirs["trained"], rel=1e-4, abs=1e-4), case
        assert ours["resumed"] == pytest.approx(ours["trained"], rel=1e-6, abs=1e-6), case
        batches = CASES[case].get("gradient_accumulation_steps", 1)
        for what, count in ours["waits"].items():
            assert count <= WAITS.get(what, 0) * batches, f"{case}: {what} {count} times in a step"


def test_the_engine_on_the_device_answers_as_on_the_cpu(tiny_base: Path, make_adapter: MakeAdapter) -> None:
    adapters = [str(make_adapter(seed=1)), str(make_adapter(seed=2, rank=8, targets=("o_proj", "down_proj")))]
    there = run("serving", NAME, str(tiny_base), *adapters)
    here = run("serving", "cpu", str(tiny_base), *adapters)
    for dtype, found in there.items():
        assert found["forward"] == here[dtype]["forward"] == "lean", found["reasons"]
        exact = dtype == "float32"
        for ours, theirs in zip(found["answers"], here[dtype]["answers"], strict=True):
            # In 16 bits heads computed one by one round otherwise, and two tokens may be as likely.
            assert ours[0] == theirs[0] if exact else ours[0][:1] == theirs[0][:1]
            assert (ours[1] or {}) == pytest.approx(theirs[1] or {}, rel=1e-4 if exact else 1e-2)
        # Nothing that was recorded waits for the device or mixes devices; a step of a tape is one of the engine's.
        assert found["no_graphs"] == "" and found["replayed"] > 10
        # Once a step, for the logits that are drawn from; and where a step of a new kind is recorded and compared.
        waits = {what: n for what, n in found["waits"].items() if not what.endswith(COMPARED)}
        assert waits == {"copy to the CPU in serving/engine/core.py:_step": found["steps"]}

"""The compiled code under the address and undefined-behaviour sanitizers: nothing is read or written where it must not be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.native import find_compiler
from tests.checkout import ROOT

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]
# Odd sizes, tokens alone and prompts in pieces, adapters of ranks that fill no vector, every way to keep weights.
STEPS = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from adapterhub_lite.serving.adapters.weights import Part
from adapterhub_lite.serving.model.compiled import library
own = library.load_compiled
library.load_compiled = lambda sources: own(sources, *sys.argv[1:])
from adapterhub_lite.serving.model.forward_native import NativeForward
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.proof import random_adapter
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

torch.set_num_threads(2)
for width, heads, kv, dim, inner, window, dtype, precision in (
    (14, 2, 1, 6, 19, None, torch.float32, None),
    (21, 3, 3, 34, 50, 5, torch.bfloat16, None),
    (48, 6, 2, 16, 80, 40, torch.bfloat16, "int8"),
    (50, 5, 5, 10, 33, None, torch.float32, "int4"),
):
    sizes = dict(vocab_size=97, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
                 num_key_value_heads=kv, head_dim=dim, tie_word_embeddings=precision == "int8")
    model = (LlamaForCausalLM(LlamaConfig(**sizes)) if window is None
             else MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))).to(dtype).eval()
    runner = ModelRunner(model, rows=3, kind=ForwardKind.LEAN, precision=precision)
    assert isinstance(runner._pass, NativeForward)
    part = Part(random_adapter(runner.families, model, torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        for row, parts in enumerate([(part,), (), (part, part)]):
            runner.admit(row, parts, 600)
        computed = [0, 0, 0]
        for counts in ((1, 33, 7), (40, 1, 9), (1, 1, 1), (530, 3, 2), (1, 8, 1)):
            slices = [RowSlice(row, computed[row], [5] * count, min(count, 3)) for row, count in enumerate(counts)]
            assert runner.forward(pack(slices)).isfinite().all()
            computed = [at + count for at, count in zip(computed, counts)]
print("clean")
"""
# The tests that hold training's compiled code against its reference, over sizes of every kind.
PRODUCTS = """
import sys
import pytest
from adapterhub_lite import native
own, flags = native.load_compiled, sys.argv[1:]
native.load_compiled = lambda sources, *more: own(sources, *more, *flags)
files = ["tests/training/model/test_low_rank.py", "tests/training/model/test_lean_modules.py"]
if pytest.main(["-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-profile=ci", *files]) == 0:
    print("clean")
"""


def runtimes() -> list[str]:
    """Where the sanitizers' libraries are; empty where the compiler has none."""
    compiler = find_compiler()
    if compiler is None:
        return []
    found = []
    for name in ("libasan.so", "libubsan.so"):
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(said.stdout.strip())
    return found if all(Path(one).is_absolute() for one in found) else []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not runtimes(), reason="the C compiler has no sanitizers on this machine")
@pytest.mark.parametrize("script", [STEPS, PRODUCTS], ids=["steps of the engine", "products of training"])
def test_odd_shapes_are_clean(script: str) -> None:
    preload = " ".join([*runtimes(), _libstdcxx()])
    # Python keeps what it allocated; only reads and writes are looked at.
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script, *FLAGS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def _libstdcxx() -> str:
    """Torch throws C++ exceptions, which the sanitizer looks for when it starts."""
    compiler = find_compiler()
    assert compiler is not None
    said = subprocess.run([compiler, "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True)
    return said.stdout.strip()

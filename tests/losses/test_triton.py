"""Our Triton kernels obey the laws of the tiles: run by Triton's interpreter, and compiled for the GPUs they are for."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from adapterhub_lite.losses import Head, LossChoice, LossOptions, causal_lm_loss, passes
from adapterhub_lite.losses.choice import Situation, refusal
from adapterhub_lite.losses.tiled import tiled_cross_entropy

pytest.importorskip("triton", reason="the package triton is not installed")

from adapterhub_lite.losses import triton_tiles

OPTIONS = [
    {"reduction": "mean"},
    {"reduction": "sum", "softcap": 2.0, "ignore_index": 0},
    {"reduction": "none", "softcap": 30.0, "z_loss": 0.01, "logit_scale": 0.25},
    {"reduction": "mean", "label_smoothing": 0.1, "logit_scale": 3.0},
    {"reduction": "sum", "label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.01},
]
# Not shrunk: the interpreter takes its time, and a failing example names its sizes.
LAW = settings(
    deadline=None,
    derandomize=True,
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TRAINED = {False: ("hidden",), True: ("hidden", "weight", "bias")}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Tiles and blocks of the head so small that tiny problems have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "TILE", triton_tiles.Tile(16, 16, 16, 16, 1, 1))
        patch.setattr(passes, "TRITON_BLOCK", 40)
        yield


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@LAW
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 37), st.integers(2, 90), st.integers(1, 33)),
    masked=st.sampled_from([0.0, 0.4, 0.9]),
    shares=st.sampled_from([1, 3]),
)
def test_fp32_equals_the_full_logits(
    case: Any, head_trained: bool, options: dict[str, Any], seed: int, size: Any, masked: float, shares: int
) -> None:
    trained = TRAINED[head_trained]
    problem = case.random(seed, *size, masked=masked, bias=True, weights=True, trained=trained, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "share_count", lambda *size: shares)
        ours = problem.run(tiled=True, triton=True)
    truth = problem.run(tiled=False)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("spread", [0.3, 12.0], ids=["flat", "confident"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"z_loss": 0.01}, {"softcap": 10.0, "label_smoothing": 0.1, "reduction": "none"}])
def test_half_precision_is_no_further_from_the_truth(
    case: Any, head_trained: bool, spread: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """As for the tiles: the truth is fp64 on the same rounded inputs, the rival are the full logits."""
    problem = case.random(0, 150, 700, 32, bias=True, spread=spread, trained=TRAINED[head_trained], **options).to(dtype)
    truth = problem.to(torch.float64).run(tiled=False)
    naive = problem.run(tiled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "TILE", triton_tiles.Tile(64, 128, 32, 32, 1, 1))
        patch.setattr(passes, "TRITON_BLOCK", 512)
        ours = problem.run(tiled=True, triton=True)
    for name, value in truth.items():
        our_error, naive_error = (float((x[name].double() - value).norm()) for x in (ours, naive))
        luck = torch.finfo(dtype).eps * float(value.norm()) * 0.05 if name == "loss" else 0.0
        assert our_error <= naive_error * 1.05 + luck, f"{name}: {our_error} > {naive_error}"


def test_a_confident_token_keeps_its_small_gradient(case: Any, head_trained: bool) -> None:
    states = torch.tensor([[11.0] + [0.0] * 7])
    problem = case(states, torch.eye(8), torch.tensor([0]), None, None, LossOptions(), TRAINED[head_trained])
    problem = problem.to(torch.bfloat16)
    truth = problem.to(torch.float64).run(tiled=False)["hidden"]
    ours = problem.run(tiled=True, triton=True)["hidden"].double()
    assert 0 < float((ours - truth).norm()) + 1e-12 < 0.01 * float(truth.norm()) < 1e-5


def test_the_same_tokens_give_the_same_bits_wherever_they_stand(case: Any) -> None:
    """Law 2 where nothing is added atomically: tokens moved to other programs have the gradients they had.

    They keep their places within a program's tile: the interpreter's products are NumPy's, whose BLAS may round the rows of
    a matrix differently by where they stand in it.
    """
    problem = case.random(3, 48, 90, 24, masked=0.0, trained=("hidden",), reduction="none")
    before = problem.run(tiled=True, triton=True)
    order = torch.arange(48).view(3, triton_tiles.TILE.tokens)[[2, 0, 1]].flatten()
    problem.hidden, problem.targets = problem.hidden[order], problem.targets[order]
    after = problem.run(tiled=True, triton=True)
    for name, value in before.items():
        assert torch.equal(after[name], value[order]), name


@pytest.mark.parametrize("trained", TRAINED.values(), ids=["frozen", "trained"])
def test_the_filter_leaves_out_no_more_than_it_says(case: Any, trained: tuple[str, ...]) -> None:
    """Each logit left out had a gradient below the filter, and there are such."""
    limit = 1e-3
    problem = case.random(0, 40, 400, 32, spread=6.0, masked=0.0, trained=trained, reduction="sum")
    exact = problem.run(tiled=True, triton=True)
    problem.options = LossOptions(reduction="sum", gradient_filter=limit)
    filtered = problem.run(tiled=True, triton=True)
    torch.testing.assert_close(filtered["loss"], exact["loss"])
    apart = (filtered["hidden"] - exact["hidden"]).norm(dim=1)
    bound = limit * problem.weight.norm(dim=1).sum()
    assert 0 < float(apart.max()) <= float(bound)
    if "weight" in trained:
        apart = (filtered["weight"] - exact["weight"]).norm(dim=1)
        assert 0 < float(apart.max()) <= limit * float(problem.hidden.norm(dim=1).sum())
    problem.options = LossOptions(reduction="sum", gradient_filter=limit, label_smoothing=0.1)
    smoothed = problem.run(tiled=True, triton=True)
    problem.options = LossOptions(reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(smoothed["hidden"], problem.run(tiled=False)["hidden"])


def test_the_filter_takes_the_likely_rows_first(case: Any) -> None:
    """One likely row in each tile of the vocabulary's own order: nothing would be left out of it."""
    weight = 0.01 * torch.eye(32).repeat(2, 1)
    weight[::16, 0] = 8.0
    state = torch.eye(32)[:1]
    problem = case(state, weight, torch.tensor([0]), None, None, LossOptions(gradient_filter=1e-3), ("hidden",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "TRITON_BLOCK", 64)
        filtered = problem.run(tiled=True, triton=True)["hidden"]
    problem.options = LossOptions()
    assert int((filtered != problem.run(tiled=False)["hidden"]).sum()) >= 16


def test_a_lora_pair_on_the_head_is_trained(case: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    states, extra, weight = (torch.randn(*shape, generator=draw) for shape in ((21, 20), (70, 4), (70, 16)))
    targets = torch.randint(70, (21,), generator=draw)

    def gradients(triton: bool) -> list[torch.Tensor]:
        leaves = [states.clone().requires_grad_(), extra.clone().requires_grad_()]
        loss = tiled_cross_entropy(leaves[0], weight, targets, LossOptions(), extra=leaves[1], triton=triton)
        return list(torch.autograd.grad(loss, leaves))

    for ours, tiles in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, tiles)


class TestRung:
    """The rung of the ladder: taken after a trial on the head at hand, here said to be on a GPU."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(Situation, "device", property(lambda self: torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        return lambda head, **options: refusal("triton", Situation(head, 10**6, LossOptions(**options)))

    def test_it_takes_every_option_and_a_bias(self, refuse: Any) -> None:
        head = Head(nn.Linear(24, 90), softcap=5.0, logit_scale=0.5)
        assert refuse(head, label_smoothing=0.1, z_loss=0.01) is None
        assert "fp64" in refuse(Head(nn.Linear(8, 9).double()))

    def test_a_kernel_that_is_wrong_is_not_taken(self, refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = triton_tiles.SharedSums.add
        monkeypatch.setattr(
            triton_tiles.SharedSums, "add", lambda self, block: None if block.columns.start else right(self, block)
        )
        assert "away from that of the tiles" in refuse(Head(nn.Linear(24, 90)))

    def test_the_choice_reaches_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head, labels, hidden = Head(nn.Linear(16, 50)), torch.randint(50, (2, 9)), torch.randn(2, 9, 16)
        used: list[Any] = []
        right = triton_tiles.SharedSums.joined
        monkeypatch.setattr(triton_tiles.SharedSums, "joined", lambda self: used.append(self) or right(self))
        loss = causal_lm_loss(head, hidden, labels, choice=LossChoice("triton", ""))
        torch.testing.assert_close(loss, causal_lm_loss(head, hidden, labels))
        assert used


def test_liger_agrees_with_the_kernels(case: Any) -> None:
    liger = pytest.importorskip("liger_kernel.transformers", reason="Liger is not installed")
    problem = case.random(1, 20, 60, 16, masked=0.2, trained=("hidden", "weight"), reduction="sum")
    ours = problem.run(tiled=True, triton=True)
    leaves = [problem.hidden.requires_grad_(), problem.weight.requires_grad_()]
    loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")(leaves[1], leaves[0], problem.targets)
    torch.testing.assert_close(loss, ours["loss"])
    for theirs, name in zip(torch.autograd.grad(loss, leaves), ("hidden", "weight"), strict=True):
        torch.testing.assert_close(theirs, ours[name])


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from adapterhub_lite.losses import triton_tiles as t

element, capability, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tensors = dict.fromkeys(("hidden", "rows", "bias", "inputs"), "*" + element)
tensors |= dict.fromkeys(("order", "targets"), "*i64")
sums = "largest exponentials logits gradient logsumexp factor upstream bias_gradient"
tensors |= dict.fromkeys(sums.split(), "*fp32")
numbers = dict.fromkeys(("scale", "cap", "lift", "least", "even"), "fp32")
sizes = ("N", "V", "COLUMNS", "hidden_stride", "rows_stride", "WIDTH", "inputs_stride")
fixed = {"HAS_BIAS": False, "HAS_CAP": False, "ORDERED": False, "SMOOTHED": False, "GRADIENT": True, "WIDEN": False,
         "OF_ROWS": True, "OF_BIAS": False, "TOKENS": t.TILE.tokens, "ROWS": t.TILE.rows, "STEP": step}
types = tensors | numbers | dict.fromkeys(sizes, "i32") | dict.fromkeys(fixed, "constexpr")
for kernel in (t._first, t._second_hidden, t._second_rows):
    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in tensors or name in sizes}
    source = ASTSource(kernel, {n: types[n] for n in names}, {n: fixed[n] for n in names if n in fixed}, aligned)
    target = GPUTarget("cuda", capability, 32)
    built = compile(source, target=target, options={"num_warps": t.TILE.warps, "num_stages": t.TILE.stages})
    print(kernel.__name__, built.metadata.shared, "wgmma" in built.asm["ptx"], "mma" in built.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "step", "most"), [(80, 64, 163), (89, 32, 99), (90, 64, 227)])
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(
    capability: int, step: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles without a GPU: to tensor cores, in no more shared memory (KiB) than a block has."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for element in ("bf16", "fp16"):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, element, str(capability), str(step)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = re.findall(r"(\w+) (\d+) (True|False) (True|False)", done.stdout)
        assert len(lines) == 3
        for name, shared, warp_group, tensor_cores in lines:
            assert int(shared) <= most * 1024, f"{name} needs {shared} bytes"
            assert tensor_cores == "True" and (warp_group == "True") == (capability == 90), name

"""Heads that are not a plain tensor: quantised, elsewhere, or in parts."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses import Head, causal_lm_loss, linear_cross_entropy
from adapterhub_lite.losses.rows import open_rows, rows_shape


def quantised(kind: str, vocabulary: int, columns: int, **options: Any) -> Any:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, columns)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(columns, vocabulary, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(columns, vocabulary, bias=False, compute_dtype=torch.float32, **options)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, **options)
    return layer.to("cpu")


@pytest.mark.parametrize(("vocabulary", "columns"), [(64, 64), (50, 96), (40, 40), (9, 7)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_rows_are_unpacked_in_any_part(vocabulary: int, columns: int, kind: str, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    weight = quantised(kind, vocabulary, columns, compress_statistics=nested).weight
    whole = dequantize_4bit(weight.data, weight.quant_state)
    assert rows_shape(weight) == (vocabulary, columns)
    with open_rows(weight) as read:
        for part in (slice(0, vocabulary), slice(3, 8), slice(vocabulary - 1, vocabulary)):
            torch.testing.assert_close(read(part), whole[part], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_head_gives_its_own_loss(small_tiles: Any, kind: str) -> None:
    layer = quantised(kind, 96, 64)
    with open_rows(layer.weight) as read:
        weight = read(slice(0, 96)).float()
    hidden = torch.randn(2, 9, 64, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()
    labels = torch.randint(96, (2, 9))
    with small_tiles(4, 20):
        loss = causal_lm_loss(Head(layer), hidden, labels)
    truth = causal_lm_loss(Head(_linear(weight)), plain, labels)
    torch.testing.assert_close(loss, truth)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_int8_rows_are_the_rounded_weight() -> None:
    layer = quantised("int8", 96, 64)
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    with open_rows(layer.weight) as read:
        apart = (read(slice(0, 96)) - weight).abs().max()
    assert float(apart) < float(weight.abs().max()) / 127


def test_an_offloaded_head_says_so() -> None:
    with torch.device("meta"):
        head = Head(nn.Linear(8, 9, bias=False))
    assert "offloaded" in str(head.unreadable())


def test_an_offloaded_head_is_called_where_its_input_is() -> None:
    from accelerate import cpu_offload

    plain = nn.Linear(8, 9)
    hidden, labels = torch.randn(2, 5, 8), torch.randint(9, (2, 5))
    truth = causal_lm_loss(Head(plain), hidden, labels)
    cpu_offload(plain, execution_device=torch.device("cpu"))
    assert plain.weight.device.type == "meta"
    torch.testing.assert_close(causal_lm_loss(Head(plain), hidden, labels), truth)


def test_a_sharded_weight_is_gathered_and_trained(tmp_path: Path) -> None:
    """FSDP2 leaves a DTensor where its module is not running: two processes, gloo."""
    script = """
        import torch, torch.distributed as dist
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor
        from adapterhub_lite.losses import linear_cross_entropy
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        torch.manual_seed(0)
        weight = torch.randn(30, 8)
        torch.manual_seed(dist.get_rank())
        hidden, targets = torch.randn(12, 8), torch.randint(30, (12,))
        for trained in (False, True):
            plain, states = weight.clone().requires_grad_(trained), hidden.clone().requires_grad_()
            truth = linear_cross_entropy(states, plain, targets)
            truth.backward()
            parts = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(trained)
            ours = hidden.clone().requires_grad_()
            loss = linear_cross_entropy(ours, parts, targets)
            loss.backward()
            torch.testing.assert_close(loss, truth)
            torch.testing.assert_close(ours.grad, states.grad)
            if trained:
                assert isinstance(parts.grad, DTensor)
                dist.all_reduce(plain.grad)
                torch.testing.assert_close(parts.grad.full_tensor(), plain.grad / dist.get_world_size())
    """
    run_two(tmp_path, script)


def test_a_sharded_lora_and_bias_on_the_head_are_gathered_and_trained(tmp_path: Path) -> None:
    script = """
        import torch, torch.distributed as dist
        from peft import LoraConfig, inject_adapter_in_model
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor
        from adapterhub_lite.losses import Head, causal_lm_loss
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

        def build():
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 30))
            inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model)
            model[0].base_layer.bias.requires_grad_()
            return model

        plain, parts = build(), build()
        fully_shard(parts[0], mesh=mesh)
        torch.manual_seed(dist.get_rank())
        hidden, labels = torch.randn(2, 9, 8), torch.randint(30, (2, 9))
        # As many tiles as there are valid tokens: each process asks as often as it has to.
        labels[: 1 + dist.get_rank()] = -100
        states, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        head = Head(parts[0])
        assert isinstance(head.low_rank()[0].up_weight, DTensor) and isinstance(head.bias, DTensor)
        truth = causal_lm_loss(Head(plain[0]), states, labels)
        loss = causal_lm_loss(head, ours, labels)
        truth.backward()
        loss.backward()
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(ours.grad, states.grad)
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad)
                found = parts.get_parameter(name).grad
                torch.testing.assert_close(found.full_tensor(), parameter.grad / 2, msg=lambda text: name + text)
        with torch.no_grad(), head.opened() as logits_of:
            for row in hidden[0, : 3 + 2 * dist.get_rank()]:
                torch.testing.assert_close(logits_of(row[None]), plain(row[None]))
    """
    run_two(tmp_path, script)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install adapterhub-lite[deepspeed]"
)
def test_zero3_parts_are_gathered(tmp_path: Path) -> None:
    script = """
        import deepspeed, torch
        from adapterhub_lite.losses import Head, LossOptions, causal_lm_loss, linear_cross_entropy
        from adapterhub_lite.losses.tiled import tiled_cross_entropy
        torch.manual_seed(0)
        weight = torch.randn(30, 8)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        with deepspeed.zero.Init(config_dict_or_path=settings):
            layer = torch.nn.Linear(8, 30)
        with deepspeed.zero.GatheredParameters([layer.weight, layer.bias], modifier_rank=0):
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(weight[:, 0])
        layer.requires_grad_(False)
        assert layer.weight.numel() == 0
        hidden, targets = torch.randn(2, 6, 8), torch.randint(30, (2, 6))
        for extra in ({}, {"label_smoothing": 0.1}):
            states, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            plain = torch.nn.Linear(8, 30)
            plain.weight.data.copy_(weight)
            plain.bias.data.copy_(weight[:, 0])
            plain.requires_grad_(False)
            truth = causal_lm_loss(Head(plain, softcap=3.0), states, targets, **extra)
            loss = causal_lm_loss(Head(layer, softcap=3.0), ours, targets, **extra)
            truth.backward()
            loss.backward()
            torch.testing.assert_close(loss, truth)
            torch.testing.assert_close(ours.grad, states.grad)
            assert layer.weight.numel() == 0
            with torch.no_grad(), Head(layer).opened() as logits_of:
                for row in hidden[0, : 3 + dist.get_rank()]:
                    torch.testing.assert_close(logits_of(row[None]), plain(row[None]))
            assert layer.weight.numel() == 0
    """
    run_two(tmp_path, script)


def test_a_trained_zero3_head_is_refused_with_the_way_out() -> None:
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_id, weight.ds_shape = 1, torch.Size((9, 8))
    with pytest.raises(ConfigurationError, match="ZeRO-2"):
        linear_cross_entropy(torch.randn(2, 8), weight, torch.tensor([1, 2]))


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def run_two(folder: Path, script: str) -> None:
    """Run `script` in two gloo processes that meet through a file, so that no port is fixed."""
    opening = """
        import os, sys, datetime
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import torch.distributed as dist
        dist.init_process_group(
            "gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2,
            timeout=datetime.timedelta(seconds=120),
        )
    """
    path = folder / "job.py"
    # Nothing is taken down at the end: now and then gloo's threads abort a process that has done its work.
    ending = "\ndist.barrier()\nsys.stdout.flush()\nos._exit(0)\n"
    path.write_text(textwrap.dedent(opening) + textwrap.dedent(script) + ending)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(folder / "meeting")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(outputs)[-3000:]

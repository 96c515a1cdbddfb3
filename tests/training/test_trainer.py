"""The trainer as a whole, on a tiny base: it learns, it saves plain PEFT, it says what it did."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterhub_lite.adapter_format.manifest import read_record
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.data.collation import PaddedCollator
from tests.checkout import ROOT


def test_training_lowers_the_loss_and_leaves_metrics_and_a_plot(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=12, learning_rate=2e-2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0] * 0.8
    assert all(line["tokens"] > 0 and line["peak_bytes"] > 0 for line in lines)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_adapter_is_plain_peft_with_a_record_and_no_tokenizer(
    make_trainer: Any, tmp_path: Path, tiny_base: Path
) -> None:
    from peft import PeftModel

    trainer = make_trainer()
    trainer.train()
    folder = trainer.save_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "probes.safetensors",
        "training_record.json",
    ]
    tokens = torch.tensor([[1, 2, 3, 4]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder).eval()
    trained = trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trained(tokens).logits)
    record = read_record(folder)
    assert record is not None and record.steps == 4 and record.data.rows == 40
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_is_the_models_own(make_trainer: Any, chunk: int | None) -> None:
    trainer = make_trainer(loss_chunk_tokens=chunk)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(ours, trainer.model(**batch).loss)


REPLAY = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
from adapterhub_lite.adapter_format.probes import replay_probes
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
result = replay_probes(model, sys.argv[2])
sys.exit(0 if result.passed and result.max_abs_difference < 1e-4 else f"{result}")
"""


def test_a_fresh_process_reproduces_the_probes_of_a_saved_adapter(
    make_trainer: Any, tmp_path: Path, tiny_base: Path
) -> None:
    trainer = make_trainer(learning_rate=2e-2)
    trainer.train()
    folder = trainer.save_adapter(tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPLAY, str(tiny_base), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_the_record_is_complete(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(seed=7, data_seed=11)
    trainer.train()
    record = trainer.record()
    assert record.base.fingerprint == trainer.base.fingerprint and len(record.base.fingerprint) == 64
    assert record.seeds == {"seed": 7, "data_seed": 11}
    assert (
        record.hyperparameters["learning_rate"] == trainer.args.learning_rate
        and record.hyperparameters["adapter"]["r"] == 4
    )
    assert not any("token" in key and "hub" in key for key in record.hyperparameters)
    assert {"torch", "transformers", "peft"} <= set(record.packages)
    assert record.loss_backend["name"] in ("tiled", "full") and "end to end" in record.loss_backend["batches"]
    assert record.memory.measured_peak_bytes > 1 << 20 and record.wall_seconds > 0
    assert record.final_loss == trainer.state.log_history[-2]["loss"]
    assert record.data.fingerprint == make_trainer("other").record().data.fingerprint


def test_the_seed_decides_the_adapter(make_trainer: Any) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed * 3 + 100)
        model = make_trainer(f"run-{seed}", seed=seed).model
        return next(p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name)

    one, other = drawn(1), drawn(2)
    torch.manual_seed(999)
    assert torch.equal(drawn(1), one) and not torch.equal(one, other)


def test_fast_and_plain_ways_learn_the_same(make_trainer: Any) -> None:
    fast = make_trainer("fast", learning_rate=2e-2)
    slow = make_trainer("slow", learning_rate=2e-2, fast_lora=False, padding_free=False, loss_backend="full")
    assert fast.assembly.fast_layers == 14 and fast.packing.packs and not slow.packing.packs
    fast.train(), slow.train()
    for one, other in zip(fast.state.log_history[:4], slow.state.log_history[:4], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"max_grad_norm": 0.1},
        {"label_smoothing_factor": 0.1},
        {"auto_find_batch_size": True},
        {"optim": "sgd"},
        {"num_train_epochs": 1, "max_steps": -1},
        {"include_num_input_tokens_seen": "all"},
        {"loss_backend": "full"},
        {"lora_dropout": 0.2},
        {"bf16": True},
        {"report_to": ["tensorboard"]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_trainers_own_settings_still_work(make_trainer: Any, arguments: dict[str, Any]) -> None:
    trainer = make_trainer(**arguments)
    trainer.train()
    assert trainer.state.global_step == (10 if "num_train_epochs" in arguments else 4)
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_an_iterable_data_set_and_own_tokens_are_taken(make_trainer: Any) -> None:
    from datasets import IterableDataset

    table = make_trainer("other").train_dataset

    def stream() -> Any:
        for index in range(16):
            yield {name: table[index][name] for name in ("input_ids", "labels")}

    trainer = make_trainer(train_dataset=IterableDataset.from_generator(stream))
    trainer.train()
    assert trainer.state.global_step == 4
    make_trainer("own", train_dataset=table.select_columns(["input_ids", "labels"])).train()


def test_a_loss_function_of_the_users_own_is_asked(make_trainer: Any) -> None:
    asked = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        asked.append(outputs.logits.shape)
        return outputs.logits.float().square().mean()

    make_trainer(max_steps=1, padding_free=False, keywords={"compute_loss_func": loss}).train()
    assert asked[-1][-1] == 272


def test_the_trainers_own_keywords_still_work(make_trainer: Any, rows: Any) -> None:
    chosen = make_trainer(keywords={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})})
    chosen.train()
    assert type(chosen.optimizer.optimizer) is torch.optim.SGD
    model = make_trainer("other").model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    given = make_trainer("given", model=model, keywords={"optimizers": (optimizer, schedule)})
    given.train()
    assert [line["learning_rate"] for line in given.state.log_history[:4]] == [0.25] * 4
    seen: list[int] = []
    collated = make_trainer(
        "own", keywords={"data_collator": lambda batch: seen.append(len(batch)) or PaddedCollator(0)(batch)}
    )
    collated.train()
    assert 4 in seen and collated.state.global_step == 4


# Of torch itself: it makes instances of the autograd functions that it traces, and still has scripted ones.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(make_trainer: Any, backend: str) -> None:
    plain = make_trainer("plain", padding_free=False, learning_rate=2e-2)
    plain.train()
    compiled = make_trainer("compiled", learning_rate=2e-2, torch_compile=True, torch_compile_backend=backend)
    compiled.train()
    assert "torch_compile" in compiled.packing.reason
    for one, other in zip(compiled.state.log_history[:4], plain.state.log_history[:4], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert compiled.evaluate(compiled.train_dataset)["eval_loss"] == pytest.approx(
        plain.evaluate(plain.train_dataset)["eval_loss"], rel=1e-2
    )


def test_a_norm_that_is_limited_is_limited(make_trainer: Any) -> None:
    def moved(limit: float) -> torch.Tensor:
        trainer = make_trainer(
            f"run-{limit}", optim="sgd", learning_rate=1.0, max_grad_norm=limit, max_steps=1, warmup_steps=0
        )
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.train()
        after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        return torch.stack([(x - y).norm() for x, y in zip(before, after, strict=True)]).norm()

    free = float(moved(1e9))
    assert free > 0.2 and float(moved(0.1)) == pytest.approx(0.1, rel=1e-3)


def test_without_a_base_there_is_a_sentence(make_trainer: Any, tiny_base: Path, tmp_path: Path) -> None:
    args = AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigurationError, match="or a model_init that makes one"):
        AdapterTrainer(None, args, [])

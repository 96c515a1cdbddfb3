"""A script's habits of loss, batches and optimizers: with our class in place of `Trainer`, the same run comes out."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    default_data_collator,
    set_seed,
)

from adapterhub_lite.training import AdapterTrainer, per_row
from adapterhub_lite.training.run.step_loss import RowLosses
from tests.training.habits.conftest import Bench, assert_same_run, losses

ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no clipping, SGD": {"max_grad_norm": 0.0, "optim": "sgd"},
    "plain TrainingArguments' schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "another data seed": {"data_seed": 5},
    "dropped last batch": {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 1},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(bench: Bench, name: str) -> None:
    assert_same_run(bench.plain(**ARGUMENTS[name]), bench.ours(**ARGUMENTS[name]))


def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The loss as transformers' documentation writes one: a sum, divided by what is learned in the whole batch."""
    logits, goals = outputs.logits[:, :-1].float(), labels[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), goals, ignore_index=-100, reduction="sum") / num_items_in_batch


def row_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Each row counts the same, whatever its length; wants a batch of rows."""
    assert len(labels) == len(outputs.logits) == 4
    logits, goals = outputs.logits[:, :-1].float(), labels[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), goals, ignore_index=-100, reduction="none")
    return (each.sum(1) / (goals != -100).sum(1)).mean()


@pytest.mark.parametrize("function", [token_mean, row_mean])
def test_a_loss_function_sees_what_is_documented(bench: Bench, function: Any) -> None:
    keywords = {"compute_loss_func": function}
    plain, ours = (make(keywords=keywords) for make in (bench.plain, bench.ours))
    assert_same_run(plain, ours)
    assert ours.evaluate(bench.rows)["eval_loss"] == pytest.approx(plain.evaluate(bench.rows)["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_losses_by_row_need_no_logits(bench: Bench, packed: bool) -> None:
    def mean_of_rows(rows: RowLosses, num_items_in_batch: Any) -> torch.Tensor:
        return (rows.sums / rows.counts).mean()

    ours = bench.ours(padding_free=packed, keywords={"compute_loss_func": per_row(mean_of_rows)})
    assert ours.packing.packs == packed
    seen = []
    ours.model.get_base_model().lm_head.register_forward_hook(lambda module, given, made: seen.append(made.numel()))
    assert_same_run(bench.plain(keywords={"compute_loss_func": row_mean}), ours)
    # But for the proof of the first batch, which asks the model itself.
    assert sum(1 for size in seen if size) == 1


class OwnMean:
    """The documented way to say that a loss is a mean over each batch alone."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class PlainMean(OwnMean, Trainer):
    """transformers' own with such a loss."""


class AdapterMean(OwnMean, AdapterTrainer):
    """Ours with such a loss."""


@pytest.mark.parametrize("times", [1, 4])
def test_a_subclass_says_how_its_loss_is_scaled(bench: Bench, times: int) -> None:
    given = {
        "gradient_accumulation_steps": times,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    plain, ours = bench.plain(cls=PlainMean, **given), bench.ours(cls=AdapterMean, **given)
    assert_same_run(plain, ours)
    assert ours.loss_is_scaled_for_ga is False
    assert ours.evaluate(bench.rows)["eval_loss"] == pytest.approx(plain.evaluate(bench.rows)["eval_loss"], rel=1e-4)


class Doubled(AdapterTrainer):
    """Adds to the loss that there is, and looks at the logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        return (2 * loss, outputs) if return_outputs else 2 * loss


def test_a_subclass_may_go_on_from_our_loss(bench: Bench) -> None:
    once, twice = (
        bench.ours(max_steps=1, gradient_accumulation_steps=2),
        bench.ours(cls=Doubled, max_steps=1, gradient_accumulation_steps=2),
    )
    once.train(), twice.train()
    assert losses(twice) == pytest.approx([2 * loss for loss in losses(once)], rel=1e-4)


@pytest.mark.parametrize("times", [1, 2])
def test_router_losses_enter_the_loss(bench: Bench, times: int) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    config = MixtralConfig(**shape, output_router_logits=True, router_aux_loss_coef=0.5, sliding_window=None)
    base = MixtralForCausalLM(config).float()

    def model() -> Any:
        copy = MixtralForCausalLM(config).float()
        copy.load_state_dict(base.state_dict())
        torch.manual_seed(1)
        return get_peft_model(copy, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    given = {"gradient_accumulation_steps": times}
    plain, ours = bench.plain(model=model(), **given), bench.ours(model=model(), **given)
    assert_same_run(plain, ours)
    assert ours.assembly.router_weight == 0.5 and ours.evaluate(bench.rows)["eval_router_loss"] > 0.5
    off = bench.ours(model=model(), router_aux_loss_coef=0.0)
    assert off.assembly.router_weight == 0.0 and "eval_router_loss" not in off.evaluate(bench.rows)


def own_labels(bench: Bench) -> Any:
    """A collator of a user's own that makes the labels."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.full((len(rows), longest), -100)
        for index, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            batch["input_ids"][index, : len(ids)], batch["attention_mask"][index, : len(ids)] = ids, 1
            batch["labels"][index, 5 : len(ids)] = ids[5:]
        return batch

    return collate


def own_column(bench: Bench) -> Any:
    """A collator that reads a column of its own, and would fail without it."""
    inner = own_labels(bench)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(row["share"] == 1.0 and len(row["input_ids"]) > 5 for row in rows)
        return inner(rows)

    return collate


def test_collators_are_called_as_the_trainer_calls_them(bench: Bench) -> None:
    bare, extra = bench.rows.remove_columns("labels"), bench.rows.add_column("note", ["text"] * len(bench.rows))
    end_pads = DataCollatorForLanguageModeling(bench.tokenizer, mlm=False)
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (bare, end_pads, {}),
        (extra.remove_columns("labels"), end_pads, {}),
        (bare, own_labels(bench), {}),
        (bench.rows.add_column("share", [1.0] * len(bench.rows)), own_column(bench), {"remove_unused_columns": False}),
        (bench.rows, DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True), {}),
    ]
    for rows, collator, given in cases:
        keywords = {"data_collator": collator}
        assert_same_run(bench.plain(rows, keywords=keywords, **given), bench.ours(rows, keywords=keywords, **given))


def test_a_collator_may_tokenise_the_rows_itself(bench: Bench) -> None:
    from datasets import Dataset

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = bench.tokenizer([row["words"] + "<|im_end|>" for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    listed = [{"words": text} for text in ["one two", "three four five", "six"] * 8]
    given = {"remove_unused_columns": False, "keywords": {"data_collator": collate}}
    for rows in (Dataset.from_list(listed), listed):
        plain, ours = bench.plain(rows, **given), bench.ours(rows, **given)
        assert_same_run(plain, ours)
        assert ours.evaluate(rows)["eval_tokens"] > 0


def test_blocks_without_an_end_and_tables_that_transform(bench: Bench) -> None:
    text = bench.tokenizer("the quick brown fox jumps over the lazy dog " * 40)["input_ids"]
    blocks = [text[start : start + 32] for start in range(0, len(text) - 32, 32)]
    from datasets import Dataset

    table = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    keywords = {"data_collator": default_data_collator}
    assert_same_run(bench.plain(table, keywords=keywords), bench.ours(table, keywords=keywords))

    def tokens(batch: dict[str, Any]) -> dict[str, Any]:
        found = bench.tokenizer([text + "<|im_end|>" for text in batch["words"]])
        return {**found, "labels": [list(ids) for ids in found["input_ids"]]}

    lazy = Dataset.from_dict({"words": ["one two", "three four five", "six"] * 8}).with_transform(tokens)
    given = {"remove_unused_columns": False}
    plain, ours = bench.plain(lazy, **given), bench.ours(lazy, **given)
    assert_same_run(plain, ours)
    assert ours.record().data.fingerprint == "not countable"


@pytest.mark.parametrize("kind", ["stream of rows", "stream of tokens", "torch map", "torch stream", "list"])
def test_data_sets_of_every_kind(bench: Bench, kind: str) -> None:
    class Mapped(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(bench.rows)

        def __getitem__(self, index: int) -> Any:
            return bench.rows[int(index)]

    class Streamed(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(bench.rows)

    if kind == "stream of rows":
        from datasets import Dataset

        ours = bench.ours(Dataset.from_list([{"text": f"number {i}"} for i in range(16)]).to_iterable_dataset())
        ours.train()
        assert ours.state.global_step == 3 and ours.evaluate([{"text": "number 5"}])["eval_loss"] > 0
        return
    rows: Any = {
        "stream of tokens": bench.rows.to_iterable_dataset(),
        "torch map": Mapped(),
        "torch stream": Streamed(),
        "list": list(bench.rows),
    }[kind]
    ours = bench.ours(rows)
    assert_same_run(bench.plain(rows), ours)
    if kind == "list":
        table = bench.ours(bench.rows)
        assert ours.evaluate(rows)["eval_tokens"] == table.evaluate(bench.rows)["eval_tokens"]
        assert ours.predict(rows).predictions.shape == table.predict(bench.rows).predictions.shape


def test_bf16_costs_nothing_where_all_is_in_its_dtype_already(bench: Bench) -> None:
    given = {"model": bench.base, "base_dtype": None, "memory_preset": "lora-bf16"}
    asked, plain = bench.ours(**given, bf16=True), bench.ours(**given)
    assert asked.accelerator.mixed_precision == "no" and asked.memory_choice.preset.dtype == "bfloat16"
    for trainer in (asked, plain):
        set_seed(42)
        trainer.train()
    assert losses(asked) == losses(plain)
    # In fp32 it is what was asked for.
    assert bench.ours(bf16=True).accelerator.mixed_precision == "bf16"

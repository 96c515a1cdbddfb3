"""Tables and streams of the user's own making: what is wrong in them is said, what is odd in them is understood."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from adapterhub_lite.errors import ConfigurationError, DataError, ProofFailedError
from adapterhub_lite.training.data.collation import PackedCollator, PaddedCollator
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.tokenization import Limits
from adapterhub_lite.training.run.checks import check_rows


def table(*rows: tuple[list[int], list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})


def good(count: int, end: int) -> list[tuple[list[int], list[int]]]:
    return [([1, 2, end], [-100, 2, end])] * count


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (([1, 2, 3], [-100, 2]), "Row 1500 has another number of labels than of tokens"),
        (([1, 2, 3], [-100, -100, -100]), "Row 1500 has no label to learn from"),
        (([1, 2, 3], [2, -100, -100]), "Row 1500 has no label to learn from"),
        (([], []), "Row 1500 has no label to learn from"),
        (([1, 2, 3], [-100, 272, 3]), r"Row 1500 has the label 272; wanted -100 or 0 to 271"),
        (([1, 2, 3], [-100, -7, 3]), r"Row 1500 has the label -7; wanted -100 or 0 to 271"),
        (([1, 999, 3], [-100, 2, 3]), r"Row 1500 has the token 999; wanted 0 to 271"),
        (([1, -1, 3], [-100, 2, 3]), r"Row 1500 has the token -1; wanted 0 to 271"),
    ],
)
def test_a_bad_row_is_named_wherever_it_is(row: Any, words: str, byte_tokenizer: Any) -> None:
    end = byte_tokenizer.eos_token_id
    rows = table(*good(1500, end), row, *good(600, end))
    with pytest.raises((DataError, ProofFailedError), match=words):
        check_rows(rows, byte_tokenizer, 272)
    # Rows that were left out are no reason to refuse the others.
    check_rows(rows.select([*range(1500), *range(1501, 2101)]), byte_tokenizer, 272)


def test_a_tokenizer_without_an_end_token_is_named_as_the_reason(byte_tokenizer: Any) -> None:
    tokenizer = deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ProofFailedError, match=r"No row teaches an end token, .*set tokenizer\.eos_token to the token"):
        check_rows(table(([1, 2, 3], [-100, 2, 3])), tokenizer, 272)


def test_one_row_that_teaches_the_end_is_enough(byte_tokenizer: Any) -> None:
    endless = [([1, 2, 3], [-100, 2, 3])] * 1200
    with pytest.raises(ProofFailedError, match="No row teaches the end token"):
        check_rows(table(*endless), byte_tokenizer, 272)
    check_rows(table(*endless, *good(1, byte_tokenizer.eos_token_id)), byte_tokenizer, 272)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([-100, -100, -100], "The batch of step 1 has no label"),
        ([-100, 2, 272], "The batch of step 1 has the label 272"),
    ],
)
def test_a_stream_is_checked_batch_by_batch(labels: list[int], words: str, make_trainer: Any) -> None:
    def stream() -> Any:
        for _ in range(16):
            yield {"input_ids": [1, 2, 3], "labels": labels}

    trainer = make_trainer(train_dataset=IterableDataset.from_generator(stream))
    with pytest.raises((DataError, ProofFailedError), match=words):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("overlong", "done", "kept"), [("truncate", "truncated", 40), ("drop", "dropped", 34)])
def test_rows_beyond_the_limit_are_counted_in_a_warning_and_in_the_record(
    overlong: str, done: str, kept: int, make_trainer: Any, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    longest = max(make_trainer("all").train_dataset["length"])
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(max_length=longest - 1, overlong=overlong, keywords={"eval_dataset": rows[:5]})
    count = sum(length == longest for length in make_trainer("again").train_dataset["length"])
    assert f"{count} of 40 rows are longer than max_length={longest - 1} and were {done}" in caplog.text
    data = trainer.record().data
    assert getattr(data, done) == count and data.rows == (40 if overlong == "truncate" else 40 - count)


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator(0)], ids=["packed", "padded"])
def test_padding_of_somebody_elses_making_is_left_out(collator: Any) -> None:
    plain = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    padded = [
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7]},
        {"input_ids": [8, 9, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0], "labels": [-100, 9, 4, 4, 4]},
    ]
    padded[0]["position_ids"] = [1, 1, 0, 1, 2]
    assert {k: v.tolist() for k, v in collator(padded).items()} == {k: v.tolist() for k, v in collator(plain).items()}


def test_packed_evaluation_rows_are_for_one_process(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [2, 2]}])
    preparation = Preparation(byte_tokenizer, Limits(64))
    assert preparation.sets({"near": packed})["near"]["position_ids"] == [[0, 1, 0, 1]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="Give the evaluation rows unpacked"):
        preparation.sets(packed)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_table_packed_by_trl_keeps_its_sequences_apart(make_trainer: Any, padding_free: bool) -> None:
    """TRL's `pack_dataset` writes `seq_lengths`; its rows give the gradient of the same sequences unpacked."""
    wanted = make_trainer("plain", per_device_train_batch_size=6, padding_free=padding_free)
    kept = wanted.train_dataset.select(range(6)).select_columns(["input_ids", "labels"])
    wanted.train_dataset = kept
    rows = [kept[i] for i in range(6)]
    packed = Dataset.from_list(
        [
            {"seq_lengths": [len(row["input_ids"]) for row in part]}
            | {name: [token for row in part for token in row[name]] for name in ("input_ids", "labels")}
            for part in (rows[:4], rows[4:])
        ]
    )
    found = make_trainer("packed", train_dataset=packed, per_device_train_batch_size=2, padding_free=padding_free)
    torch.testing.assert_close(gradients(found), gradients(wanted), rtol=1e-4, atol=1e-6)


def test_trls_own_packing_is_understood(make_trainer: Any) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install adapterhub-lite[bench]")
    plain = make_trainer("plain").train_dataset
    packed = trl.pack_dataset(plain.select_columns(["input_ids", "labels"]), seq_length=256, strategy="bfd")
    trainer = make_trainer(train_dataset=packed, max_steps=2, per_device_train_batch_size=1)
    table = trainer.train_dataset
    assert len(table) < len(plain) / 2
    starts = sum(positions.count(0) for positions in table["position_ids"])
    assert starts == len(plain)
    trainer.train()


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_turn_of_half_the_weight_pulls_half_as_much(make_trainer: Any, padding_free: bool) -> None:
    def weighted(weight: float) -> Any:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello", "weight": weight}]
        data = [{"messages": turns}] * 8
        return gradients(make_trainer(f"weight-{weight}", train_dataset=data, padding_free=padding_free))

    half, whole = weighted(0.5), weighted(1)
    torch.testing.assert_close({name: 2 * gradient for name, gradient in half.items()}, whole)

"""The first-step proof: a run that cannot learn stops, and says what is wrong."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from adapterhub_lite.errors import DataError, ProofFailedError
from adapterhub_lite.training.run.checks import GradientProof, check_loss, check_rows, read_while_training

NAMES = ["a.lora_A.default.weight", "a.lora_B.default.weight", "b.lora_A.default.weight", "b.lora_B.default.weight"]
ONE, ZERO = torch.ones(2), torch.zeros(2)


def test_a_pair_counts_as_moved_when_either_half_is() -> None:
    proof = GradientProof(NAMES)
    proof.check(zip(NAMES, [ZERO, ONE, ZERO, ZERO], strict=True), last=False)
    proof.check(zip(NAMES, [ZERO, ZERO, ONE, ZERO], strict=True), last=True)


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ([ONE, ONE, None, ONE], "1 trainable tensors got no gradient (b.lora_A"),
        ([ONE, ONE, ONE, ONE * float("inf")], "not finite (b.lora_B"),
        ([ONE, ONE, ZERO, ZERO], "only zero gradients in two steps (b.lora.default)"),
    ],
)
def test_missing_wild_and_zero_gradients_are_named(gradients: list[Any], words: str) -> None:
    with pytest.raises(ProofFailedError) as caught:
        GradientProof(NAMES).check(zip(NAMES, gradients, strict=True), last=True)
    assert words in str(caught.value)


def table(labels: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": [[1] * len(labels)], "labels": [labels]})


def test_rows_that_teach_nothing_or_no_end_or_the_impossible_are_refused(byte_tokenizer: Any) -> None:
    end = byte_tokenizer.eos_token_id
    check_rows(table([-100, 5, end]), byte_tokenizer, 272)
    with pytest.raises(ProofFailedError, match="no label to learn from"):
        check_rows(table([5, -100, -100]), byte_tokenizer, 272)
    with pytest.raises(ProofFailedError, match="No row teaches the end token"):
        check_rows(table([-100, 5, 6]), byte_tokenizer, 272)
    with pytest.raises(DataError, match=r"label 272; wanted -100 or 0 to 271"):
        check_rows(table([-100, 272, end]), byte_tokenizer, 272)


def test_where_the_end_was_cut_off_the_advice_keeps_it(make_trainer: Any) -> None:
    rows = [{"text": "abcdefghij" * 3}] * 8
    with pytest.raises(ProofFailedError, match=r"8 rows were cut before their end.*overlong='truncate_start'"):
        make_trainer(train_dataset=rows, max_length=20, overlong="truncate").train()
    for folder, advised in enumerate(({"max_length": 20, "overlong": "truncate_start"}, {"max_length": 64})):
        make_trainer(str(folder), train_dataset=rows, **advised).train()


def test_a_loss_that_is_not_the_models_is_refused(make_trainer: Any) -> None:
    model = make_trainer().model
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[-100, 2, 3, 4]])}
    right = model(**batch).loss.item() * 3
    check_loss(model, batch, lambda: right)
    with pytest.raises(ProofFailedError, match="The loss of 3 tokens"):
        check_loss(model, batch, lambda: right * 1.01)
    with pytest.raises(ProofFailedError, match="The loss of 3 tokens is nan"):
        check_loss(model, batch, lambda: float("nan"))


def test_training_stops_when_a_pair_is_cut_off(make_trainer: Any) -> None:
    trainer = make_trainer()
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, given, result: result.detach())
    with pytest.raises(ProofFailedError, match=r"got no gradient \(base_model.*layers.0.self_attn.q_proj"):
        trainer.train()
    assert trainer.state.global_step == 0


def read_up_proj(trainer: Any, in_training: bool) -> Any:
    """Have a layer's MLP read the weight of `up_proj` without calling it, always or only in training."""
    mlp = trainer.model.get_base_model().model.layers[1].mlp

    def forward(x: torch.Tensor) -> Any:
        calls = in_training and not mlp.training
        up = mlp.up_proj(x) if calls else torch.nn.functional.linear(x, mlp.up_proj.weight)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    mlp.forward = forward
    return mlp.up_proj


def test_a_layer_that_is_read_in_training_alone_is_named_and_learns_nothing(
    make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As in PEFT, which trains the others; Gemma 3n has such layers."""
    trainer = make_trainer()
    layer = read_up_proj(trainer, in_training=True)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps > 1
    said = [record.getMessage() for record in caplog.records if "learns nothing" in record.getMessage()]
    assert len(said) == 1 and "on 1 layers (base_model.model.model.layers.1.mlp.up_proj)" in said[0]
    assert not layer.lora_B["default"].weight.any()


def test_training_stops_when_a_layer_is_never_called(make_trainer: Any) -> None:
    trainer = make_trainer()
    read_up_proj(trainer, in_training=False)
    with pytest.raises(ProofFailedError, match=r"2 trainable tensors got no gradient \(.*layers.1.mlp.up_proj.lora_A"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_finding_such_layers_draws_no_random_numbers_and_leaves_the_mode(make_trainer: Any) -> None:
    trainer = make_trainer(lora_dropout=0.5)
    read_up_proj(trainer, in_training=True)
    for training in (True, False):
        model = trainer.model.train(training)
        before = torch.get_rng_state()
        assert read_while_training(model) == ["base_model.model.model.layers.1.mlp.up_proj"]
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == training and not any(module._forward_pre_hooks for module in model.modules())


def test_training_stops_when_a_pair_never_moves(make_trainer: Any) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.zero_()
    with pytest.raises(
        ProofFailedError, match=r"only zero gradients in two steps \(.*layers.1.mlp.up_proj.lora.default\)"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_training_stops_when_the_head_has_what_the_loss_does_not_know(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda module, given, result: result * 3)
    with pytest.raises(ProofFailedError, match="the model's own logits give"):
        trainer.train()


def test_the_proof_can_be_left_out(make_trainer: Any) -> None:
    trainer = make_trainer(proof=False)
    with torch.no_grad():
        trainer.model.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.zero_()
    trainer.train()

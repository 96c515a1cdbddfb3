"""A script's habits of evaluating, predicting, saving and resuming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

from adapterhub_lite.errors import ConfigurationError
from tests.training.habits.conftest import Bench, losses, token_rows, weights


def test_predictions_have_the_shape_of_rows(bench: Bench) -> None:
    seen: dict[str, Any] = {}

    def metrics(found: Any) -> dict[str, float]:
        assert len(found.predictions) == len(bench.rows)
        assert found.inputs.shape == found.predictions.shape[:2] == found.label_ids.shape
        seen["losses"] = np.asarray(found.losses)
        guessed, goals = found.predictions[:, :-1].argmax(-1), found.label_ids[:, 1:]
        return {"right": float((guessed == goals)[goals != -100].mean())}

    given = {"include_for_metrics": ["inputs", "loss"], "keywords": {"compute_metrics": metrics}}
    found = []
    for make in (bench.plain, bench.ours):
        trainer = make(**given)
        found.append((trainer.evaluate(bench.rows), seen["losses"], trainer.predict(bench.rows)))
    (wanted, each, told), (ours, ours_each, ours_told) = found
    assert ours["eval_right"] == pytest.approx(wanted["eval_right"]) and len(ours_each) == len(each) == len(bench.rows)
    assert ours_each == pytest.approx(each, rel=1e-4)
    np.testing.assert_array_equal(ours_told.label_ids, told.label_ids)
    real = told.label_ids != -100
    np.testing.assert_allclose(ours_told.predictions[real], told.predictions[real], rtol=1e-3, atol=1e-3)


def test_a_set_without_labels_gets_none(bench: Bench) -> None:
    bare = bench.rows.remove_columns("labels")
    found = bench.ours().predict(bare)
    assert found.label_ids is None and "test_loss" not in found.metrics
    assert found.predictions.shape[0] == len(bare)
    # Trained and evaluated, such rows are learned whole, as TRL does it.
    assert bench.ours(bare).evaluate(bare)["eval_loss"] > 0


def test_raw_rows_are_evaluated_and_predicted(bench: Bench) -> None:
    chats = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(8)]
    trainer = bench.ours(chats, eval_strategy="no")
    assert trainer.evaluate(chats)["eval_tokens"] > 0
    assert trainer.evaluate({"one": chats[:4], "two": chats[4:]}).keys() >= {"eval_one_loss", "eval_two_loss"}
    assert trainer.predict(chats).metrics["test_loss"] > 0


def test_checkpoints_go_both_ways(bench: Bench) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": None}
    whole, ours = bench.plain(**saving), bench.ours(**saving)
    whole.train(), ours.train()
    for made, resumed in ((whole, bench.ours), (ours, bench.plain)):
        folder = Path(str(made.args.output_dir)) / "checkpoint-2"
        again = resumed(**saving, model=bench.model(seed=9))
        again.train(resume_from_checkpoint=str(folder))
        assert losses(again) == pytest.approx(losses(whole), rel=1e-4)
    folder = Path(str(ours.args.output_dir)) / "checkpoint-4"
    assert (folder / "tokenizer.json").exists()
    assert torch.load(folder / "training_args.bin", weights_only=False).max_steps == 4


def test_a_checkpoint_of_another_shape_is_a_sentence(bench: Bench) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    made = bench.plain(**saving)
    made.train()
    with pytest.raises(ConfigurationError, match="another shape"):
        bench.ours(**saving, model=bench.model(r=2)).train(
            resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-2"
        )


def test_callbacks_come_back_as_they_were(bench: Bench) -> None:
    watching = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    watching |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    watching |= {"restore_callback_states_from_checkpoint": True, "output_dir": bench.run_folder()}

    def trainer(patience: int, **more: Any) -> Trainer:
        keywords = {"callbacks": [EarlyStoppingCallback(patience)], "eval_dataset": token_rows(8, 1)}
        return bench.ours(**{**watching, **more}, keywords=keywords)

    trainer(5).train()
    again = trainer(3, max_steps=6)
    again.train(resume_from_checkpoint=True)
    (found,) = [one for one in again.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    assert found.early_stopping_patience == 5
    lines = [json.loads(line) for line in (Path(str(again.args.output_dir)) / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] > lines[0]["tokens"]


def test_a_tokenizer_without_padding_trains_as_with_it(bench: Bench) -> None:
    bench.tokenizer.pad_token = None
    for packed in (True, False):
        trainer = bench.ours(padding_free=packed)
        trainer.train()
        assert trainer.predict(bench.rows).predictions.shape[0] == len(bench.rows)


def test_a_search_has_clean_adapters_on_one_base(bench: Bench) -> None:
    pytest.importorskip("optuna")
    held = token_rows(8, 3)
    trainer = bench.ours(keywords={"eval_dataset": held}, model=bench.base, max_steps=2, rank=4)
    resident = trainer.model.get_base_model()
    weight = resident.model.layers[0].self_attn.q_proj.base_layer.weight
    ranks = []

    def space(trial: Any) -> dict[str, Any]:
        ranks.append(trial.suggest_categorical("rank", [2, 6]))
        return {"rank": ranks[-1], "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}

    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna", direction="minimize")
    assert trainer.assembly.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight is weight
    lines = [
        json.loads(line) for line in (Path(str(trainer.args.output_dir)) / "trials.jsonl").read_text().splitlines()
    ]
    assert [line["trial"] for line in lines] == [0, 1, 2]
    assert best.objective == pytest.approx(min(line["objective"] for line in lines))
    kept = json.loads((trainer.best_adapter / "adapter_config.json").read_text())
    assert kept["r"] == best.hyperparameters["rank"] and (trainer.best_adapter / "training_record.json").exists()
    # A trial is what a run of its own is.
    alone = bench.ours(keywords={"eval_dataset": held}, model=bench.base, max_steps=2, **best.hyperparameters)
    alone.train()
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-5)


def test_what_cannot_be_searched_is_said(bench: Bench) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigurationError, match="give an eval_dataset"):
        bench.ours().hyperparameter_search(n_trials=1)
    trainer = bench.ours(keywords={"eval_dataset": token_rows(8, 3)})
    for name, words in (("rank", "settled"), ("max_length", "settled"), ("no_such", "no argument no_such")):
        with pytest.raises(ConfigurationError, match=words):
            trainer.hyperparameter_search(lambda trial, name=name: {name: trial.suggest_int(name, 2, 4)}, n_trials=1)


def test_a_model_init_is_asked_for_each_run(bench: Bench) -> None:
    made = []

    def init(trial: Any = None) -> Any:
        made.append(bench.model())
        return made[-1]

    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    args = AdapterTrainingArguments(**bench.settings(show_progress=False, base_dtype="float32"))
    trainer = AdapterTrainer(None, args, bench.rows, processing_class=bench.tokenizer, model_init=init)
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert len(made) == 3 and all(torch.equal(first[name], one) for name, one in weights(trainer).items())

"""Tokens that an adapter brings along: trained as transformers and PEFT train them, planned, kept, served and merged.

The peer resizes the base, takes PEFT's `trainable_token_indices` or `modules_to_save`, and steps torch's AdamW.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from adapterhub_lite import AdapterRegistry, AdapterTrainer, AdapterTrainingArguments, merge_into_base
from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE
from adapterhub_lite.bases import load_tokenizer, resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.training import TrainingRecipe, train_adapter
from tests.serving.model.families import build, small_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
TEXTS = ["<call>", "</call>"]
PROMPT = "Once upon a time <call>there lived</call> an old"
STEPS, WRITTEN = 3, 8
TARGETS = ["q_proj", "v_proj"]
BASES = ("tied", "untied", "roomy")
# The ways to ask for new tokens; those of the second line train what the user's own configuration says.
WAYS = ("named", "tokenizer", "resized", "rows", "saved")


def a_base(kind: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """With as many rows as tokens, tied or not; or `roomy`, which has rows that no token of its own takes."""
    if kind != "roomy":
        return small_base({"tied": "qwen2", "untied": "llama"}[kind], folder, tokenizer, monkeypatch)
    base = build("llama", folder, tokenizer)
    return base, load_tokenizer(base)


def with_texts(tokenizer: Any) -> Any:
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(TEXTS)
    return grown


def resized(base: Path, rows: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows > model.config.vocab_size:
        set_seed(0)
        model.resize_token_embeddings(rows)
    return model


def config_for(way: str, kind: str, first: int) -> LoraConfig:
    """What PEFT is told for what is trained: rows of new tokens, of an old one too, or both matrices whole."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if way == "saved":
        return LoraConfig(**settings, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=kind == "tied")
    ids = [*([70] if way == "rows" else []), first, first + 1]
    return LoraConfig(
        **settings, trainable_token_indices=ids if kind == "tied" else {"embed_tokens": ids, "lm_head": list(ids)}
    )


def rows_with(first: int) -> list[dict[str, list[int]]]:
    """A batch of two rows a step; the new tokens are read in the second step and learned in all."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(2 * STEPS):
        ids = torch.randint(3, 250, (18 + 3 * number,), generator=generator).tolist()
        ids[5 + number :: 7] = [first + number % 2] * len(ids[5 + number :: 7])
        made.append({"input_ids": [*ids, 256], "labels": [-100] * 6 + [*ids, 256][6:]})
    return made


def plain_losses(base: Path, config: LoraConfig, first: int) -> tuple[list[float], Any]:
    """Transformers, PEFT and AdamW: the model's own loss of each step, over all that its batch learns."""
    model: Any = resized(base, first + 2)
    set_seed(0)
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = rows_with(first)[2 * step : 2 * step + 2]
        width = max(len(row["input_ids"]) for row in batch)
        ids, labels, mask = (
            torch.tensor([(row[name] if name else [1] * len(row["labels"])) + [fill] * (width - len(row["labels"]))
                          for row in batch])
            for name, fill in (("input_ids", 0), ("labels", -100), ("", 0))
        )  # fmt: skip
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, model.eval()


def trainer_for(base: Path, folder: Path, rows: Any, model: Any = None, **given: Any) -> Any:
    """A trainer whose `heard` are the losses of its steps, unrounded."""
    settings = {"target_modules": TARGETS, **given.pop("settings", {})}
    args = AdapterTrainingArguments(
        output_dir=str(folder), memory_preset="lora-fp32", show_progress=False, max_steps=STEPS, warmup_steps=0,
        per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", seed=0, report_to="none",
        save_strategy="no", use_cpu=True, max_grad_norm=1.0, preflight=False, train_sampling_strategy="sequential",
        **settings,
    )  # fmt: skip
    trainer: Any = AdapterTrainer(model or str(base), args, rows, **given)
    trainer.heard, step = [], trainer.training_step

    def listening(*passed: Any, **named: Any) -> Any:
        made = step(*passed, **named)
        trainer.heard.append(float(made))
        return made

    # Of this trainer alone: a class with a step of its own is given padded rows.
    trainer.training_step = listening
    return trainer


def asked(way: str, kind: str, base: Path, tokenizer: Any) -> dict[str, Any]:
    """What the trainer is given so that it trains new tokens."""
    first = len(tokenizer)
    if way == "named":
        return {"settings": {"added_tokens": TEXTS}}
    given = {"processing_class": with_texts(tokenizer)}
    if way == "tokenizer":
        return given
    given["model"] = resized(base, first + 2)
    return given if way == "resized" else {**given, "peft_config": config_for(way, kind, first)}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("way", WAYS)
def test_new_tokens_are_trained_as_peft_does_and_kept_served_and_merged(
    way: str, kind: str, tmp_path: Path, home: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = a_base(kind, tmp_path / "base", byte_tokenizer, monkeypatch)
    first, grown = len(tokenizer), with_texts(tokenizer)
    expected, peer = plain_losses(base, config_for(way, kind, first), first)
    trainer = trainer_for(
        base, tmp_path / "run", Dataset.from_list(rows_with(first)), **asked(way, kind, base, tokenizer)
    )
    trainer.train()
    torch.testing.assert_close(torch.tensor(trainer.heard), torch.tensor(expected), rtol=1e-6, atol=1e-6)

    folder = trainer.save_adapter(tmp_path / "adapter")
    texts = json.loads((folder / ADDED_TOKENS_FILE).read_text())["tokens"]
    assert [(one["id"], one["content"]) for one in texts] == [(first, TEXTS[0]), (first + 1, TEXTS[1])]
    loaded = PeftModel.from_pretrained(resized(base, first + 2), folder).eval()
    ids = torch.tensor([grown.encode(PROMPT)])
    assert first in ids[0]
    with torch.no_grad():
        logits = loaded(ids).logits
        # AdamW divides by the size of a gradient: rounding moves what hardly has one, on each processor otherwise.
        torch.testing.assert_close(logits, peer(ids).logits, rtol=1e-3, atol=5e-4)

    registry, resolved = AdapterRegistry(home), resolve_base(base)
    registry.add(folder, "new", base=resolved, verify="probes", tell=lambda _: None)
    with InferenceEngine.from_base(
        base, registry=registry, dtype="float32", end_tokens=frozenset(), device="cpu"
    ) as engine:
        handles = [
            engine.submit(GenerationRequest(PROMPT, adapter=name, max_new_tokens=WRITTEN)) for name in ("new", None)
        ]
        answers = [list(handle.result().token_ids) for handle in handles]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for model, own, answer in ((loaded, grown, answers[0]), (plain, tokenizer, answers[1])):
        prompt = torch.tensor([own.encode(PROMPT)])
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answer == out[0, prompt.shape[1] :].tolist()
    merged = merge_into_base("new", tmp_path / "merged", "float32", registry=registry, base=resolved, untie=True)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(merged.folder).encode(PROMPT) == grown.encode(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_named_tokens_are_one_token_in_rows_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, home: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = a_base("untied", tmp_path / "base", byte_tokenizer, monkeypatch)
    first = len(tokenizer)
    rows = [{"prompt": f"{c}?", "completion": f"<call>{c}</call>"} for c in "abcdefgh"]
    recipe = TrainingRecipe(
        steps=4, save_steps=2, batch_size=2, added_tokens="<call>, </call>", target_modules="attention",
        memory_preset="lora-fp32", max_length=64,
    )  # fmt: skip
    outcome = train_adapter(resolve_base(base), rows, tmp_path / "runs", recipe, show_progress=False)
    found = load_file(outcome.folder / "adapter_model.safetensors")
    new = {name: tensor.shape for name, tensor in found.items() if "lora" not in name}
    assert sorted(new.values()) == [(2, 64), (2, 64)]
    # A checkpoint is an adapter too, with its tokens.
    checkpoint = outcome.folder.parent / "checkpoint-2"
    assert (checkpoint / ADDED_TOKENS_FILE).read_bytes() == (outcome.folder / ADDED_TOKENS_FILE).read_bytes()
    AdapterRegistry(home).add(checkpoint, "half", base=resolve_base(base), tell=lambda _: None)
    trainer = trainer_for(
        base, tmp_path / "again", rows, settings={"added_tokens": TEXTS, "target_modules": "attention"}
    )
    taught = [row["input_ids"] for row in trainer.train_dataset]
    assert all(row.count(first) == row.count(first + 1) == 1 for row in taught)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS


def test_the_plan_counts_the_new_rows(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = a_base("untied", tmp_path / "base", byte_tokenizer, monkeypatch)
    rows, many = Dataset.from_list(rows_with(5)), [f"<{number}>" for number in range(400)]
    without, named = (
        trainer_for(base, tmp_path / str(len(texts)), rows, settings={"added_tokens": texts}).memory_choice.uncorrected
        for texts in ([], many)
    )
    assert without is not None and named is not None
    more = 2 * len(many) * 64 * 4  # of embedding and head, in fp32
    assert named.components["adapter"] - without.components["adapter"] == more
    assert named.components["weights"] - without.components["weights"] == more
    model = resized(base, len(tokenizer) + len(many))
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(many)
    trainer = trainer_for(base, tmp_path / "resized", rows, model, processing_class=grown)
    assert trainer.memory_choice.uncorrected is not None
    for part in ("adapter", "weights"):
        assert trainer.memory_choice.uncorrected.components[part] == named.components[part]


REFUSED = {
    "there already": r"added_tokens has '<\|im_end\|>', which the tokenizer has already",
    "twice": "expected each token once",
    "not trained": r"resized to \d+ rows, and of those the base and the adapter keep \d+: name the new tokens in",
    "head alone": r"lm_head.weight has rows of \d+ tokens and model.embed_tokens.weight has not",
    "rows without tokens": "Give the tokenizer that has the new tokens as processing_class",
    "padded": "without pad_to_multiple_of",
    "shrunk": "resizing took rows away",
    "other numbers": "other tokens than that of .*, and not only new ones behind them",
    "adapted before": "Resize it before it gets its adapter",
    "full": "memory_preset='full' trains the base itself",
    "zero3": "not trained where an engine splits the weights",
    "too long": "at most 256 characters",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_tokens_that_could_not_travel_are_refused_before_the_first_step(
    wrong: str, tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = a_base("untied", tmp_path / "base", byte_tokenizer, monkeypatch)
    first, rows = len(tokenizer), Dataset.from_list(rows_with(5))
    plain = LoraConfig(r=8, target_modules=TARGETS)
    given: dict[str, Any] = {"processing_class": with_texts(tokenizer)}
    if wrong in ("there already", "twice", "too long"):
        texts = {"there already": ["<|im_end|>"], "twice": ["<a>", "<a>"], "too long": ["<" * 300]}[wrong]
        given = {"settings": {"added_tokens": texts}}
    elif wrong == "not trained":
        given |= {"model": resized(base, first + 2), "peft_config": plain}
    elif wrong == "head alone":
        given |= {"model": resized(base, first + 2)}
        given["peft_config"] = LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["lm_head"])
    elif wrong == "rows without tokens":
        given = {"model": resized(base, first + 2)}
    elif wrong == "padded":
        given["model"] = resized(base, first + 30)
    elif wrong == "shrunk":
        given["model"] = AutoModelForCausalLM.from_pretrained(base)
        given["model"].resize_token_embeddings(first - 4)
    elif wrong == "other numbers":
        swapped = json.loads(tokenizer.backend_tokenizer.to_str())
        words = swapped["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        core, end = Tokenizer.from_str(json.dumps(swapped)), tokenizer.eos_token
        given["processing_class"] = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    elif wrong == "adapted before":
        given["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(base), plain)
    else:
        given["settings"] = {"memory_preset": wrong}
    settings = given.pop("settings", {})
    with pytest.raises(ConfigurationError, match=REFUSED[wrong]):
        AdapterTrainer(
            given.pop("model", str(base)),
            AdapterTrainingArguments(
                output_dir=str(tmp_path / "run"), show_progress=False, use_cpu=True, report_to="none", **settings
            ),
            rows,
            **given,
        )


def test_rows_of_a_head_whose_bias_peft_leaves_out_are_refused(tmp_path: Path, byte_tokenizer: Any) -> None:
    """PEFT computes the logits of such a head without its bias: merged, or served by others, they would be others."""
    base = build("phi", tmp_path / "base", byte_tokenizer)
    config = LoraConfig(r=8, target_modules=TARGETS, trainable_token_indices={"embed_tokens": [70], "lm_head": [70]})
    with pytest.raises(ConfigurationError, match="lm_head: PEFT leaves its bias out"):
        trainer_for(base, tmp_path / "run", Dataset.from_list(rows_with(5)), peft_config=config)
    config.trainable_token_indices = {"embed_tokens": [70]}
    trainer_for(base, tmp_path / "run", Dataset.from_list(rows_with(5)), peft_config=config)

"""Scripts of other trainers: every argument is taken or answered, and what is taken does what it did there."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.data.packing import groups, pack
from adapterhub_lite.training.porting import ANSWERS, TRAINER_ARGUMENTS
from tests.checkout import ROOT
from tests.training.habits.conftest import Bench, losses

TEXTS = [{"text": "hello " * (index % 4 + 1)} for index in range(16)]


def learned(trainer: AdapterTrainer, row: int = 0) -> str:
    """What is learned of a row, as text."""
    labels = trainer.train_dataset[row]["labels"]
    return str(trainer.processing_class.decode([label for label in labels if label != -100]))


def test_every_argument_of_trl_is_taken_or_answered(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    own = {one.name for one in fields(AdapterTrainingArguments)}
    beyond = {one.name for one in fields(trl.SFTConfig)} - {one.name for one in fields(TrainingArguments)}
    assert beyond <= own | set(ANSWERS), sorted(beyond - own - set(ANSWERS))
    for name in beyond - own:
        default = next(one.default for one in fields(trl.SFTConfig) if one.name == name)
        AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: default})
        for value in ("something", True, {"odd": 1}):
            try:
                AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
            except ConfigurationError as error:
                assert name in str(error)
    ours = set(inspect.signature(AdapterTrainer.__init__).parameters) | set(
        inspect.signature(transformers_init()).parameters
    )
    theirs = set(inspect.signature(trl.SFTTrainer.__init__).parameters)
    assert theirs <= ours | set(TRAINER_ARGUMENTS)


def transformers_init() -> Any:
    from transformers import Trainer

    return Trainer.__init__


def test_the_docs_have_the_table() -> None:
    page = (ROOT / "docs" / "how-to" / "from-trl-or-peft.md").read_text()
    for name, answer in ANSWERS.items():
        assert f"| `{name}` | {answer.kind} | {answer.text} |" in page, name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"no_such_argument": 1}, "there is no argument no_such_argument"),
        ({"learning_rat": 1.0}, "did you mean learning_rate"),
        ({"packing": True, "packing_strategy": "tight"}, "packing_strategy='tight' is packing"),
        ({"packing": "tight"}, "packing is 'tight', expected one of none, bfd, bfd_split, wrapped"),
        ({"packing": True, "max_length": None}, "expected a number"),
        ({"trust_remote_code": True}, "load the model"),
        ({"activation_offloading": True}, "activation_checkpointing_kwargs"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "takes dtype alone"),
    ],
)
def test_what_means_nothing_is_one_sentence(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"max_seq_length": 64}, {"max_length": 64}),
        ({"max_length": None}, {"max_length": None}),
        ({"packing": True}, {"packing": "bfd"}),
        ({"packing": True, "packing_strategy": "wrapped"}, {"packing": "wrapped"}),
        ({"packing": True, "packing_strategy": "bfd_split"}, {"packing": "bfd_split"}),
        ({"packing": False, "packing_strategy": "bfd"}, {"packing": "none"}),
        ({"truncation_mode": "keep_end"}, {"overlong": "truncate_start"}),
        ({"evaluation_strategy": "no", "no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.2}, {"warmup_steps": 0.2}),
        ({"model_init_kwargs": {"dtype": torch.float32}}, {"base_dtype": "float32"}),
        ({"loss_type": "chunked_nll", "dataset_num_proc": 2, "use_liger_kernel": True}, {"loss_type": "nll"}),
    ],
)
def test_what_means_something_is_taken(given: dict[str, Any], meant: dict[str, Any], tmp_path: Path) -> None:
    args = AdapterTrainingArguments(output_dir=str(tmp_path), **{"use_cpu": True, **given})
    assert {name: getattr(args, name) for name in meant} == meant


# TRL sets what transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_arguments_of_other_classes_and_none_are_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "output_dir": bench.run_folder(),
        "max_steps": 2,
        "use_cpu": True,
        "learning_rate": 3e-4,
        "report_to": "none",
    }
    trainer = AdapterTrainer(bench.model(), TrainingArguments(**given), bench.rows, processing_class=bench.tokenizer)
    assert trainer.args.learning_rate == 3e-4 and trainer.args.per_device_train_batch_size == 8
    trainer.train()
    monkeypatch.chdir(bench.folder)
    assert AdapterTrainer(bench.model(), train_dataset=bench.rows, processing_class=bench.tokenizer).args.rank == 8
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(**{**given, "output_dir": bench.run_folder()}, packing=True, max_length=32, bf16=False)
    taken = AdapterTrainer(
        AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32),
        config,
        train_dataset=TEXTS,
        processing_class=bench.tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    assert taken.args.packing == "bfd" and taken.args.learning_rate == 3e-4 and len(taken.train_dataset) < len(TEXTS)
    taken.train()


@dataclass
class ScriptArguments(TrainingArguments):
    """Arguments of a script's own, as many fine-tuning scripts have them."""

    model_max_length: int = 512
    lazy_preprocess: bool = False


def test_arguments_of_a_scripts_own_stay_its_own(bench: Bench) -> None:
    given = {"output_dir": bench.run_folder(), "max_steps": 1, "use_cpu": True, "report_to": "none"}
    args = ScriptArguments(**given, model_max_length=64)
    trainer = AdapterTrainer(bench.model(), args, bench.rows, processing_class=bench.tokenizer)
    assert (trainer.args.model_max_length, trainer.args.lazy_preprocess, trainer.args.max_steps) == (64, False, 1)
    trainer.train()


def test_the_trainer_answers_for_its_own_keywords(bench: Bench) -> None:
    made = bench.ours(TEXTS, keywords={"max_seq_length": 48, "tokenizer": bench.tokenizer})
    assert made.args.max_length == 48
    with pytest.raises(ConfigurationError, match="qlora-nf4"):
        bench.ours(TEXTS, keywords={"quantization_config": object()})
    with pytest.raises(ConfigurationError, match="third argument"):
        AdapterTrainer(bench.model(), made.args, lambda rows: rows)


@pytest.mark.parametrize("how", ["bfd", "wrapped"])
def test_packed_rows_stay_apart(bench: Bench, how: str) -> None:
    whole = bench.ours(TEXTS, packing="none", max_steps=1, per_device_train_batch_size=16)
    packed = bench.ours(
        TEXTS, packing=how, max_length=32 if how == "bfd" else 400, max_steps=1, per_device_train_batch_size=16
    )
    lengths = packed.train_dataset["length"]
    assert len(lengths) < len(TEXTS) and sum(lengths) == sum(whole.train_dataset["length"])
    whole.train(), packed.train()
    # One batch holds all rows, whichever way they lie: the same tokens give the same loss.
    assert losses(packed) == pytest.approx(losses(whole), rel=1e-5)
    padded = bench.ours(TEXTS, packing=how, max_length=32 if how == "bfd" else 400, max_steps=1, padding_free=False,
                        per_device_train_batch_size=16)  # fmt: skip
    padded.train()
    assert losses(padded) == pytest.approx(losses(whole), rel=1e-5)


def test_packing_loses_no_token_and_fills_rows() -> None:
    rows = Dataset.from_list(
        [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in (9, 3, 7, 5, 1, 2)]
    )
    cut = pack(rows, "wrapped", 10)
    assert [len(ids) for ids in cut["input_ids"]] == [10, 10, 7] and cut[0]["position_ids"] == [*range(9), 0]
    assert [token for ids in cut["input_ids"] for token in ids] == [token for ids in rows["input_ids"] for token in ids]
    assert (
        sorted(i for one in groups([9, 3, 7, 5, 1, 2], 10) for i in one) == list(range(6))
        and len(groups([9, 3, 7, 5, 1, 2], 10)) == 3
    )
    split = pack(rows, "bfd_split", 4)
    assert sorted(token for ids in split["input_ids"] for token in ids) == sorted(
        t for ids in rows["input_ids"] for t in ids
    )
    # 9, 7, 5 in fours, and what is left over beside each other; a piece begins a sequence.
    assert [len(ids) for ids in split["input_ids"]] == [4, 4, 4, 4, 4, 4, 3]
    assert all(places[0] == 0 for places in split["position_ids"]) and [5, 6, 7, 8] in split["input_ids"]
    lazily = pack(rows.to_iterable_dataset(), "bfd_split", 4)
    assert [row["input_ids"] for row in lazily] == list(split["input_ids"])
    # A piece of which nothing is learned would fill a batch for nothing.
    asked = Dataset.from_list([{"input_ids": [1] * 6, "labels": [-100] * 4 + [1, 1]}])
    assert pack(asked, "bfd_split", 4)["input_ids"][:] == [[1, 1]]
    with pytest.raises(DataError, match="cannot be packed whole"):
        pack(rows, "bfd", 8)
    stream = pack(rows.to_iterable_dataset(), "bfd", 10)
    assert sum(len(row["input_ids"]) for row in stream) == 27
    with pytest.raises(ConfigurationError, match="packed already"):
        pack(cut, "bfd", 10)


def test_what_is_learned_is_what_was_asked(bench: Bench) -> None:
    pair = {"prompt": "2+2=", "completion": " 4"}
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    end = bench.tokenizer.eos_token
    assert learned(bench.ours([pair] * 8)) == f" 4{end}" == learned(bench.ours([pair] * 8, completion_only_loss=True))
    assert learned(bench.ours([pair] * 8, completion_only_loss=False)) == f"2+2= 4{end}"
    assert learned(bench.ours([chat] * 8, assistant_only_loss=True)) == f"yo{end}"
    assert learned(bench.ours([chat] * 8, assistant_only_loss=False)).startswith("<|im_start|>user\nhi")
    with pytest.raises(DataError, match="no answer to learn alone"):
        bench.ours(TEXTS, completion_only_loss=True)
    assert learned(bench.ours([{"words": "abc"}] * 8, dataset_text_field="words")) == f"abc{end}"
    formatted = bench.ours(
        [{"q": "1", "a": "2"}] * 8, keywords={"formatting_func": lambda row: f"{row['q']}:{row['a']}"}
    )
    assert learned(formatted) == f"1:2{end}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_completion_mask_is_heeded_unless_prompts_are_learned(bench: Bench, asked: bool | None, stream: bool) -> None:
    ids = [*range(70, 78), bench.tokenizer.eos_token_id]
    table = Dataset.from_list([{"input_ids": ids, "completion_mask": [0] * 5 + [1] * 4}] * 8)
    trainer = bench.ours(table.to_iterable_dataset() if stream else table, completion_only_loss=asked)
    row = next(iter(trainer.train_dataset))
    assert row["labels"] == (ids if asked is False else [-100] * 5 + ids[5:])


def test_an_adapter_beside_another_is_refused_and_beside_itself_is_one(bench: Bench) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32), config)
    once = bench.ours(model=model, keywords={"peft_config": config})
    assert once.model.active_peft_config.r == 4
    other = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigurationError, match="peft_config describes another"):
        bench.ours(keywords={"peft_config": other})
    # What the sentence advises.
    again = bench.ours(model=bench.model().merge_and_unload(), keywords={"peft_config": other})
    again.train()
    assert again.model.active_peft_config.r == 2 and len(losses(again)) == 3


@pytest.mark.parametrize("given", ["a name", object()])
def test_what_is_no_tokenizer_is_refused(bench: Bench, given: Any) -> None:
    args = AdapterTrainingArguments(**bench.settings())
    with pytest.raises(ConfigurationError, match=f"processing_class is a {type(given).__name__}, expected a tokenizer"):
        AdapterTrainer(bench.model(), args, bench.rows, processing_class=given)


def test_a_card_names_the_data_as_trl_is_told_them(bench: Bench) -> None:
    trainer = bench.ours()
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="trl-lib/Capybara", tags=["sft"])
    card = (Path(str(trainer.args.output_dir)) / "README.md").read_text()
    assert "trl-lib/Capybara" in card and "# mine" in card
    trainer.save_model()
    assert (Path(str(trainer.args.output_dir)) / "README.md").read_text() == card
    trainer.save_model(str(bench.folder / "other"))
    assert not (bench.folder / "other" / "README.md").exists()


def test_tokens_templates_and_order_may_be_given(bench: Bench) -> None:
    (bench.folder / "t.jinja").write_text(
        "{% for m in messages %}[{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    chat = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 8
    assert learned(bench.ours(chat, chat_template_path=str(bench.folder / "t.jinja"))) == "yo<|im_end|>"
    with pytest.raises(ConfigurationError, match="no chat template at"):
        bench.ours(chat, chat_template_path=str(bench.folder / "none.jinja"))
    ended = bench.ours(TEXTS, eos_token="<|im_start|>")
    assert ended.train_dataset[0]["input_ids"][-1] == bench.tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(ConfigurationError, match="not in the tokenizer's vocabulary"):
        bench.ours(TEXTS, pad_token="<|nothing|>")
    plain, mixed = bench.ours(TEXTS), bench.ours(TEXTS, shuffle_dataset=True)
    assert plain.train_dataset["input_ids"][:] != mixed.train_dataset["input_ids"][:]
    assert sorted(map(tuple, plain.train_dataset["input_ids"])) == sorted(map(tuple, mixed.train_dataset["input_ids"]))
    batch = next(iter(bench.ours(TEXTS, pad_to_multiple_of=16).get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0 and batch["attention_mask"].shape == batch["input_ids"].shape


def test_the_likelihood_weighs_a_token(bench: Bench) -> None:
    nll, dft = bench.ours(max_steps=1), bench.ours(max_steps=1, loss_type="dft")
    one = {name: value[:1] for name, value in nll.padded([nll.train_dataset[0]]).items()}
    wanted = nll.model(**one).logits[:, :-1].float().log_softmax(-1)
    labels = one["labels"][:, 1:]
    each = -wanted.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    found = dft.compute_loss(dft.model, dict(one))
    torch.testing.assert_close(found, (each * (-each).exp()).mean())


def test_rows_without_a_limit_train(bench: Bench) -> None:
    trainer = bench.ours([{"text": "hello " * 60}] * 8, max_length=None)
    assert trainer.train_dataset["length"][0] > 300
    trainer.train()

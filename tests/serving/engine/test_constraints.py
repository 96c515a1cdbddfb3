"""Answers of a given form: valid whenever they are whole, what greedy would say where that is valid, nobody else touched."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from adapterhub_lite.adapter_format.manifest import read_manifest
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.engine.constraints import ConstraintCompiler
from adapterhub_lite.serving.engine.request import Form
from scripts.bench.serve.forms import can_be_followed, is_valid
from scripts.bench.serve.schema_corpus import SchemaCorpus

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"schema": PERSON},
    {"regex": "[0-9]{3}-[a-f]{1,9}!"},
    {"choices": ["yes", "no", "naïve ✓", 'say "hi"\n\\', "🐈"]},
    {"grammar": 'start: "SELECT " NAME (", " NAME)? ";"\nNAME: /[a-z]{1,4}/'},
    {"grammar": 'root ::= "a" [b-d] ("x" | "y")'},
]


def is_of(form: dict[str, Any], text: str) -> bool:
    if "schema" in form:
        value = json.loads(text)
        return set(value) == {"name", "age"} and len(value["name"]) <= 8 and 0 <= value["age"] <= 99
    if "choices" in form:
        return text in form["choices"]
    patterns = {"r": "[0-9]{3}-[a-f]{1,9}!", "S": "SELECT [a-z]{1,4}(, [a-z]{1,4})?;", "a": "a[bcd][xy]"}
    key = "r" if "regex" in form else "S" if "SELECT" in form["grammar"] else "a"
    return re.fullmatch(patterns[key], text) is not None


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_whole_answers_are_of_their_form_beside_others_that_are_free(
    engine: InferenceEngine, alone: Any, adapters: dict[str, Path], temperature: float
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 400, "temperature": temperature, "seed": 5}
    asked = [
        GenerationRequest(prompt="ask", adapter=adapter, **form, **options)
        for form in FORMS
        for adapter in (None, adapters["small"], adapters["wide"])
    ]
    free = [GenerationRequest(prompt="free", adapter=adapters["mlp"], max_new_tokens=12)] * 3
    results = engine.generate_many([*asked, *free])
    for request, result in zip(asked, results, strict=False):
        form = next({key: value} for f in FORMS for key, value in f.items() if getattr(request, key) == value)
        assert result.finish_reason == "stop", (form, result.text)
        assert is_of(form, result.text), (form, result.text)
    for result in results[len(asked) :]:
        assert result.token_ids == alone.tokens("free", adapters["mlp"])
    again = engine.generate(asked[1])
    assert again.token_ids == results[1].token_ids, "as if it were alone"


def test_what_greedy_says_is_what_a_form_that_fits_it_says(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    for adapter in (None, *adapters.values()):
        free = engine.generate(GenerationRequest(prompt="abc", adapter=adapter, max_new_tokens=24))
        for form in ({"regex": r"(?s:.*)"}, {"choices": [free.text, "other"]}, {"grammar": r"start: /(?s:.)*/"}):
            if "�" in free.text:
                continue
            bound = engine.generate(GenerationRequest(prompt="abc", adapter=adapter, max_new_tokens=24, **form))
            assert bound.token_ids == free.token_ids[: len(bound.token_ids)] and bound.text == free.text, form


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"regex": "("}, "regex cannot be"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"schema": {"not": {"type": "string"}}}, "not"),
        ({"schema": {"type": "banana"}}, "banana"),
        ({"schema": {"type": "string", "x-guidance": {"lenient": True}, "not": {}}}, "not"),
        ({"schema": {"$ref": "http://127.0.0.1:1/x"}}, "fetch"),
        ({"schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
        ({"schema": {"type": "integer", "multipleOf": 123456789}}, "multipleOf"),
        ({"schema": {"a": object()}}, "not JSON"),
        ({"grammar": "start: undefined"}, "undefined"),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf": 123456789}'}, "multipleOf"),
        ({"schema": {"allOf": [{"multipleOf": k} for k in (97, 101, 89)]}}, "multipleOf"),
        ({"schema": {"type": "array", "maxItems": 10**6}}, "maxItems"),
        ({"schema": {"properties": {f"p{i}": {} for i in range(5000)}}}, "5000 entries"),
        ({"regex": "a" * 5000}, "at most"),
        ({"choices": []}, "choices"),
        ({"choices": ["a"], "regex": "b"}, "one form"),
    ],
)
def test_a_form_that_cannot_be_enforced_is_refused_before_anything_runs(
    engine: InferenceEngine, form: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        engine.submit(GenerationRequest(prompt="a", **form))
    assert engine.status().running == engine.status().waiting == 0


def test_a_schema_kept_with_an_adapter_is_the_form_of_its_answers(
    make_engine: Any, home: Path, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    plain = registry.add(adapters["small"], "plain", base=base)
    kept = registry.add(adapters["small"], "people", base=base, answer_schema=PERSON)
    assert "answer_schema" not in json.loads(plain.to_bytes()) and read_manifest(kept.to_bytes()) == kept
    # The order of its fields is that of the answers.
    turned = {**PERSON, "properties": dict(reversed(PERSON["properties"].items()))}
    other = registry.add(adapters["small"], "turned", base=base, answer_schema=turned)
    assert list(registry.resolve("turned").answer_schema["properties"]) == ["age", "name"]
    assert other.digest != kept.digest
    engine = make_engine(registry=registry)

    def ask(adapter: str, **form: Any) -> str:
        options: dict[str, Any] = {"max_new_tokens": 300, "seed": 3, "temperature": 1.0}
        return engine.generate(GenerationRequest(prompt="who?", adapter=adapter, **options, **form)).text

    assert set(json.loads(ask("people"))) == set(json.loads(ask("people*0.5"))) == {"name", "age"}
    assert ask("people", choices=["a"]) == "a"
    free = ask("plain")
    assert ask("people", any_form=True) == free and ask("people+plain") != free
    labels = engine.generate(GenerationRequest(prompt="who?", adapter="people", labels=["a", "b"]))
    assert labels.label_logprobs is not None and len(labels.label_logprobs) == 2


def test_the_space_that_sentencepiece_puts_before_a_text_is_no_part_of_its_form() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "▁yes": 2, "yes": 3, "▁": 4, "no": 5, "▁no": 6, "▁▁yes": 7, "▁,": 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    compiler = ConstraintCompiler(fast, [1])
    for token in (2, 3):
        constraint = compiler.compile(Form("regex", "yes( no)?"), {1})
        assert constraint.allowed(9).nonzero()[:, 0].tolist() == [2, 3] and not constraint.may_end
        assert constraint.take(token) and fast.decode([token]) == "yes"
        assert constraint.allowed(9).nonzero()[:, 0].tolist() == [1, 4, 6]
        assert not constraint.take(6)
    compiler.close()


@pytest.mark.slow
def test_every_whole_answer_is_valid_after_its_schema(
    engine: InferenceEngine, adapters: dict[str, Path], byte_tokenizer: Any
) -> None:
    corpus = SchemaCorpus(seed=7)
    schemas = list(filter(can_be_followed, (corpus.schema() for _ in range(150))))
    assert len(schemas) > 110
    # A random model loves no character less than another: without this most of an answer is white space.
    few_spaces = dict.fromkeys(byte_tokenizer.encode(" \n\t\r"), -8.0)
    chosen = [None, *adapters.values()]
    asked = [
        GenerationRequest(
            prompt="x", schema=schema, temperature=1.0, seed=at, max_new_tokens=500, logit_bias=few_spaces,
            adapter=chosen[at % len(chosen)],
        )
        for at, schema in enumerate(schemas)
    ]  # fmt: skip
    whole = 0
    for schema, result in zip(schemas, engine.generate_many(asked), strict=True):
        if result.finish_reason == "stop":
            whole += 1
            assert is_valid(result.text, schema), (result.text, schema)
    assert whole > 0.9 * len(schemas)

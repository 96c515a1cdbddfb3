"""An adapter is asked by the template and ended by the tokens that it was trained with."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import BaseMismatchError, ConfigurationError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

QA = (
    "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "ping"}]


def with_record(
    folder: Path, aside: Path, base: Path, template: str, ends: tuple[int, ...], *, brings: bool = True
) -> Path:
    """A copy of an adapter with the record of a run on `base`, and with the run's template where it brings it."""
    made = aside / f"{folder.name}-{len(list(aside.iterdir()))}"
    shutil.copytree(folder, made)
    found = resolve_base(str(base))
    record = {
        "base": {"id": found.model_id, "fingerprint": found.fingerprint}, "data": {"id": "d", "rows": 1, "fingerprint": "0" * 64},
        "template_digest": hashlib.sha256(template.encode()).hexdigest(), "text": {"end_tokens": list(ends)},
        "seeds": {}, "hyperparameters": {}, "packages": {}, "preset": "lora-fp32", "loss_backend": {},
        "memory": {"measured_peak_bytes": 1}, "hardware": {}, "steps": 1, "wall_seconds": 1.0,
    }  # fmt: skip
    (made / "training_record.json").write_text(json.dumps(record))
    if brings:
        (made / "chat_template.jinja").write_bytes(template.encode())
    return made


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Any:
    with InferenceEngine.from_base(tiny_base, device="cpu") as made:
        yield made


def test_a_template_that_an_adapter_brings_is_the_one_it_is_asked_with(
    engine: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    own = with_record(make_adapter(seed=1), tmp_path, tiny_base, QA, ())
    result = engine.generate(GenerationRequest(messages=MESSAGES, adapter=own, max_new_tokens=2))
    assert result.usage.prompt_tokens == len("Q: ping\nA: ")
    plain = engine.generate(GenerationRequest(messages=MESSAGES, max_new_tokens=2))
    assert plain.usage.prompt_tokens != result.usage.prompt_tokens
    same = AutoTokenizer.from_pretrained(tiny_base).chat_template
    base_like = with_record(make_adapter(seed=1), tmp_path, tiny_base, same, (), brings=False)
    asked = engine.generate(GenerationRequest(messages=MESSAGES, adapter=base_like, max_new_tokens=2))
    assert asked.usage.prompt_tokens == plain.usage.prompt_tokens


def test_each_version_is_asked_with_its_own_template(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    """Versions of the same weights are two adapters where they are asked or answer differently, else they are one."""
    registry, base, adapter = AdapterRegistry(), resolve_base(str(tiny_base)), make_adapter(seed=3)
    for template in (QA, QA.replace("A: ", "Answer: ")):
        registry.add(with_record(adapter, tmp_path, tiny_base, template, (257,)), "task", base=base)
    first, second = (registry.resolve(f"task:{version}") for version in (1, 2))
    assert first.digest != second.digest
    registry.add(adapter, "bare", base=base)
    registry.add(adapter, "again", base=base)
    assert registry.resolve("bare").digest == registry.resolve("again").digest not in (first.digest, second.digest)
    registry.add(adapter, "formed", base=base, answer_schema={"type": "object"})
    assert registry.resolve("formed").digest != registry.resolve("bare").digest
    with InferenceEngine.from_base(tiny_base, device="cpu", registry=registry) as engine:
        for manifest, text in ((first, "Q: ping\nA: "), (second, "Q: ping\nAnswer: ")):
            request = GenerationRequest(messages=MESSAGES, adapter=manifest.digest, max_new_tokens=1)
            assert engine.generate(request).usage.prompt_tokens == len(text)


def test_a_template_that_is_not_there_is_not_replaced_by_another(
    engine: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    without = with_record(make_adapter(seed=1), tmp_path, tiny_base, QA, (), brings=False)
    with pytest.raises(BaseMismatchError, match="was trained with another chat template"):
        engine.generate(GenerationRequest(messages=MESSAGES, adapter=without))
    # Raw text is put to it all the same.
    assert engine.generate(GenerationRequest(prompt="Q: a", adapter=without, max_new_tokens=1)).token_ids


@pytest.mark.parametrize("given", [{"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"think": True}}])
def test_what_a_template_does_not_read_is_refused_not_dropped(engine: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"The base's chat template does not read '(tools|think)'"):
        engine.generate(GenerationRequest(messages=MESSAGES, **given))


def test_an_answer_ends_with_the_adapters_own_end_token(
    engine: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    folder = make_adapter(seed=3)
    request = GenerationRequest(prompt="abc", adapter=folder, max_new_tokens=8)
    free = engine.generate(request).token_ids
    assert len(free) == 8, "the random adapter should not end by itself"
    own = with_record(folder, tmp_path, tiny_base, QA, (free[3],))
    ended = engine.generate(GenerationRequest(prompt="abc", adapter=own, max_new_tokens=8))
    assert ended.finish_reason == "stop" and ended.token_ids == free[: free.index(free[3]) + 1]


def test_a_rendered_prompt_gets_no_second_beginning_and_no_end(engine: Any) -> None:
    from tests.training.data.tokenizers import make_tokenizer

    tokenizer = make_tokenizer("bytes", around="<s> $A </s>")
    from adapterhub_lite.bases.encoding import encode_prompt

    for prompt in ("hi", "<s>hi"):
        assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, prompt)) == ["<s>", "h", "i"]


def test_what_no_answer_began_with_is_not_begun_for_it(
    engine: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    """A template that begins each answer with <think>, and rows that never did."""
    thinking = QA.replace("{{ 'A: ' }}", "{{ 'A: <think>' }}")
    asked = []
    for prefill in ("", "<think>"):
        own = with_record(make_adapter(seed=1), tmp_path, tiny_base, thinking, ())
        record = json.loads((own / "training_record.json").read_text())
        record["text"]["prefill"] = prefill
        (own / "training_record.json").write_text(json.dumps(record))
        result = engine.generate(GenerationRequest(messages=MESSAGES, adapter=own, max_new_tokens=1))
        asked.append(result.usage.prompt_tokens)
    assert asked == [len("Q: ping\nA: <think>"), len("Q: ping\nA: ")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "for more than a second"),
    ],
)
def test_a_template_that_fails_ends_one_request_and_nothing_else(
    engine: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path, text: str, words: str
) -> None:
    # What it does when it is added is another thing than what it does when it is asked.
    text = QA + "{% if messages[0].content == 'ping' %}" + text + "{% endif %}"
    bad = with_record(make_adapter(seed=1), tmp_path, tiny_base, text, ())
    with pytest.raises(ConfigurationError, match=f"The adapter's chat template refused the messages: .*{words}"):
        engine.generate(GenerationRequest(messages=MESSAGES, adapter=bad, max_new_tokens=1))
    assert engine.generate(GenerationRequest(messages=MESSAGES, max_new_tokens=1)).token_ids
    other = [{"role": "user", "content": "pong"}]
    assert engine.generate(GenerationRequest(messages=other, adapter=bad, max_new_tokens=1)).token_ids

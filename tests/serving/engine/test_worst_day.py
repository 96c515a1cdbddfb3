"""The worst day: eight threads, requests that come, abort, time out, reload and move aliases.

Every answer must be the one that plain PEFT gives to that request alone. The same check pointed at plain PEFT with
threads must fail, or it would prove nothing.
"""

import functools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import RequestCancelledError, RequestTimeoutError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

THREADS = 8
LONGEST = 12
BLENDS = ("a0:1*0.7+a1:1*0.3", "a2:1*0.5+a3:1*-0.5", "a4:1*1.5+a5:1*0.25+a6:1*0.25")
Parts = tuple[tuple[Path, float], ...]


@dataclass
class Outcome:
    """What a request got: whole tokens, or the beginning of a text."""

    asked: str | None
    parts: Parts
    prompt: str
    limit: int
    tokens: tuple[int, ...] | None = None
    text: str | None = None


@dataclass
class Day:
    """A registry with adapters a0..a7, of which a7 has two versions and an alias that moves."""

    registry: AdapterRegistry
    by_digest: dict[str, Path]
    digest_of: dict[str, str]
    prompts: list[str]
    outcomes: list[Outcome] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def parts_of(self, digest: str | None) -> Parts:
        if digest is None:
            return ()
        pieces = [piece.partition("*") for piece in digest.split("+")]
        return tuple((self.by_digest[name], float(weight or 1)) for name, _, weight in pieces)

    def wrong(self, alone: Any, tokenizer: Any) -> list[Outcome]:
        """The outcomes that differ from the solo answer."""
        wrong = []
        solo = functools.cache(lambda prompt, parts: alone.tokens(prompt, *parts, new=LONGEST))
        for outcome in self.outcomes:
            truth = solo(outcome.prompt, outcome.parts)[: outcome.limit]
            if outcome.tokens is not None and outcome.tokens != truth:
                wrong.append(outcome)
            if outcome.text is not None:
                whole = tokenizer.decode(truth, skip_special_tokens=True)
                if not whole.startswith(outcome.text):
                    wrong.append(outcome)
        return wrong


@pytest.fixture
def day(home: Path, tiny_base: Path, make_adapter: Any) -> Day:
    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    by_digest, digest_of = {}, {}
    kinds = [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")]
    for i in range(9):
        folder = make_adapter(20 + i, rank=(2, 4, 8)[i % 3], alpha=8, targets=kinds[i // 3])
        manifest = registry.add(folder, f"a{min(i, 7)}", base=base)
        by_digest[manifest.digest] = folder
        digest_of[manifest.reference] = manifest.digest
    registry.set_alias("a7", "prod", version=1)
    rng = random.Random(7)
    prompts = ["".join(rng.choices("abcdefgh 0123", k=rng.choice([1, 5, 17, 40]))) for _ in range(6)]
    prompts.append("".join(rng.choices("xyz ", k=300)))
    return Day(registry, by_digest, digest_of, prompts)


class Worker:
    """One of the threads that make the day's requests on the engine."""

    def __init__(self, engine: InferenceEngine, day: Day, seed: int, requests: int) -> None:
        self.engine, self.day, self.requests = engine, day, requests
        self.random = random.Random(seed)

    def __call__(self) -> None:
        ways: list[Callable[[], None]] = [self.ask] * 7 + [self.leave_early, self.cancel, self.hurry, self.reload]
        for _ in range(self.requests):
            time.sleep(self.random.expovariate(2000))
            self.random.choice(ways)()
            if self.random.random() < 0.05:
                self.day.registry.set_alias("a7", "prod", version=self.random.choice([1, 2]))

    def request(self, **options: Any) -> GenerationRequest:
        routes = [None, "a7@prod", *self.day.digest_of, *BLENDS]
        return GenerationRequest(
            prompt=self.random.choice(self.day.prompts),
            adapter=self.random.choice(routes),
            max_new_tokens=self.random.randint(1, LONGEST),
            **options,
        )

    def check(self, request: GenerationRequest, result: Any) -> None:
        """Note the answer, with the adapter that the receipt names, once the receipt is one that was asked for."""
        asked = None if request.adapter is None else str(request.adapter)
        if asked in self.day.digest_of and result.adapter_digest != self.day.digest_of[asked]:
            raise AssertionError(f"asked for {asked}, answered by {result.adapter}")
        if asked == "a7@prod":
            assert result.adapter in ("a7:1", "a7:2"), result.adapter
        self.note(request, self.day.parts_of(result.adapter_digest), tokens=result.token_ids)

    def note(self, request: GenerationRequest, parts: Parts, **got: Any) -> None:
        self.day.outcomes.append(
            Outcome(str(request.adapter), parts, str(request.prompt), request.max_new_tokens, **got)
        )

    def ask(self) -> None:
        request = self.request()
        self.check(request, self.engine.generate(request))

    def leave_early(self) -> None:
        request = self.request()
        text, wanted = "", self.random.randint(0, 4)
        chunks = self.engine.stream(request)
        for count, chunk in enumerate(chunks):
            text += chunk.text
            if count >= wanted:
                break
        chunks.close()
        if request.adapter in self.day.digest_of or request.adapter is None:
            parts = self.day.parts_of(self.day.digest_of[str(request.adapter)]) if request.adapter else ()
            self.note(request, parts, text=text)

    def cancel(self) -> None:
        request = self.request()
        handle = self.engine.submit(request)
        time.sleep(self.random.expovariate(200))
        handle.cancel()
        try:
            self.check(request, handle.result())
        except RequestCancelledError as error:
            self.day.refused.append(str(error))

    def hurry(self) -> None:
        request = self.request(timeout_seconds=self.random.choice([1e-6, 0.01, 0.05]))
        try:
            self.check(request, self.engine.generate(request))
        except RequestTimeoutError as error:
            self.day.refused.append(str(error))

    def reload(self) -> None:
        reference = self.random.choice(list(self.day.digest_of))
        self.engine.unload(reference)
        self.engine.load(reference)


def run_threads(workers: list[Callable[[], None]]) -> list[BaseException]:
    """Run all at once; return what they raised."""
    errors: list[BaseException] = []

    def guarded(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def live_through(day: Day, base: Path, alone: Any, tokenizer: Any, requests: int) -> None:
    with InferenceEngine.from_base(base, registry=day.registry, device="cpu", max_rows=6, max_slots=5) as engine:
        before = engine.base_digest()
        errors = run_threads([Worker(engine, day, seed, requests // THREADS) for seed in range(THREADS)])
        assert not errors, errors
        assert engine.base_digest() == before
    assert all(one.uses == 0 for one in engine.resident())
    assert len(day.outcomes) > requests // 2
    wrong = day.wrong(alone, tokenizer)
    assert not wrong, f"{len(wrong)} of {len(day.outcomes)} answers are wrong, first: {wrong[0]}"


@pytest.mark.parametrize(
    "requests",
    [200, pytest.param(1000, marks=pytest.mark.slow), pytest.param(5000, marks=pytest.mark.soak)],
)
def test_every_answer_is_its_solo_answer(
    day: Day, tiny_base: Path, alone: Any, byte_tokenizer: Any, requests: int
) -> None:
    live_through(day, tiny_base, alone, byte_tokenizer, requests)


def test_the_same_check_fails_for_plain_peft_with_threads(
    day: Day, tiny_base: Path, alone: Any, byte_tokenizer: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = list(day.by_digest.values())
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), folders[0], adapter_name="n0"
    )
    for i, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"n{i}")
    model.eval()

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            which, prompt = rng.randrange(len(folders)), rng.choice(day.prompts[:6])
            ids = torch.tensor([byte_tokenizer.encode(prompt)])
            model.set_adapter(f"n{which}")
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False
            )
            tokens = tuple(out[0, ids.shape[1] :].tolist())
            day.outcomes.append(Outcome(f"n{which}", ((folders[which], 1.0),), prompt, LONGEST, tokens))

    run_threads([lambda seed=seed: worker(seed) for seed in range(THREADS)])  # type: ignore[misc]
    assert day.wrong(alone, byte_tokenizer)

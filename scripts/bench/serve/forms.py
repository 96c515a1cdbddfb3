"""What does a form cost, and does it hold? Answers after generated schemas, the time per step, the first token's delay.

    python -m scripts.bench.serve.forms [--base smollm2-135m] [--schemas 1000] [--rounds 6] [--home FOLDER]

Steps of 16 rows are timed with and without a form, in turns, in one run; so is the first token, each time with a schema
that was never seen. Then a tiny random model on the base's tokenizer answers after every schema, and what is whole is
validated by jsonschema, formats included. `--rounds 0` or `--schemas 0` leaves that part as it was measured before. Writes
results/serving_forms.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationHandle, GenerationRequest, GenerationResult, InferenceEngine
from adapterhub_lite.serving.engine.forms import check_form
from adapterhub_lite.serving.engine.request import schema_form
from scripts.bench.report import RESULTS, versions, write_result
from scripts.bench.serve.schema_corpus import Schema, SchemaCorpus
from scripts.bench.serve.serving_adapters import write_random_adapter

ROWS, TOKENS = 16, 48
PARTS = ("first_token_delay_seconds", "step_of_16_rows", "step_with_half_of_them", "validity")
QUESTION = [{"role": "user", "content": "Make up a record for a shop's catalogue, as JSON."}]
LIST = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
                                   "required": ["name", "count"], "additionalProperties": False}}  # fmt: skip


def validity(engine: InferenceEngine, schemas: list[Schema], longest: int) -> dict[str, Any]:
    """Ask for one answer after each schema, all adapters mixed in, and validate them."""
    counts = {"schemas": len(schemas), "refused": 0, "whole": 0, "cut_at_the_limit": 0, "invalid": 0}
    reasons: dict[str, int] = {}
    handles: list[tuple[Schema, GenerationHandle]] = []
    for number, schema in enumerate(schemas):
        request = GenerationRequest(
            prompt="A record:", schema=schema, temperature=1.0, seed=number, max_new_tokens=longest,
            adapter="bench" if number % 2 else None,
        )  # fmt: skip
        if len(handles) > 4 * ROWS:
            handles[-4 * ROWS][1].result()
        try:
            handles.append((schema, engine.submit(request)))
        except ConfigurationError as error:
            counts["refused"] += 1
            reasons[str(error)[:120]] = reasons.get(str(error)[:120], 0) + 1
    for schema, handle in handles:
        result = handle.result()
        if result.finish_reason == "length":
            counts["cut_at_the_limit"] += 1
            continue
        counts["whole"] += 1
        counts["invalid"] += not is_valid(result.text, schema)
    return counts | {"reasons": reasons}


def can_be_followed(schema: Schema) -> bool:
    """Whether a schema is one that answers can follow; a few ask for what no grammar enforces, and are refused."""
    try:
        check_form(schema_form(schema))
    except ConfigurationError:
        return False
    return True


def is_valid(text: str, schema: Schema) -> bool:
    """Whether an answer is JSON after its schema, formats included."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(value)


def step_seconds(engine: InferenceEngine, forms: int) -> float:
    """Seconds per step of 16 rows, of which so many have a form."""
    requests = [
        GenerationRequest(
            messages=QUESTION, max_new_tokens=TOKENS, ignore_eos=True, schema=LIST if row < forms else None,
            adapter="bench" if row % 2 else None,
        )
        for row in range(ROWS)
    ]  # fmt: skip
    results: list[GenerationResult] = engine.generate_many(requests)
    # All rows write together from the last first token to the first end.
    begun = max(result.timings.first_token_seconds for result in results)
    ended = min(result.timings.total_seconds for result in results)
    shortest = min(result.usage.completion_tokens for result in results)
    return (ended - begun) / (shortest - 1)


def first_token(engine: InferenceEngine, schema: Schema | None, number: int) -> float:
    """Seconds to the first token of one request on an idle engine."""
    started = time.perf_counter()
    for chunk in engine.stream(
        GenerationRequest(messages=QUESTION, schema=schema, max_new_tokens=1, adapter="bench" if number % 2 else None)
    ):
        if chunk.token_ids:
            break
    return time.perf_counter() - started


def shares(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """The median of the ratios, and of both sides in seconds."""
    return {
        "ratio": statistics.median(formed / free for free, formed in pairs),
        "free_seconds": statistics.median(free for free, _ in pairs),
        "formed_seconds": statistics.median(formed for _, formed in pairs),
    }


def write_random_base(tokenizer: Path, folder: Path) -> Path:
    """A tiny Llama with random weights on the base's tokenizer: a model that knows nothing makes every mistake it can."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
            eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    words.save_pretrained(folder)
    return folder


def serving(folder: Path, scratch: Path) -> InferenceEngine:
    """An engine on a base with the adapter "bench"."""
    base = resolve_base(folder)
    registry = AdapterRegistry(scratch / "home")
    registry.add(write_random_adapter(base.folder, scratch / "adapter", seed=1, rank=8), "bench", base=base)
    return InferenceEngine.from_base(base.folder, registry=registry, device="cpu", max_rows=ROWS, max_queue=1024)


def costs(engine: InferenceEngine, rounds: int) -> dict[str, Any]:
    """The delay of a first token by a fresh schema, and what a form adds to a step."""
    first_token(engine, LIST, 0)
    others = SchemaCorpus(seed=2)
    fresh = list(filter(can_be_followed, (others.schema() for _ in range(60))))
    delays = sorted(first_token(engine, s, i) - first_token(engine, None, i) for i, s in enumerate(fresh))
    delay = {"median": statistics.median(delays), "p95": delays[int(0.95 * len(delays))], "max": delays[-1]}
    step_seconds(engine, ROWS)
    every = shares([(step_seconds(engine, 0), step_seconds(engine, ROWS)) for _ in range(rounds)])
    half = shares([(step_seconds(engine, 0), step_seconds(engine, ROWS // 2)) for _ in range(rounds)])
    return {"first_token_delay_seconds": delay, "step_of_16_rows": every, "step_with_half_of_them": half}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--home")
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--longest", type=int, default=512)
    given = parser.parse_args()
    known = RESULTS / "serving_forms.json"
    before: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    payload = {part: before[part] for part in PARTS if part in before}
    payload |= {"base": given.base, "packages": versions(("llguidance", "jsonschema"))}
    base = resolve_base(given.base, home=given.home)
    if given.rounds:
        with tempfile.TemporaryDirectory() as scratch, serving(base.folder, Path(scratch)) as engine:
            payload |= costs(engine, given.rounds)
            print(json.dumps(payload, indent=1))
    if given.schemas:
        corpus = SchemaCorpus(seed=1)
        schemas = [corpus.schema() for _ in range(given.schemas)]
        with tempfile.TemporaryDirectory() as scratch:
            tiny = write_random_base(base.folder, Path(scratch) / "base")
            with serving(tiny, Path(scratch)) as engine:
                payload["validity"] = validity(engine, schemas, given.longest)
    print(json.dumps(payload, indent=1))
    write_result("serving_forms", payload)


if __name__ == "__main__":
    main()

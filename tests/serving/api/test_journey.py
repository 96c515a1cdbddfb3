"""How many files a reader has to open to follow one request from HTTP to its tokens."""

from pathlib import Path

from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from tests.journeys import files_entered
from tests.serving.api.conftest import open_client

AT_MOST = 33


def test_a_request_passes_through_few_files(registry: AdapterRegistry, tiny_base: Path) -> None:
    with (
        files_entered() as entered,
        InferenceEngine.from_base(tiny_base, registry=registry, device="cpu") as engine,
        ApiServer(engine, registry, ServerSettings(port=0)) as server,
        open_client(server) as client,
    ):
        ask = client.chat.completions.create
        journeys = {}
        for model in ("base", "sql@prod"):
            for _ in range(2):  # the first is for what is made once
                entered.clear()
                ask(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
                journeys[model] = [name for name in entered if not name.startswith("registry/")]
    print(journeys)
    assert len(journeys["base"]) <= AT_MOST, journeys["base"]
    assert [name for name in journeys["base"] if name.startswith("serving/model")]

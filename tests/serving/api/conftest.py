"""What the server's tests share: a registry with two tasks, one server for those who only ask, others on order."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from tests.bases.call_templates import CODER, HERMES, NESTED

Serve = Callable[..., tuple[ApiServer, openai.OpenAI]]


def open_client(server: ApiServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def serve(registry: AdapterRegistry, shared_engine: InferenceEngine) -> Iterator[Serve]:
    """A function (key="none", keys=None, engine=None, **settings) -> (server, client), closed after the test."""
    opened: list[Callable[[], None]] = []

    def start(
        key: str = "none", keys: Any = None, engine: Any = None, **settings: Any
    ) -> tuple[ApiServer, openai.OpenAI]:
        server = ApiServer(engine or shared_engine, registry, ServerSettings(port=0, **settings), keys)
        server.__enter__()
        client = open_client(server, key)
        opened.extend((lambda: server.__exit__(None, None, None), client.close))
        return server, client

    yield start
    for close in reversed(opened):
        close()


@pytest.fixture(scope="session")
def shared_server(registry: AdapterRegistry, shared_engine: InferenceEngine) -> Iterator[ApiServer]:
    with ApiServer(shared_engine, registry, ServerSettings(port=0)) as server:
        yield server


@pytest.fixture(scope="session")
def roomy_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, adapters: dict[str, Path]
) -> Iterator[ApiServer]:
    """A server for long prompts: the tiny base with more room, and adapters with chat templates of their own.

    Adapters `sql` and `event` as elsewhere; `hermes`, `coder` and `nested` bring the template of that form.
    """
    folder = tmp_path_factory.mktemp("roomy")
    shutil.copytree(tiny_base, folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    registry, base = AdapterRegistry(folder / "home"), resolve_base(folder / "base")
    for name, adapter in (("sql", "small"), ("event", "mlp")):
        registry.add(adapters[adapter], name, base=base)
    for name, adapter, template in (("hermes", "rs", HERMES), ("coder", "wide", CODER), ("nested", "partial", NESTED)):
        made = shutil.copytree(adapters[adapter], folder / name)
        (made / "chat_template.jinja").write_text(template)
        registry.add(made, name, base=base)
    with (
        InferenceEngine.from_base(folder / "base", registry=registry, device="cpu", max_rows=8) as engine,
        ApiServer(engine, registry, ServerSettings(port=0)) as server,
    ):
        yield server


@pytest.fixture
def roomy(roomy_server: ApiServer) -> Iterator[openai.OpenAI]:
    """The official client of the server for long prompts."""
    with open_client(roomy_server) as client:
        yield client


@pytest.fixture
def client(shared_server: ApiServer) -> Iterator[openai.OpenAI]:
    """The official client of the server that all share."""
    with open_client(shared_server) as client:
        yield client

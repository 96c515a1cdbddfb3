"""What the server's tests share: a registry with two tasks, one server for those who only ask, others on order."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings

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


@pytest.fixture
def client(shared_server: ApiServer) -> Iterator[openai.OpenAI]:
    """The official client of the server that all share."""
    with open_client(shared_server) as client:
        yield client

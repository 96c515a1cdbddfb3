"""`ask`, of a running server: the answer that a client gets, in its form, and one sentence where there is none."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import openai
import pytest
from typer.testing import CliRunner

from adapterhub_lite.cli.main import build_app
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.evaluation import find_metric
from adapterhub_lite.serving.api.auth import KeyFile, KeyRing
from adapterhub_lite.serving.api.server import ApiServer
from tests.serving.api.test_api_tools import SCHEMA

KEYS = KeyRing(KeyFile(keys={"sk-sql": ("sql",)}))


def ask(*words: str) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(build_app(), ["ask", *words])
    return done.stdout, done.exception


def test_a_server_is_asked(
    serve: Callable[..., tuple[ApiServer, openai.OpenAI]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERHUB_API_KEY", "sk-sql")
    server, client = serve("sk-sql", keys=KEYS)
    there = ("--url", server.url, "--max-new-tokens", "200")
    (tmp_path / "row.json").write_text(json.dumps(SCHEMA))
    told = json.loads(ask("sql", "x", *there, "--schema", str(tmp_path / "row.json"), "--json")[0])
    jsonschema.validate(json.loads(told["text"]), SCHEMA)
    assert told["adapter"] == "sql:2" and told["finish_reason"] == "stop"
    assert find_metric("valid_json")("", told["text"]) == 1 and find_metric("valid_json")("", "{") == 0  # type: ignore[misc]
    for raw in (("--raw",), ()):
        said, _ = ask("sql@prod", "How many?", "--url", f"{server.url}/v1", "--max-new-tokens", "8", *raw)
        asked = {"model": "sql@prod", "max_tokens": 8, "temperature": 0}
        if raw:
            text = client.completions.create(prompt="How many?", **asked).choices[0].text  # type: ignore[call-overload]
        else:
            turns = [{"role": "user", "content": "How many?"}]
            text = client.chat.completions.create(messages=turns, **asked).choices[0].message.content  # type: ignore[call-overload]
        assert said == f"{text}\n"
    for words, reason in (
        (("event", "x", *there), "may not use"),
        (("sql", "x", "--url", "http://127.0.0.1:1"), "could not be asked"),
        (("sql", "x", "--url", "ftp://x"), "wanted http"),
        (("sql", "x", "--schema", str(tmp_path / "none.json")), "could not be read"),
        (("sql", "x", "--schema", str(tmp_path / "row.json"), "--choice", "a"), "given twice"),
    ):
        said, error = ask(*words)
        assert isinstance(error, ConfigurationError) and reason in str(error) and not said

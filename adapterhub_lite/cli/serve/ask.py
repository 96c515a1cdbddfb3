"""`ask`: one answer of an adapter, here or by a running server."""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, say
from adapterhub_lite.errors import ConfigurationError

Piece = str | dict[str, Any]  # some of the answer, or at its end the receipt
KEY = "ADAPTERHUB_API_KEY"
BASE = "base"
SECONDS = 600.0


@dataclass(frozen=True)
class Question:
    """What is asked, and how. `raw` None: as the adapter was trained; `form` as GenerationRequest takes it."""

    reference: str
    text: str
    system: str | None
    raw: bool | None
    tokens: int
    options: dict[str, Any]
    form: dict[str, Any]

    @property
    def turns(self) -> list[dict[str, str]]:
        """The question as a chat."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": self.text}]


def ask(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest; `base` for none.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema that the answer has to follow.")
    ] = None,
    choice: Annotated[list[str] | None, typer.Option(help="One of the answers that may be given; repeat it.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--chat", help="Ask with the text as it is, or as a chat; if not given, as it was trained."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a temperature above 0 repeatable.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    url: Annotated[
        str | None, typer.Option(help=f"A running server instead, such as http://127.0.0.1:8000; its key is in ${KEY}.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask an adapter one thing; the answer appears as it is made.

    Example: `adapterhub-lite ask sql@prod "How many users are there?" --schema row.json`
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    form: dict[str, Any] = {"schema": _read_schema(schema)} if schema is not None else {}
    form |= {"choices": tuple(choice)} if choice else {}
    if len(form) > 1:
        raise ConfigurationError("The answer's form is given twice: give --schema or --choice.")
    if system is not None and raw:
        raise ConfigurationError("--system is a message of a chat; with --raw put it into the prompt.")
    question = Question(reference, text, system, raw, max_new_tokens, {"temperature": temperature, "seed": seed}, form)
    pieces = _here(question, base, home) if url is None else _there(question, url)
    told: list[str] = []
    receipt: dict[str, Any] = {}
    for piece in pieces:
        if isinstance(piece, dict):
            receipt = piece
            continue
        told.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        return print_json({"text": "".join(told), **receipt})
    typer.echo()
    say(f"({receipt.get('adapter') or BASE}, {receipt.get('finish_reason')})")


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--schema {path} could not be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"--schema {path} is not a JSON schema: expected an object.")
    return found


def _here(question: Question, base: str, home: str | None) -> Iterator[Piece]:
    """The answer of an engine started for it."""
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving import GenerationRequest, InferenceEngine

    registry = AdapterRegistry(home)
    adapter = None if question.reference == BASE else question.reference
    raw = question.raw
    if adapter is not None and raw is None and question.system is None:
        training = registry.resolve(adapter).training
        raw = training is not None and training.text is not None and training.text.of_chats is False
    source: dict[str, Any] = {"prompt": question.text} if raw else {"messages": question.turns}
    request = GenerationRequest(
        adapter=adapter, max_new_tokens=question.tokens, **source, **question.options, **question.form
    )
    with InferenceEngine.from_base(base, registry=registry, home=home, max_rows=1) as engine:
        for chunk in engine.stream(request):
            if chunk.text:
                yield chunk.text
            if chunk.result is not None:
                receipt = {key: getattr(chunk.result, key) for key in ("adapter", "adapter_digest", "base_fingerprint")}
                yield {**receipt, "finish_reason": chunk.result.finish_reason}


def _there(question: Question, url: str) -> Iterator[Piece]:
    """The answer of a running server."""
    body: dict[str, Any] = {
        "model": question.reference,
        "max_tokens": question.tokens,
        "stream": True,
        **question.options,
    }
    body |= {"prompt": question.text} if question.raw else {"messages": question.turns}
    if question.form:
        kinds = {"schema": "json", "choices": "choice"}
        body["structured_outputs"] = {kinds[kind]: value for kind, value in question.form.items()}
    route = "completions" if question.raw else "chat/completions"
    for event in _events(f"{url.rstrip('/').removesuffix('/v1')}/v1/{route}", body):
        if "error" in event:
            raise ConfigurationError(f"{url} answered: {event['error']['message']}")
        for choice in event["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if text:
                yield str(text)
            if choice["finish_reason"]:
                yield {**event["receipt"], "finish_reason": choice["finish_reason"]}


def _events(address: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a server sends as its answer to a request, event by event; an error is one too."""
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url is {address!r}: wanted http://HOST:PORT, as `serve` prints it.")
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
    asked = urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310 - http or https
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:  # noqa: S310
            for line in answer:
                told = line.decode().strip().removeprefix("data: ")
                if told and told != "[DONE]":
                    yield json.loads(told)
    except urllib.error.HTTPError as error:
        try:
            yield json.loads(error.read())
        except ValueError:
            raise ConfigurationError(f"{address} answered {error.code}; is it a server of adapterhub-lite?") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{address} could not be asked ({error}). Start a server with `serve`.") from error

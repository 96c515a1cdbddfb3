"""What people see of a data set, and what one caller may cost the others."""

import socket
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.hub_server import Account, HubServer
from adapterhub_lite.hub_server.page import ROWS_BYTES, ROWS_SUFFIXES, columns_of


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("train.jsonl", b'{"prompt": "2+2?", "completion": 4}\n{"prompt": "3+3?", "completion": null}\n'),
        ("train.json", b'[{"prompt": "2+2?", "completion": 4}, {"prompt": "x", "completion": null}]'),
        ("train.csv", b"\xef\xbb\xbfprompt;completion\n2+2?;4\n"),
        ("train.tsv", b"prompt\tcompletion\n2+2?\t4\n"),
    ],
)
def test_the_page_of_a_data_set_shows_its_columns(path: str, content: bytes, api: HfApi, hub_server: HubServer) -> None:
    api.create_repo("org/sums", repo_type="dataset")
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="org/sums", repo_type="dataset")
    page = httpx.get(f"{hub_server.url}/datasets/org/sums").text
    assert "<td>prompt</td><td>text</td><td>2+2?</td>" in page
    assert "<td>completion</td>" in page and f"beginning of {path}" in page


def test_what_a_row_holds_is_text_on_the_page(api: HfApi, hub_server: HubServer) -> None:
    api.create_repo("org/bad", repo_type="dataset")
    row = b'{"<script>alert(1)</script>": "<img src=x onerror=alert(2)>"}\n'
    api.upload_file(path_or_fileobj=row, path_in_repo="a.jsonl", repo_id="org/bad", repo_type="dataset")
    page = httpx.get(f"{hub_server.url}/datasets/org/bad").text
    assert "<script>alert" not in page and "<img" not in page and "&lt;img" in page


@given(st.sampled_from(ROWS_SUFFIXES), st.binary(max_size=300) | st.text(max_size=300).map(str.encode), st.booleans())
def test_any_bytes_give_columns_or_none(suffix: str, content: bytes, whole: bool) -> None:
    assert isinstance(columns_of(f"x{suffix}", content, whole=whole), dict)


def test_a_row_that_the_beginning_cuts_is_left_out() -> None:
    line = b'{"a": "' + b"x" * 1000 + b'"}\n'
    assert columns_of("x.jsonl", (line * 200)[:ROWS_BYTES], whole=False)["a"][0] == "text"
    assert columns_of("x.jsonl", b'{"a": [1, {"b": ' + b"[" * 60_000, whole=True) == {}


def test_an_account_that_asks_too_much_waits_and_the_others_do_not(tmp_path: Path) -> None:
    tokens = {"hf_ann": Account("ann"), "hf_bob": Account("bob")}
    with HubServer(tmp_path / "hub", tokens=tokens, requests_per_minute=5) as hub:
        ann, bob = (HfApi(endpoint=hub.url, token=token) for token in tokens)
        with pytest.raises(HfHubHTTPError) as refused:
            for _ in range(10):
                ann.whoami()
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert bob.whoami()["name"] == "bob"


def test_headers_without_end_are_not_read(hub_server: HubServer) -> None:
    host, port = hub_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n")
        answer = b""
        try:
            for _ in range(1000):
                connection.sendall(b"x-filler: " + b"a" * 1000 + b"\r\n")
            answer = connection.recv(1000)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))

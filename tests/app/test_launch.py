"""Starting: the port, the doors that stay shut, and what the browser is told to refuse."""

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from adapterhub_app.access import Access, Login
from adapterhub_app.launch import DEFAULT_PORT, free_port, main
from adapterhub_app.training import MOST_FILE_BYTES
from adapterhub_lite.errors import ResourceError
from tests.app.world import Serve, World


def test_a_port_in_use_is_said_and_the_next_free_one_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="in use"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", None) >= DEFAULT_PORT


def test_answers_forbid_other_origins_and_files_stay_closed(
    serve: Serve, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve().url
    assert url in capsys.readouterr().out
    with urllib.request.urlopen(url, timeout=30) as answer:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "connect-src 'self';" in policy and "http" not in policy
    for path in (Path(__file__).resolve(), world.home / "registry.db"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}gradio_api/file={path}", timeout=30)
        assert refused.value.code in (403, 404)
        refused.value.close()


def test_the_page_says_what_it_is_before_any_script_has_drawn_it(serve: Serve) -> None:
    """And nothing else that is served is changed, and its length is right."""
    url = serve().url
    answer = httpx.get(url)
    assert answer.text.count('<div id="opening"') == 1 and answer.text.index("opening") < answer.text.index(
        "<gradio-app"
    )
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "opening" not in httpx.get(f"{url}theme.css").text and httpx.get(f"{url}config").json()["title"]
    assert httpx.head(url).status_code == 200


def test_pages_of_others_and_files_find_no_door(serve: Serve) -> None:
    url = serve().url
    foreign = {"Origin": "https://evil.example"}
    for headers, path, method, status in (
        ({"Host": "rebound.example"}, "", "GET", 421), (foreign, "gradio_api/queue/join", "POST", 403),
        (foreign, "", "GET", 403), (foreign, "gradio_api/upload", "POST", 403),
    ):  # fmt: skip
        answer = httpx.request(method, url + path, headers=headers, files={"files": b"x"} if method == "POST" else None)
        assert answer.status_code == status, (path, headers)
        assert "access-control-allow-origin" not in answer.headers
    framed = httpx.get(url).headers
    assert framed["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in framed["content-security-policy"]


def test_files_are_taken_from_admins_only_and_only_so_large(serve: Serve, tmp_path: Path) -> None:
    logins = {
        "ana": Login(password=SecretStr("long enough"), role="admin"),
        "bo": Login(password=SecretStr("long enough")),
    }
    for access, name, status in (
        (Access(), None, 200), (Access(open_role="viewer"), None, 403),
        (Access(logins), None, 403), (Access(logins), "bo", 403), (Access(logins), "ana", 200),
    ):  # fmt: skip
        with httpx.Client(base_url=serve(access=access).url) as client:
            if name:
                assert client.post("login", data={"username": name, "password": "long enough"}).status_code == 200
            answer = client.post("gradio_api/upload", files={"files": ("rows.csv", b"question,answer")})
            assert answer.status_code == status, (access, name)
            if access.has_login or access.open_role == "admin":
                continue
            for path in ("upload", "gradio_api/upload_progress?upload_id=1"):
                assert client.post(path).status_code == 403
    with httpx.Client(base_url=serve().url) as client:
        large = client.post("gradio_api/upload", files={"files": ("rows.csv", bytes(MOST_FILE_BYTES + 1))})
        assert large.status_code == 413


def test_nobody_elses_machine_reaches_a_page_without_logins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--host", "0.0.0.0"])
    assert ended.value.code == 2
    assert "--users" in capsys.readouterr().err


def test_a_users_mistake_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--base", str(tmp_path / "none"), "--port", "0"])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_with_an_app_of_somebodys_own_is_no_hindrance(tmp_path: Path) -> None:
    """A user's app.py is on the path first when a module is run from its folder; it must never be imported."""
    (tmp_path / "app.py").write_text("raise SystemExit('somebody else is the app')\n")
    for module in (("adapterhub_lite", "demo"), ("adapterhub_app",)):
        command = [sys.executable, "-m", *module, "--base", str(tmp_path / "none"), "--port", "0"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "somebody else" not in done.stderr
        assert "There is no base" in done.stderr and "Traceback" not in done.stderr

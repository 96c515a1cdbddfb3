"""The Space's start: viewers unless there are logins, and the adapters it was told of."""

from pathlib import Path
from typing import Any

import yaml

from adapterhub_app import space
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.app.world import World


def test_a_public_page_without_logins_is_for_looking() -> None:
    assert space.read_access(None).role_of(None) == "viewer"
    access = space.read_access('{"ana": {"password": "long enough", "role": "admin"}}')
    assert access.role_of("ana") == "admin" and access.role_of(None) == "viewer"


def test_it_pulls_what_it_is_told(world: World, tmp_path: Path, home: Path, monkeypatch: Any) -> None:
    with HubServer(tmp_path / "hub") as hub:
        world.registry.push("event", "me/event", endpoint=hub.url)
        registry = AdapterRegistry(home)
        pull = registry.pull
        monkeypatch.setattr(registry, "pull", lambda repo, **more: pull(repo, endpoint=hub.url, **more))
        assert space.pull_all(registry, " me/event, ") == ["event:1"]


def test_its_header_names_the_file_to_start() -> None:
    folder = Path(space.__file__).parents[1]
    header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and (folder / header["app_file"]).is_file()

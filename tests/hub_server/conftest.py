"""The hub fixture that users get too, and a client for it."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from tests.xet import need_xet


@pytest.fixture
def api(hub_server: HubServer) -> HfApi:  # noqa: F811
    return HfApi(endpoint=hub_server.url, token=False)


@pytest.fixture(params=["lfs", "xet"])
def transfer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test once over classic LFS and once over Xet."""
    if request.param == "xet":
        need_xet()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return str(request.param)


@pytest.fixture
def some_folder(tmp_path: Path) -> Path:
    """A model-like folder: a large file, a card, an awkward name, an empty file."""
    folder = tmp_path / "some folder"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8000)
    (folder / "README.md").write_text(
        "---\nbase_model: org/base\nbase_model_relation: adapter\ntags: [sql]\n---\n# Hi\n"
    )
    (folder / "sub dir" / "ü #1.txt").write_text("é")
    (folder / "empty.txt").touch()
    return folder

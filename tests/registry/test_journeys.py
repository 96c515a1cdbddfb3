"""How many files a reader has to open to follow `add`, `push` and `pull` from the first line to the last."""

from pathlib import Path

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.journeys import files_entered

# At most so many files of the package are entered, with everything warm.
MOST_FILES = {"add": 14, "push": 10, "pull": 16}


def test_add_push_and_pull_run_through_few_files(
    registry: AdapterRegistry,
    base: ResolvedBase,
    adapter: Path,
    other_adapter: Path,
    hub_server: HubServer,
    tmp_path: Path,
) -> None:
    repo, there = "org/sql", AdapterRegistry(tmp_path / "there")
    registry.add(adapter, "sql", base=base)
    registry.push("sql:1", repo, endpoint=hub_server.url)
    there.pull(repo, revision="v1", endpoint=hub_server.url, base=base)
    entered: dict[str, list[str]] = {}
    with files_entered() as entered["add"]:
        registry.add(other_adapter, "sql", base=base)
    with files_entered() as entered["push"]:
        registry.push("sql:2", repo, endpoint=hub_server.url)
    with files_entered() as entered["pull"]:
        there.pull(repo, revision="v2", endpoint=hub_server.url, base=base)
    for journey, files in entered.items():
        own = [file for file in files if not file.startswith("hub_server/")]  # the hub runs in this process
        assert own[0] == "registry/registry.py"
        assert len(own) <= MOST_FILES[journey], f"{journey} enters {own}"

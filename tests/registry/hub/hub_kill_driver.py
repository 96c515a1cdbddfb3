"""Kills a publishing and pulling process at random instants and looks at what it leaves. Run as a script; prints JSON.

    python hub_kill_driver.py HOME THERE HUB KILLS SEED

Each child pushes versions of `sql` in HOME, moves an alias on the hub and pulls into THERE. After each SIGKILL the hub
has to have every version at most once and whole, the registry in THERE nothing half-visible.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import read_manifest
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import HubRepo, push_alias, remote_aliases

REPO = "org/sql-lora"
ACTS_A_LIFE = 2


def work(home: Path, there: Path, hub: str, report: int, seed: int) -> None:
    """Act until killed, telling `done` after each act, one line each."""
    chance, registry, elsewhere = random.Random(seed), AdapterRegistry(home), AdapterRegistry(there)
    published: list[int] = []
    while True:
        act = chance.choice(["push", "pull", "alias"]) if published else "push"
        if act == "push":
            version = chance.choice(registry.list("sql")).version
            registry.push(f"sql:{version}", REPO, endpoint=hub)
            published.append(version)
        else:
            version = chance.choice(published)
            if act == "alias":
                push_alias(REPO, "prod", version, endpoint=hub)
            else:
                elsewhere.pull(REPO, revision=f"v{version}", endpoint=hub)
        os.write(report, f"{act} {version}\n".encode())


def kill_once(home: Path, there: Path, hub: str, seed: int, longest: float) -> list[str]:
    """Let a child work for a random while and kill it; its report."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(home, there, hub, writing, seed)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(random.Random(seed).uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself: one of its acts failed"
    content = b""
    while block := os.read(reading, 1 << 16):
        content += block
    os.close(reading)
    return content.decode().splitlines()


def wrong_on_hub(registry: AdapterRegistry, hub: str, reported: set[int], seen: set[tuple[int, str]]) -> list[str]:
    """What is not as it has to be on the hub, given the versions whose push was reported.

    `seen` gathers the tags that were found whole at their commits, which never change.
    """
    repo = HubRepo(REPO, endpoint=hub)
    titles = [commit.text.splitlines()[0] for commit in repo.log(repo.head())]
    tags = {int(tag[1:]): sha for tag, sha in repo.tags().items()}
    wrong = [
        f"{title} {titles.count(title)} times" for title in set(titles) if titles.count(title) > 1 and " v" in title
    ]
    wrong += [f"v{version} was reported and has no tag" for version in reported - set(tags)]
    for version, sha in set(tags.items()) - seen:
        files, manifest = repo.files(sha), registry.resolve(f"sql:{version}")
        found = read_manifest(repo.read(sha, "adapterhub.json", size=1 << 20))
        whole = all(name in files and files[name].size == file.size for name, file in manifest.files.items())
        if found == manifest and whole:
            seen.add((version, sha))
        else:
            wrong.append(f"v{version} is not what was pushed")
    wrong += [f"alias at v{version} without a tag" for version in remote_aliases(REPO, endpoint=hub).values()
              if version not in tags]  # fmt: skip
    return wrong


def main() -> None:
    home, there, hub = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    kills, seed = int(sys.argv[4]), int(sys.argv[5])
    registry, elsewhere = AdapterRegistry(home), AdapterRegistry(there)
    start = time.monotonic()
    registry.push("sql:1", REPO, endpoint=hub)
    elsewhere.pull(REPO, endpoint=hub)
    longest = ACTS_A_LIFE * (time.monotonic() - start)
    reported, wrong, acts = {1}, list[str](), 0
    seen: set[tuple[int, str]] = set()
    for index in range(kills):
        lines = kill_once(home, there, hub, seed + index, longest)
        acts += len(lines)
        reported |= {int(line.split()[1]) for line in lines if line.startswith("push")}
        found = [*wrong_on_hub(registry, hub, reported, seen), *elsewhere.examine().problems]
        wrong += [f"kill {index}: {problem}" for problem in found]
    for manifest in registry.list("sql"):
        registry.push(manifest.reference, REPO, endpoint=hub)
        if elsewhere.pull(REPO, revision=f"v{manifest.version}", endpoint=hub).manifest.published() != manifest:
            wrong.append(f"{manifest.reference} came as something else")
    wrong += wrong_on_hub(registry, hub, {manifest.version for manifest in registry.list("sql")}, set())
    print(json.dumps({"kills": kills, "acts": acts, "wrong": wrong}))


if __name__ == "__main__":
    main()

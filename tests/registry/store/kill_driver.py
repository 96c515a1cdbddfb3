"""Kills a working process at random instants and looks at what it leaves. Run as a script; prints JSON.

    python kill_driver.py HOME PARCEL ADAPTERS BASE KILLS SEED

Each child adds, moves aliases, takes in a parcel, removes and collects, and reports an act once it has returned. After
each SIGKILL a fresh look at the home has to find: everything reported, nothing of what was not begun, no problem.
No torch here, so that a fork is cheap and safe.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.intake import import_adapter

# How many acts a child lives through on the average, twice over: the instants fall into all kinds of them.
ACTS_A_LIFE = 4
# A child dies in an act about as often as the act takes long; the quick one is done more often, to be hit as well.
ACTS = ["add", *["alias"] * 6, "pull", "gc", "remove"]


def variant(chance: random.Random, adapters: list[Path], scratch: Path) -> Path:
    """An adapter that shares no configuration with any other, so that a collection has something to free."""
    folder = scratch / f"variant-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    for path in chance.choice(adapters).iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copyfile(path, folder / path.name)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": chance.uniform(1, 100)}))
    return folder


def work(
    registry: AdapterRegistry, adapters: list[Path], parcel: Path, base: ResolvedBase, report: int, seed: int
) -> None:
    """Act until killed, telling `begin` before and `done` after each act, one line each."""
    chance = random.Random(seed)

    def tell(*words: object) -> None:
        os.write(report, (" ".join(map(str, words)) + "\n").encode())

    while True:
        act = chance.choice(ACTS)
        versions = [line.version for line in registry.summaries("sql")]
        if act == "add" or not versions:
            tell("begin", "add")
            manifest = registry.add(variant(chance, adapters, parcel.parent), "sql", base=base)
            tell("done", "add", manifest.version, manifest.digest)
        elif act == "alias":
            version = chance.choice(versions)
            tell("begin", "alias", version)
            registry.set_alias("sql", "prod", version=version)
            tell("done", "alias", version)
        elif act == "pull":
            name = f"pulled-{chance.randrange(10**9)}"
            tell("begin", "pull", name)
            tell("done", "pull", name, import_adapter(registry.store, parcel, name=name, base=base).digest)
        elif act == "remove":
            version = chance.choice(versions)
            tell("begin", "remove", version)
            try:
                registry.remove(f"sql:{version}")
            except RegistryError:
                continue
            tell("done", "remove", version)
        else:
            tell("begin", "gc")
            tell("done", "gc", *registry.gc(keep_newest=3).versions)


class Expectation:
    """What must be there, from what was reported; an act that began and did not report may or may not have happened."""

    def __init__(self) -> None:
        self.present: dict[str, str] = {}
        self.alias: int | None = None

    def account(self, lines: list[str], registry: AdapterRegistry) -> list[str]:
        """Take in a dead child's report and compare with the registry; returns what is wrong."""
        pending: list[str] = []
        for line in lines:
            state, act, *rest = line.split(" ")
            if state == "begin":
                pending = [act, *rest]
                continue
            pending = []
            self._apply(act, rest)
        return self._compare(registry, pending)

    def _apply(self, act: str, rest: list[str]) -> None:
        if act == "add":
            self.present[f"sql:{rest[0]}"] = rest[1]
        elif act == "pull":
            self.present[f"{rest[0]}:1"] = rest[1]
        elif act == "alias":
            self.alias = int(rest[0])
        elif act == "remove":
            self.present.pop(f"sql:{rest[0]}", None)
        else:
            for reference in rest:
                self.present.pop(reference, None)

    def _compare(self, registry: AdapterRegistry, pending: list[str]) -> list[str]:
        found = {m.reference: m.digest for m in registry.list()}
        act = pending[0] if pending else ""
        lost = {reference for reference in self.present if found.get(reference) != self.present[reference]}
        new = set(found) - set(self.present)
        may_lose = lost if act == "gc" else {f"sql:{pending[1]}"} if act == "remove" else set()
        may_gain = new if act in ("add", "pull") and len(new) == 1 else set()
        wrong = [f"lost {reference}" for reference in lost - may_lose]
        wrong += [f"appeared {reference}" for reference in new - may_gain]
        alias = registry.aliases("sql").get("prod")
        if alias != self.alias and not (act == "alias" and alias == int(pending[1])):
            wrong.append(f"alias at {alias}, reported {self.alias}, while {pending}")
        self.present, self.alias = found, alias
        report = registry.examine()
        return wrong + list(report.problems)


def warm_up(registry: AdapterRegistry, adapters: list[Path], parcel: Path, base: ResolvedBase) -> float:
    """Act before any child does, so that none starts with imports; returns the seconds that an act takes then."""
    for _ in range(2):
        start = time.monotonic()
        for adapter in adapters:
            version = registry.add(adapter, "sql", base=base).version
        registry.set_alias("sql", "prod", version=version)
        import_adapter(registry.store, parcel, base=base, name="sql")
        registry.gc(keep_newest=3)
    return (time.monotonic() - start) / (len(adapters) + 3)


def kill_once(
    home: Path, adapters: list[Path], parcel: Path, base: ResolvedBase, seed: int, longest: float
) -> tuple[list[str], float]:
    """Let a child work for a random while, kill it, return its report and how long it lived (seconds)."""
    reading, writing = os.pipe()
    life = random.Random(seed).uniform(0, longest)
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(AdapterRegistry(home), adapters, parcel, base, writing, seed)
        finally:
            os._exit(1)
    os.close(writing)
    first = os.read(reading, 1)  # it has begun
    time.sleep(life)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself: one of its acts failed"
    content = first
    while block := os.read(reading, 1 << 16):
        content += block
    os.close(reading)
    return content.decode().splitlines(), life


def main() -> None:
    home, parcel, adapters_folder, base_folder = (Path(argument) for argument in sys.argv[1:5])
    kills, seed = int(sys.argv[5]), int(sys.argv[6])
    base = ResolvedBase("tiny", "tiny", base_folder)
    assert base.fingerprint  # computed once, here
    adapters = sorted(adapters_folder.iterdir())
    longest = 2 * ACTS_A_LIFE * warm_up(AdapterRegistry(home), adapters, parcel, base)
    expectation = Expectation()
    expectation.present = {m.reference: m.digest for m in AdapterRegistry(home).list()}
    expectation.alias = AdapterRegistry(home).aliases("sql")["prod"]
    wrong: list[str] = []
    interrupted: dict[str, int] = {}
    acts = 0
    for index in range(kills):
        lines, life = kill_once(home, adapters, parcel, base, seed + index, longest)
        acts += sum(line.startswith("done") for line in lines)
        last = lines[-1].split(" ")
        if last[0] == "begin":
            interrupted[last[1]] = interrupted.get(last[1], 0) + 1
        wrong += [f"kill {index} after {life:.3f} s: {w}" for w in expectation.account(lines, AdapterRegistry(home))]
    registry = AdapterRegistry(home)
    # First swept: a manifest that was written and not committed is whole, and a rebuild would take it in.
    registry.gc(keep_newest=10**6)
    before = registry.list()
    registry.rebuild()
    wrong += [] if registry.list() == before else ["a rebuild gives something else"]
    report = registry.examine()
    wrong += [*report.problems, *report.notes]
    print(json.dumps({"kills": kills, "acts": acts, "interrupted": interrupted, "wrong": wrong}))


if __name__ == "__main__":
    main()

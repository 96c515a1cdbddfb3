"""Every verb alike: help with an example, success, the keys of its JSON, one sentence for a mistake, and a dry run."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapterhub_lite.cli.main import VERBS
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.cli.outcome import Run
from tests.fixture_types import MakeAdapter

# They run until they are stopped: tests/cli/test_sharing.py and tests/serving/api start them as processes.
RUN_ON = {"serve", "demo", "hub"}


@dataclass(frozen=True)
class Case:
    """What is typed after the verb; `{...}` is a place of the stage below. `mistake` has to end with exit code 2."""

    works: str
    keys: str
    mistake: str
    says: str
    first: tuple[str, ...] = field(default=())
    dry: bool = True


CASES = {
    "plan": Case("{base} --device-memory 4GiB", "preset predicted rejected", "nowhere", "nowhere", dry=False),
    "preview": Case(
        "{rows} --base {base} --rows 1", "rows examples longest learned refusals template", "nowhere.csv", "nowhere.csv", dry=False
    ),
    "train": Case(
        "own --data {rows} --base {base} --steps 1 --batch-size 2", "name version digest training", "own", "--data"
    ),
    "sweep": Case(
        "own --data {rows} --base {base} --steps 1 --batch-size 2 --validation-split 0.5 --ranges {ranges} --trials 2",
        "best trials", "own --data {rows} --base {base} --ranges {ranges}", "compares evaluations",
    ),
    "runs": Case(
        "", "run folder stage step steps settings scores", "compare one", "takes two runs",
        first=("train own --data {rows} --base {base} --steps 1 --batch-size 2",), dry=False,
    ),
    "eval": Case(
        "sql:1 --data {rows} --base {base} --max-new-tokens 2 --limit 2", "reference digest rows metrics recorded",
        "sql:1 --data {rows} --metric best", "There is no metric 'best'",
    ),
    "add": Case("{adapter} mine --base {base}", "name version digest lora", "nowhere mine --base {base}", "nowhere"),
    "list": Case("", "reference name version digest metrics", "--metric >=1", "Wanted a metric", dry=False),
    "show": Case("sql", "name version digest base lora here", "nothing", "nothing", dry=False),
    "diff": Case("sql:1 sql:2", "one other fields metrics layers", "sql:1 sql:9", "9", dry=False),
    "alias": Case("sql prod 2", "name aliases", "sql prod 9", "9"),
    "rollback": Case(
        "sql prod", "name alias version", "sql never", "never", first=("alias sql prod 1", "alias sql prod 2")
    ),
    "history": Case("sql", "alias act version previous at", "sql extra extra", "extra", ("alias sql prod 1",), dry=False),
    "pin": Case("sql:1", "reference digest pinned", "nothing", "nothing"),
    "unpin": Case("sql:1", "reference digest pinned", "nothing", "nothing", first=("pin sql:1",)),
    "remove": Case("sql:1", "removed", "sql", "name:3"),
    "gc": Case("--yes", "freed versions kept freed_bytes", "--keep-newest -1", "--keep-newest", dry=False),
    "backup": Case("{new}", "file versions bytes", "{base}", "is there already"),
    "restore": Case(
        "{new}.tar --home {new}", "home versions bytes", "{rows} --home {new}", "no backup", first=("backup {new}.tar",)
    ),
    "push": Case("sql:1 org/sql --endpoint {hub}", "repo_id tag commit uploaded aliases", "none org/sql", "none"),
    "pull": Case(
        "org/sql --name again --endpoint {hub}", "manifest commit source", "org/sql --locked", "--locked",
        first=("push sql:1 org/sql --endpoint {hub}",),
    ),
    "lock": Case("sql:1 --file {new} --base {base}", "adapters", "nothing --file {new}", "nothing"),
    "keygen": Case("--key k", "key public_key", "--key a/b", "a/b"),
    "sign": Case("sql:1 --key k", "reference digest public_key", "nothing", "nothing", first=("keygen --key k",)),
    "verify": Case(
        "sql:1", "reference digest signer", "sql:2", "not signed", first=("keygen", "sign sql:1"), dry=False
    ),
    "trust": Case("a " + "ab" * 32, "keys required", "a abc", "64 hex digits"),
    "merge": Case("sql:1 sql:2 --base {base}", "manifest relative_error", "sql:1 --weights x", "--weights"),
    "export": Case("sql:1 {new}", "references layout written", "sql:1 {new} --layout tar", "tar"),
    "ask": Case(
        "sql:1 hi --base {base} --max-new-tokens 2", "text adapter adapter_digest base_fingerprint finish_reason",
        "nothing hi --base {base}", "nothing", dry=False,
    ),
    "doctor": Case("", "machine registry rebuilt", "--nothing", "nothing", dry=False),
    "bench": Case("", "name question", "nothing", "There is no bench 'nothing'"),
}  # fmt: skip


@pytest.fixture
def stage(
    stocked: AdapterRegistry, tiny_base: Path, make_adapter: MakeAdapter, hub_server: HubServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], list[str]]:  # fmt: skip
    """Fill the places of a case: a base, rows, an adapter folder, a hub, a path that is not there yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(4)))
    (tmp_path / "ranges.yaml").write_text("rank: [2, 4]\nlearning_rate: {low: 1e-4, high: 1e-2, log: true}\n")
    places = {"ranges": tmp_path / "ranges.yaml", "base": tiny_base, "rows": rows, "adapter": make_adapter(seed=3), "hub": hub_server.url,
              "new": tmp_path / "new"}  # fmt: skip
    return lambda text: shlex.split(text.format(**places))


def test_every_verb_has_a_case() -> None:
    assert set(CASES) | RUN_ON == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(run: Run, verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.returncode == 0
    assert re.search(rf"Example: ?adapterhub-lite {verb}\b", " ".join(re.sub(r"[│`]", " ", shown.stdout).split()))
    assert "--json" in shown.stdout or verb in {"serve", "demo"}


@pytest.mark.parametrize("verb", CASES)
def test_success_has_the_keys_and_nothing_else_on_standard_output(
    verb: str, run: Run, stage: Callable[[str], list[str]]
) -> None:
    case = CASES[verb]
    for line in case.first:
        assert run(*stage(line)).returncode == 0
    done = run(verb, *stage(case.works), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if isinstance(found, list):
        found = found[0]
    assert set(case.keys.split()) <= set(found)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("verb", ["train", "sweep --ranges {ranges} --trials 2"])
def test_an_example_task_takes_the_place_of_a_file(
    verb: str, dry_run: bool, run: Run, stage: Callable[[str], list[str]]
) -> None:
    line = f"{verb} own --task sql --base {{base}} --steps 1 --batch-size 4 --validation-split 0.5"
    done = run(*stage(line), *(["--dry-run"] if dry_run else []))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", CASES)
def test_a_mistake_is_one_sentence_and_exit_code_2(verb: str, run: Run, stage: Callable[[str], list[str]]) -> None:
    done = run(verb, *stage(CASES[verb].mistake))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert CASES[verb].says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    if "Usage:" not in done.stderr:  # what Typer finds itself is framed
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: ")


def _snapshot(home: Path) -> dict[str, bytes]:
    kept = {}
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.name.endswith((".lock", "-shm", "-wal")) and "hf" not in path.parts:
            kept[str(path.relative_to(home))] = path.read_bytes()
    return kept


@pytest.mark.parametrize("verb", [verb for verb, case in CASES.items() if case.dry])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    verb: str, run: Run, stage: Callable[[str], list[str]], stocked: AdapterRegistry, tmp_path: Path,
    hub_server: HubServer,
) -> None:  # fmt: skip
    case = CASES[verb]
    for line in case.first:
        run(*stage(line))
    works = "registry" if verb == "bench" else case.works
    requests, lists = len(hub_server.faults.log), run("list", "--json").stdout
    run(verb, *stage(works), "--dry-run", "--json")  # opens the database, which may make files of its own
    before = _snapshot(stocked.home)
    done = run(verb, *stage(works), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dry_run"] is True and found["would"]
    assert found["would"] in run(verb, *stage(works), "--dry-run").stderr
    assert _snapshot(stocked.home) == before
    assert run("list", "--json").stdout == lists
    assert len(hub_server.faults.log) == requests
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("serve --port 70000 --base {base}", "65535"),
        ("demo --port 70000", "65535"),
        ("demo --host 0.0.0.0", "--users"),
        ("hub --port 70000", "65535"),
        ("history nothing", "There is no adapter 'nothing'"),
    ],
)
def test_a_mistake_of_those_that_run_on_is_a_sentence_too(
    line: str, complaint: str, run: Run, stage: Callable[[str], list[str]]
) -> None:
    done = run(*stage(line))
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_an_empty_list_says_how_to_begin(run: Run) -> None:
    assert "adapterhub-lite train" in run("list").stderr
    assert run("list", "--json").stdout.strip() == "[]" and run("list", "--json").stderr == ""


def test_a_title_is_one_line(run: Run, stocked: AdapterRegistry) -> None:
    title = "rows of a data set with a long name, held-out"
    from adapterhub_lite.cli.output import print_table

    print_table(title, ("a",), [("b",)])
    assert title in run("list").stdout


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("remove sql:1", "alias prod"),
        ("remove sql", "name:3"),
        ("alias sql prod 2 --expect 2", "is at 1"),
        ("rollback sql prod", "no earlier version"),
        ("merge sql:1 sql:2 --weights 1", "1 weights"),
        ("merge sql:1 sql:2 --method best", "no merge method"),
        ("add {rows} mine", "no folder, no zip or tar archive"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    line: str, complaint: str, run: Run, stage: Callable[[str], list[str]]
) -> None:
    assert run("alias", "sql", "prod", "1").returncode == 0
    done = run(*stage(line), "--dry-run")
    assert done.returncode == 2 and complaint in done.stderr


def test_completion_is_offered_for_the_shells() -> None:
    command = str(Path(sys.executable).with_name("adapterhub-lite"))
    for shell in ("bash", "zsh", "fish"):
        environment = {"_ADAPTERHUB_LITE_COMPLETE": f"source_{shell}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run([command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "adapterhub-lite" in done.stdout, done.stderr
    environment = {
        "_ADAPTERHUB_LITE_COMPLETE": "complete_bash", "COMP_WORDS": "adapterhub-lite rol", "COMP_CWORD": "1",
        "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run([command], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["rollback"]


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals_only(terminal: bool, stocked: AdapterRegistry) -> None:
    import os
    import pty

    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    command = [Path(sys.executable).with_name("adapterhub-lite"), "list"]
    if not terminal:
        done = subprocess.run(command, capture_output=True, env=environment)
        assert b"\x1b[" not in done.stdout and b"sql:1" in done.stdout
        return
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm-256color"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0 and b"\x1b[1m" in shown
    os.close(ours)


def test_bench_says_where_the_benches_are(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adapterhub_lite.cli.machine.BENCHES", tmp_path / "none")
    done = run("bench")
    assert done.returncode == 2 and "checkout" in done.stderr


def test_bench_runs_one_and_names_what_it_wrote(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "scripts" / "bench"
    (folder / "results").mkdir(parents=True)
    (folder / "train").mkdir()
    for package in (folder.parent, folder, folder / "train"):
        (package / "__init__.py").touch()
    (folder / "train" / "sums.py").write_text(
        '"""How much is it?"""\nimport sys, pathlib\nif __name__ == "__main__":\n    print("working")\n'
        '    (pathlib.Path(__file__).parents[1] / "results" / "sums.json").write_text(sys.argv[1])\n'
        "    sys.exit(int(sys.argv[1]))\n"
    )
    monkeypatch.setattr("adapterhub_lite.cli.machine.ROOT", tmp_path)
    monkeypatch.setattr("adapterhub_lite.cli.machine.BENCHES", folder)
    assert json.loads(run("bench", "--json").stdout) == [{"name": "sums", "question": "How much is it?"}]
    for code in ("0", "3"):
        done = run("bench", "--json", "sums", "--", code)
        assert done.returncode == min(int(code), 1)
        found = json.loads(done.stdout)
        assert found["returncode"] == int(code) and found["written"] == [str(folder / "results" / "sums.json")]

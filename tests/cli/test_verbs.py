"""Each verb as a user runs it: a real process, its help, its JSON; a mistake is one sentence and exit code 2."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.cli.main import VERBS, build_app, main
from adapterhub_lite.registry import AdapterRegistry


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: exit code and the two streams."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The real entry point, in this process: `run("list", "--json")`."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["adapterhub-lite", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def stocked(home: Path, make_adapter: Any, tiny_base: Path) -> AdapterRegistry:
    from adapterhub_lite.bases import resolve_base

    registry = AdapterRegistry(home)
    for seed in (1, 2):
        registry.add(make_adapter(seed=seed), "sql", base=resolve_base(tiny_base))
    return registry


def test_every_verb_has_help_with_an_example() -> None:
    from typer.testing import CliRunner

    for verb in VERBS:
        outcome = CliRunner().invoke(build_app(), [verb, "--help"])
        assert outcome.exit_code == 0
        assert f"adapterhub-lite {verb}" in " ".join(outcome.output.split())


def test_list_show_alias_and_rollback(stocked: AdapterRegistry, run: Run) -> None:
    assert {row["version"] for row in json.loads(run("list", "--json").stdout)} == {1, 2}
    for version in ("1", "2"):
        assert run("alias", "sql", "prod", version).returncode == 0
    assert json.loads(run("alias", "sql", "--json").stdout)["aliases"] == {"prod": 2}
    assert json.loads(run("rollback", "sql", "prod", "--json").stdout)["version"] == 1
    shown = json.loads(run("show", "sql@prod", "--json").stdout)
    assert shown["digest"] == stocked.resolve("sql:1").digest
    assert "sql:1" in run("show", "sql@prod").stdout


def test_a_registry_verb_does_not_import_torch(stocked: AdapterRegistry) -> None:
    code = (
        "import sys; sys.argv = ['adapterhub-lite', 'list', '--json']\n"
        "from adapterhub_lite.cli.main import build_app; build_app()(standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=dict(os.environ)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("show", "nothing"), "nothing"),
        (("show", "a b"), "Wanted an adapter as"),
        (("alias", "sql", "prod"), "Which version"),
        (("train", "x", "--task", "sqll"), "Did you mean 'sql'?"),
        (("train", "x"), "Give either --data"),
        (("train", "x", "--task", "sql", "--steps", "0"), "steps is 0"),
        (("train", "x", "--task", "sql", "--base", "nowhere"), "There is no base 'nowhere'"),
        (("train", "../x", "--task", "sql"), "cannot name an adapter"),
        (("eval", "nothing", "--task", "sql"), "nothing"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    outcome = run(*arguments)
    assert outcome.returncode == 2, outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert complaint in last
    assert "Traceback" not in outcome.stderr


def test_train_then_eval_on_a_file_of_ones_own(tiny_base: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"prompt": f"{n} plus {n}?", "completion": str(2 * n)} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", str(data), "--base", str(tiny_base))
    trained = run("train", "double", *options, "--steps", "2", "--batch-size", "4", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["training"]["steps"] == 2
    scored = run("eval", "double", *options, "--max-new-tokens", "4", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["rows"] == 12


def test_a_bad_row_names_file_and_line(tiny_base: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    outcome = run("train", "x", "--data", str(data), "--base", str(tiny_base))
    assert outcome.returncode == 2
    assert "rows.jsonl" in outcome.stderr
    assert "line 2" in outcome.stderr


def test_a_plan_takes_real_rows_and_runs_dry(tiny_base: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "short"}\n' * 30 + json.dumps({"text": "long " * 100}) + "\n")
    options = (str(tiny_base), "--data", str(data), "--batch-size", "4", "--device-memory", "4GiB", "--json")
    found = run("plan", *options, "--exact")
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    # 501 tokens and three times 6, spread over four rows.
    assert plan["sequence_length"] == 130 and plan["batch_size"] == 4
    assert plan["exact_total"] == pytest.approx(plan["predicted"]["total"], rel=0.1)


def test_doctor_says_what_is_missing_and_how_to_get_it(run: Run) -> None:
    report = json.loads(run("doctor", "--json").stdout)
    presets = [row for row in report["machine"] if row["what"] == "memory presets"]
    assert "lora-bf16" in presets[0]["detail"] and any("zero2" in row["detail"] for row in presets[1:])
    assert report["registry"]["problems"] == []
    findings = {row["what"]: row for row in report["machine"]}
    assert {"GPU", "bitsandbytes", "chromium", "home folder"} <= set(findings)
    assert all(row["remedy"] for row in findings.values() if not row["works"])


def test_the_installed_command_starts_and_ends_as_a_process(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("adapterhub-lite")
    environment = {**os.environ, "ADAPTERHUB_HOME": str(tmp_path)}
    shown = subprocess.run([command, "list", "--json"], capture_output=True, text=True, env=environment)
    assert (shown.returncode, json.loads(shown.stdout)) == (0, [])
    refused = subprocess.run([command, "show", "nothing"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert refused.stderr.startswith("Error: ")


def test_merge_and_export(stocked: AdapterRegistry, run: Run, tiny_base: Path, tmp_path: Path) -> None:
    parents = ("merge", "sql:1", "sql:2", "--base", str(tiny_base))
    merged = run(*parents, "--weights", "0.7,0.3", "--name", "both", "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["relative_error"] < 1e-5
    written = run("export", "both", str(tmp_path / "both"))
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()
    for bad, complaint in (("--weights", "wanted numbers"), ("--method", "no merge method")):
        refused = run(*parents, bad, "nonsense")
        assert refused.returncode == 2
        assert complaint in refused.stderr

"""Each verb as a user runs it: a real process, its help, its JSON; a mistake is one sentence and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.cli.machine import examine_base
from adapterhub_lite.cli.main import VERBS, build_app
from adapterhub_lite.diagnosis import diagnose
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.weights import find_families
from tests.cli.outcome import Run
from tests.serving.model.families import build

# They run until they are stopped.
WITHOUT_JSON = {"serve", "demo"}


def test_every_verb_has_help_with_an_example() -> None:
    from typer.testing import CliRunner

    for verb in VERBS:
        outcome = CliRunner().invoke(build_app(), [verb, "--help"])
        assert outcome.exit_code == 0
        assert f"adapterhub-lite {verb}" in " ".join(outcome.output.split())
        assert "--json" in outcome.output or verb in WITHOUT_JSON


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
        (("train", "../x", "--task", "sql"), "Wanted a name of"),
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
    (able,) = (row for row in report["machine"] if row["what"] == "memory presets")
    unable = [row for row in report["machine"] if row["what"].startswith("presets ")]
    assert "lora-bf16" in able["detail"] and any("zero2" in row["what"] for row in unable)
    if not torch.cuda.is_available():
        (fsdp,) = (row for row in unable if "fsdp-qlora" in row["what"])
        assert "leaves FSDP out on a CPU" in fsdp["detail"] and "tests of FSDP" in fsdp["remedy"]
    assert report["registry"]["problems"] == []
    findings = {row["what"]: row for row in report["machine"]}
    assert {"GPU", "bitsandbytes", "chromium", "home folder"} <= set(findings)
    assert all(row["remedy"] for row in findings.values() if not row["works"])


def test_doctor_says_what_a_base_gets(run: Run, tiny_base: Path) -> None:
    done = run("doctor", "--base", str(tiny_base), "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["serving"].startswith("lean; ") and "GiB" in answers["training, 1 x 512 tokens"]
    assert answers["LoRA, served in one batch"] == "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert answers["served apart from others"].startswith("LoRA on lm_head and model.embed_tokens; DoRA")
    assert answers["training by all-linear"] == "yes"
    assert answers["tokens of an adapter's own"].startswith("yes; 13 in rows")
    assert "--untie" in answers["merging"] and answers["refused"].startswith("DoRA on an embedding")
    unknown = run("doctor", "--base", "nothing-like-it")
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr


def test_doctor_names_layers_as_target_modules_do(tmp_path: Path, byte_tokenizer: Any) -> None:
    """Also those of a list outside the layers, whose last name is a number that decoder layers have too."""
    base = build("gemma3n_text", tmp_path / "base", byte_tokenizer)
    answers = examine_base(str(base), tmp_path / "home")
    model = load_base_model(base)
    paths = {path for family in find_families(model) for path in family.paths}
    config = LoraConfig(target_modules=answers["LoRA, served in one batch"].split(", "), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    found = {name for name, module in adapted.named_modules() if hasattr(module, "base_layer")}
    assert {name.removeprefix("base_model.model.") for name in found} == paths


def test_the_installed_command_starts_and_ends_as_a_process(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("adapterhub-lite")
    environment = {**os.environ, "ADAPTERHUB_HOME": str(tmp_path)}
    shown = subprocess.run([command, "list", "--json"], capture_output=True, text=True, env=environment)
    assert (shown.returncode, json.loads(shown.stdout)) == (0, [])
    refused = subprocess.run([command, "show", "nothing"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert refused.stderr.startswith("Error: ")


def test_a_dry_run_counts_added_tokens(tiny_base: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{c}?", "completion": f"<{c}>"}) + "\n" for c in "abcd"))
    common = ("train", "x", "--data", str(data), "--base", str(tiny_base), "--memory-preset", "lora-fp32", "--dry-run")
    many = ",".join(f"<{number}>" for number in range(100))
    plain, added = (run(*common, "--json", *more) for more in ((), ("--added-tokens", many)))
    assert plain.returncode == added.returncode == 0, added.stderr
    grown = json.loads(added.stdout)["predicted_bytes"] - json.loads(plain.stdout)["predicted_bytes"]
    # 13 rows of the base are free; embedding and head are one matrix, of width 32.
    assert grown >= (100 - 13 + 100) * 32 * 4
    refused = run(*common, "--added-tokens", "<|im_end|>")
    assert refused.returncode == 2 and "has already" in refused.stderr and "Traceback" not in refused.stderr


def test_a_dry_run_of_train_touches_no_file(tiny_base: Path, tmp_path: Path, run: Run, home: Path) -> None:
    """Neither in the home, which is not even made, nor beside the base, nor where it was started."""
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns(".*"))
    rows.write_text('{"prompt": "2 + 2 = ", "completion": "4"}\n' * 4)
    there = tmp_path / "not-there-yet"

    def everything() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size) for root in (tmp_path, home, Path.cwd() / "runs")
            for path in root.rglob("*")
        }  # fmt: skip

    before = everything()
    for more in ((), ("--validation-split", "0.25"), ("--json",)):
        words = ("train", "sums", "--data", str(rows), "--base", str(base), "--steps", "2", "--home", str(there), *more)
        done = run(*words, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "Nothing was changed" in done.stderr or more == ("--json",)
        assert everything() == before and not there.exists()
    done = run("train", "sums", "--data", str(rows), "--steps", "2", "--home", str(there), "--dry-run")
    assert "Would fetch smollm2-135m, which is not here yet, then train sums" in done.stderr
    assert everything() == before and not there.exists(), "a base is fetched by a run, not by a rehearsal of one"


def test_an_empty_home_says_how_to_begin(run: Run, home: Path) -> None:
    shown = run("list")
    assert (
        shown.returncode == 0
        and "adapterhub-lite train sql --task sql" in shown.stderr
        and "reference" not in shown.stdout
    )
    assert json.loads(run("list", "--json").stdout) == []


def test_doctor_breaks_no_command_on_a_narrow_terminal(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("doctor").stdout.splitlines()
    for finding in diagnose(home):
        if finding.remedy:
            assert f"To get {finding.what}: {finding.remedy}" in lines


def test_a_misspelt_hub_id_is_told_from_a_missing_network(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub_lite.bases.resolve.LOOK_UP_SECONDS", 1.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = run("plan", "HuggingFaceTB/SmolLM2-135M-Instuct")
    assert shown.returncode == 2
    assert "check the spelling (HuggingFaceTB/SmolLM2-135M-Instruct is here as 'smollm2-135m')" in shown.stderr

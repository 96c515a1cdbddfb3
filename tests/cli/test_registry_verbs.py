"""The verbs that keep, compare, lock, sign and export: each does what it says, in tables and in JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from tests.cli.outcome import Run
from tests.fixture_types import MakeAdapter


def test_list_show_alias_rollback_and_history(stocked: AdapterRegistry, run: Run) -> None:
    assert {row["version"] for row in json.loads(run("list", "--json").stdout)} == {1, 2}
    for version in ("1", "2"):
        assert run("alias", "sql", "prod", version).returncode == 0
    assert json.loads(run("alias", "sql", "--json").stdout)["aliases"] == {"prod": 2}
    assert json.loads(run("rollback", "sql", "prod", "--json").stdout)["version"] == 1
    shown = json.loads(run("show", "sql@prod", "--json").stdout)
    assert shown["digest"] == stocked.resolve("sql:1").digest
    assert shown["here"]["aliases"] == ["prod"]
    assert "sql:1" in run("show", "sql@prod").stdout
    moves = json.loads(run("history", "sql", "--json").stdout)
    assert [(move["previous"], move["version"]) for move in moves] == [(None, 1), (1, 2), (2, 1)]
    assert "rollback" in run("history", "sql", "prod").stdout
    refused = run("alias", "sql", "prod", "2", "--expect", "2")
    assert refused.returncode == 2 and "somebody else moved it" in refused.stderr
    assert run("alias", "sql", "prod", "--remove").returncode == 0
    assert stocked.aliases("sql") == {}


def test_list_filters(home: Path, make_adapter: MakeAdapter, tiny_base: Path, run: Run) -> None:
    registry, base = AdapterRegistry(home), resolve_base(tiny_base)
    measured = [{"metric": "exact_match", "adapter_value": 0.9, "data": "held-out"}]
    registry.add(make_adapter(seed=1), "sql", base=base, task="sql", tags=("fast",), evaluation=measured)
    registry.add(make_adapter(seed=2), "event", base=base, task="event")

    def listed(*filters: str) -> list[str]:
        return [row["reference"] for row in json.loads(run("list", *filters, "--json").stdout)]

    assert listed() == ["event:1", "sql:1"]
    assert listed("sql") == listed("--task", "sql") == listed("--tag", "fast") == ["sql:1"]
    assert listed("--metric", "exact_match>=0.8") == ["sql:1"] and listed("--metric", "exact_match>0.95") == []
    assert listed("--base", base.fingerprint[:12]) == ["event:1", "sql:1"]
    table = run("list", "--task", "sql").stdout
    assert "exact_match 0.90" in table and "event:1" not in table
    assert "Wanted a metric" in run("list", "--metric", ">=1").stderr


def test_a_folder_of_plain_peft_is_added(run: Run, make_adapter: MakeAdapter, tiny_base: Path, home: Path) -> None:
    folder = str(make_adapter(seed=3))
    assert "Which base" in run("add", folder, "mine").stderr
    added = run("add", folder, "mine", "--base", str(tiny_base), "--tag", "a", "--tag", "b", "--probes", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["tags"] == ["a", "b"]
    checked = run("verify", "mine", "--probes", "--base", str(tiny_base), "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["max_abs_difference"] < 1e-3
    assert run("add", folder, "../mine", "--base", str(tiny_base)).returncode == 2


def test_a_schema_is_kept_with_what_is_added(
    run: Run, make_adapter: MakeAdapter, tiny_base: Path, home: Path, tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    file, where = tmp_path / "schema.json", ("--base", str(tiny_base), "--schema", str(tmp_path / "schema.json"))
    folder = str(make_adapter(seed=3))
    for text, reason in (("{", "not JSON"), ('{"not": {}}', "not"), ('{"type": "banana"}', "banana")):
        file.write_text(text)
        refused = run("add", folder, "people", *where)
        assert refused.returncode == 2 and reason in refused.stderr and "Traceback" not in refused.stderr
    file.write_text(json.dumps(schema))
    assert run("add", folder, "people", *where).returncode == 0
    assert AdapterRegistry(home).resolve("people").answer_schema == schema
    assert "JSON after the schema kept with it, with name." in run("show", "people").stdout
    assert json.loads(json.loads(run("show", "people", "--json").stdout)["answer_schema"]) == schema
    missing = run("add", folder, "people", "--base", str(tiny_base), "--schema", str(tmp_path / "none.json"))
    assert missing.returncode == 2 and "cannot be read" in missing.stderr


def test_pins_and_removal(stocked: AdapterRegistry, run: Run) -> None:
    assert json.loads(run("pin", "sql:1", "--json").stdout)["pinned"] is True
    refused = run("remove", "sql:1")
    assert refused.returncode == 2 and "pinned" in refused.stderr
    assert run("unpin", "sql:1").returncode == 0
    assert json.loads(run("remove", "sql:1", "--json").stdout) == {"removed": "sql:1"}
    assert [m.version for m in stocked.list()] == [2]
    assert "as 'name:3'" in run("remove", "sql").stderr


def test_gc_says_what_it_would_free_before_it_does(stocked: AdapterRegistry, run: Run) -> None:
    planned = json.loads(run("gc", "--dry-run", "--json").stdout)
    assert (planned["freed"], planned["versions"], planned["kept"]) == (
        False,
        ["sql:1"],
        {"sql:2": "among the newest 1"},
    )
    shown = run("gc", "--dry-run")
    assert "sql:1" in shown.stdout and "1 versions" in shown.stderr
    refused = run("gc")  # nobody is there to be asked
    assert refused.returncode == 2 and "--yes" in refused.stderr
    assert "sql:1" in refused.stdout, "said before anything is asked"
    assert len(stocked.list()) == 2
    freed = json.loads(run("gc", "--yes", "--json").stdout)
    assert freed["freed"] and freed["versions"] == ["sql:1"] and freed["freed_bytes"] == planned["freed_bytes"]
    assert [m.version for m in stocked.list()] == [2]
    assert json.loads(run("gc", "--yes", "--json").stdout)["freed"] is False


def test_gc_asks_a_person(stocked: AdapterRegistry) -> None:
    command = [Path(sys.executable).with_name("adapterhub-lite"), "gc"]
    for answer, left in (("n", [1, 2]), ("y", [2])):
        ours, theirs = os.openpty()
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=dict(os.environ))
        os.close(ours)
        os.close(theirs)
        assert done.returncode == 0 and "Free it?" in done.stderr, done.stderr
        assert [manifest.version for manifest in stocked.list()] == left


HOLDER = "import sys; from adapterhub_lite.registry import AdapterRegistry; lease = AdapterRegistry().hold('sql:1');"


def test_gc_keeps_what_a_running_server_holds(stocked: AdapterRegistry, run: Run) -> None:
    code = HOLDER + "print('held', flush=True); sys.stdin.read()"
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "held\n"
    kept = json.loads(run("gc", "--yes", "--json").stdout)["kept"]
    assert kept["sql:1"] == "held by a running server or push"
    server.communicate("")
    assert json.loads(run("gc", "--yes", "--json").stdout)["versions"] == ["sql:1"]


def test_diff_goes_down_to_the_modules(stocked: AdapterRegistry, run: Run) -> None:
    found = json.loads(run("diff", "sql:1", "sql:2", "--json").stdout)
    assert found["same_base"] and len(found["layers"]) == 6
    assert all(0 <= layer["input_similarity"] < 1 for layer in found["layers"])
    same = json.loads(run("diff", "sql:1", "sql:1", "--json").stdout)
    assert all(layer["cosine"] == pytest.approx(1) for layer in same["layers"])
    shown = run("diff", "sql:1", "sql:2").stdout
    assert "q_proj" in shown and "input similarity" in shown
    assert json.loads(run("diff", "sql:1", "sql:2", "--no-layers", "--json").stdout)["layers"] == []


def test_keys_signatures_and_trust(stocked: AdapterRegistry, run: Run) -> None:
    public_key = json.loads(run("keygen", "--json").stdout)["public_key"]
    assert "give another name" in run("keygen").stderr
    assert "it is not signed" in run("verify", "sql:2").stderr
    signed = json.loads(run("sign", "sql:2", "--json").stdout)
    assert (signed["reference"], signed["public_key"]) == ("sql:2", public_key)
    assert json.loads(run("verify", "sql:2", "--json").stdout)["signer"] is None
    trusted = run("trust", "release", public_key, "--required", "--json")
    assert json.loads(trusted.stdout) == {"schema_version": 1, "required": True, "keys": {"release": public_key}}
    assert json.loads(run("verify", "sql:2", "--json").stdout)["signer"] == "release"
    assert "64 hex digits" in run("trust", "x", "abc").stderr
    assert run("trust", "release", "--remove", "--optional").returncode == 0
    assert stocked.trust.read().keys == {}


def test_a_lock_is_written_and_checked(stocked: AdapterRegistry, run: Run, tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapters.lock"
    base = ("--base", str(tiny_base), "--file", str(file))
    written = run("lock", "sql:1=org/sql", "sql:2", *base, "--json")
    assert written.returncode == 0, written.stderr
    locked = json.loads(file.read_text())["adapters"]
    assert [(one["version"], one["source"]) for one in locked] == [(1, "org/sql"), (2, "org/sql")]
    assert "tokenizer.json" in locked[0]["base"]["tokenizer"]
    assert run("lock", "--check", *base).returncode == 0
    stocked.remove("sql:1")
    broken = run("lock", "--check", *base, "--json")
    assert broken.returncode == 1
    assert "is not here" in json.loads(broken.stdout)["problems"][0]
    assert "at least one" in run("lock").stderr
    assert "There is no lock" in run("lock", "--check", "--file", str(tmp_path / "none")).stderr


def test_doctor_finds_damage_and_rebuilds_a_lost_database(stocked: AdapterRegistry, run: Run) -> None:
    stocked.set_alias("sql", "prod", version=1)
    stocked.close()
    (stocked.home / "registry.db").unlink()
    rebuilt = run("doctor", "--rebuild", "--json")
    assert rebuilt.returncode == 0, rebuilt.stderr
    found = json.loads(rebuilt.stdout)["rebuilt"]
    assert (found["versions"], found["aliases"], found["skipped"]) == (2, 1, [])
    assert stocked.resolve("sql@prod").version == 1
    stocked.file(stocked.resolve("sql:2"), "adapter_model.safetensors").unlink()
    broken = run("doctor", "--json")
    assert broken.returncode == 1
    assert "sql:2" in json.loads(broken.stdout)["registry"]["problems"][0]


CONVERTER = "import pathlib, sys\npathlib.Path(sys.argv[4]).write_bytes(b'GGUF')\n"


def test_merge_and_every_layout_of_an_export(
    stocked: AdapterRegistry, run: Run, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = ("merge", "sql:1", "sql:2", "--base", str(tiny_base))
    merged = run(*parents, "--weights", "0.7,0.3", "--name", "both", "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["relative_error"] < 1e-5
    for bad, complaint in (("--weights", "expected numbers"), ("--method", "no merge method")):
        refused = run(*parents, bad, "nonsense")
        assert refused.returncode == 2
        assert complaint in refused.stderr
    written = run("export", "both", str(tmp_path / "both"))
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()
    served = json.loads(run("export", "sql:2", "both", str(tmp_path / "loras"), "--layout", "vllm", "--json").stdout)
    assert [Path(path).name for path in served["written"]] == ["sql", "both"]
    gguf = ("export", "both", str(tmp_path / "both.gguf"), "--layout", "gguf", "--base", str(tiny_base))
    monkeypatch.delenv("LLAMA_CPP_CONVERTER", raising=False)
    assert "convert_lora_to_gguf.py" in run(*gguf).stderr
    (tmp_path / "convert.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP_CONVERTER", str(tmp_path / "convert.py"))
    assert run(*gguf).returncode == 0
    assert (tmp_path / "both.gguf").read_bytes() == b"GGUF"
    assert "no layout" in run("export", "both", str(tmp_path / "x"), "--layout", "zip").stderr
    assert "takes one adapter" in run("export", "both", "sql", str(tmp_path / "x")).stderr


def test_registry_verbs_load_no_torch(stocked: AdapterRegistry) -> None:
    verbs = [["list"], ["show", "sql"], ["pin", "sql:1"], ["history", "sql"], ["gc", "--dry-run"], ["lock", "sql"],
             ["diff", "sql:1", "sql:2", "--no-layers"], ["trust"], ["alias", "sql", "prod", "1"]]  # fmt: skip
    code = (
        "import sys; from adapterhub_lite.cli.main import build_app\n"
        f"for verb in {verbs!r}: build_app()([*verb, '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ),
                          cwd=stocked.home)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_show_speaks_in_sentences_and_json_has_everything(stocked: AdapterRegistry, run: Run) -> None:
    stocked.set_alias("sql", "prod", version=2)
    manifest = stocked.resolve("sql@prod")
    text = " ".join(run("show", "sql@prod").stdout.split())
    assert f"sql:2 is a LoRA adapter for {manifest.base.id}." in text
    assert f"changes {manifest.lora.modules_bound} of {manifest.lora.modules_total} modules with rank" in text
    assert "sql@prod keeps it from gc" in text and "is not signed" in text and manifest.digest in text
    assert "No alias, pin or server keeps it from gc" in " ".join(run("show", "sql:1").stdout.split())
    assert "{" not in text and "None" not in text and "use_dora" not in text, "no dump of a record"
    whole = json.loads(run("show", "sql@prod", "--json").stdout)
    here = whole.pop("here")
    assert whole == manifest.model_dump(mode="json") and here["aliases"] == ["prod"]

"""What docs/operations has is taken by the programs it is for, and names files, options and series that there are."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from adapterhub_lite.cli.main import build_app
from adapterhub_lite.serving.api.observe import Metrics
from tests.checkout import ROOT

FOLDER = ROOT / "docs" / "operations"
COMPOSE = ("compose.yml", "compose.vllm.yml")
SERIES = re.compile(r"adapterhub_\w+")


def known_series() -> set[str]:
    found = set()
    for family in Metrics().registry.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        found |= {family.name + ending for ending in endings}
    return found


def test_the_dashboard_asks_for_series_that_there_are_and_for_all_of_them() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in SERIES.findall(target["expr"])
    }
    assert asked <= known_series()
    families = {name.removesuffix("_total").removesuffix("_bucket") for name in asked}
    assert families == {family.name for family in Metrics().registry.collect()}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_alerts_ask_for_series_that_there_are() -> None:
    (group,) = yaml.safe_load((FOLDER / "adapterhub-rules.yml").read_text())["groups"]
    for rule in group["rules"]:
        names = set(SERIES.findall(rule["expr"]))
        assert names and names <= known_series(), rule
        assert rule["annotations"]["summary"]


def test_the_scrape_settings_point_at_the_rules_and_give_a_key() -> None:
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert job["authorization"]["credentials_file"] and job["static_configs"][0]["targets"]
    assert all((FOLDER / name).is_file() for name in settings["rule_files"])


def parses(words: list[str]) -> None:
    """Raises where the command line does not know a verb or an option."""
    app = typer.main.get_command(build_app())
    with app.make_context("adapterhub-lite", list(words)) as context:
        name, verb, rest = app.resolve_command(context, words)  # type: ignore[attr-defined]
        verb.make_context(name, list(rest), parent=context)


def test_the_commands_of_container_compose_and_unit_are_understood() -> None:
    for name in ("Dockerfile", "Dockerfile.cuda"):
        (command,) = re.findall(r"^CMD (.+)$", (FOLDER / name).read_text(), re.MULTILINE)
        parses(json.loads(command))
    for name in COMPOSE:
        command = yaml.safe_load((FOLDER / name).read_text())["services"]["adapterhub"]["command"]
        parses([re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in command])
    (command,) = re.findall(r"^ExecStart=(.+)$", (FOLDER / "adapterhub.service").read_text(), re.MULTILINE)
    parses(shlex.split(command)[1:])


def test_what_containers_copy_and_mount_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (FOLDER / name).read_text()
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
            assert all((ROOT / source).exists() for source in line.split()[:-1]), line
        assert set(re.findall(r"\'\.\[(\w+)\]\'", text)) <= set(extras)
    for name in COMPOSE:
        found = yaml.safe_load((FOLDER / name).read_text())
        services = found["services"]
        mounted = [one.split(":")[0] for service in services.values() for one in service["volumes"]]
        own = {"./keys.json", "./adapterhub-key"}
        assert all((FOLDER / one).is_file() for one in mounted if one.startswith("./") and one not in own)
        assert {one for one in mounted if not one.startswith("./")} == set(found["volumes"])
        assert services["adapterhub"]["build"]["dockerfile"] == "docs/operations/Dockerfile"


def test_vllm_and_the_server_before_it_agree() -> None:
    found = yaml.safe_load((FOLDER / "compose.vllm.yml").read_text())
    services = found["services"]
    front, engine = services["adapterhub"], services["vllm"]
    options = dict(word.removeprefix("--").split("=", 1) for word in front["command"][1:])
    assert options["engine"] == "http://vllm:8000" and "ports" not in engine
    assert options["engine-key"] == "/run/secrets/vllm-key" and front["secrets"] == ["vllm-key"]
    assert found["secrets"]["vllm-key"]["environment"] in engine["environment"]["VLLM_API_KEY"]
    shared = f"loaded:{options['engine-folder']}"
    assert shared in front["volumes"] and f"{shared}:ro" in engine["volumes"]
    assert f"--max-lora-rank={options['vllm-max-rank']}" in engine["command"] and "--enable-lora" in engine["command"]
    assert engine["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def checked(*command: object) -> None:
    """Run a checker; skips, by its name, where this machine lacks it."""
    program = shutil.which(str(command[0]), path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *map(str, command[1:])], capture_output=True, text=True)
    assert done.returncode == 0 and not re.search(r"\b(warning|error)\b", done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    checked("hadolint", FOLDER / name)


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_has_its_schema(name: str) -> None:
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FOLDER / name)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    # A path that exists on every machine: systemd looks whether the program is there.
    unit = (FOLDER / "adapterhub.service").read_text().replace("/opt/adapterhub/bin/adapterhub-lite", "/bin/true")
    (tmp_path / "adapterhub.service").write_text(unit)
    checked("systemd-analyze", "verify", tmp_path / "adapterhub.service")


def test_prometheus_takes_the_settings_and_the_alerts(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-metrics")
    settings = (FOLDER / "prometheus.yml").read_text().replace("/etc/prometheus/adapterhub-key", str(tmp_path / "key"))
    (tmp_path / "prometheus.yml").write_text(settings)
    shutil.copy(FOLDER / "adapterhub-rules.yml", tmp_path)
    checked("promtool", "check", "config", tmp_path / "prometheus.yml")

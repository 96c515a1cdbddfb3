"""The dashboard, the alerts and the scrape settings in docs/operations load, and name series that the server has."""

import json
import re

import yaml

from adapterhub_lite.serving.api.observe import Metrics
from tests.checkout import ROOT

FOLDER = ROOT / "docs" / "operations"
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

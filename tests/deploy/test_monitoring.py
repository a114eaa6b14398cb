"""Alerts, dashboards and the Collector refer to what exists; test_observed runs alerts and dashboards."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.tables import PAGES, instruments
from tests.deploy.test_compose import ALL, RUNNING, names, of
from tests.services.test_tracing import LABELS

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in (DEPLOY / "grafana/dashboards").glob("*.json")}
SCRAPES = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]

# Series that Prometheus and its client add: one for each scraped process, and each process's own resources.
FOREIGN = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
FOREIGN |= {"process_start_time_seconds"}
KEYWORDS = {"unless", "group_left", "group", "sum", "max", "and", "or", "offset"}
FOREIGN_LABELS = {"job", "instance", "worker", "le"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every PromQL expression of the suite with its place."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            yield from ((f"{name}: {panel['title']}", target["expr"]) for target in targets(panel) if "expr" in target)


def targets(panel: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = panel.get("targets", [])
    return found


def series() -> set[str]:
    """Return every series that the suite's processes serve."""
    shown = {name for *_, name in instruments()}
    return shown | {
        f"{name}_{part}"
        for name in shown
        if name.endswith(("_seconds", "_batch"))
        for part in ("bucket", "sum", "count")
    }


def named_in(expression: str) -> tuple[set[str], set[str]]:
    """Return the series and the labels that an expression names."""
    braces = re.findall(r"\{([^}]*)\}", expression)
    grouped = re.findall(r"(?:by|ignoring|on|without) \(([^)]*)\)", expression)
    labels = {label for part in braces for label in re.findall(r"(\w+)\s*[=!]~?", re.sub(r'"[^"]*"', "", part))}
    labels |= {label.strip() for part in grouped for label in part.split(",") if label}
    bare = re.sub(r"\"[^\"]*\"|\{[^}]*\}|\[[^\]]*\]|(?:by|ignoring|on|without) \([^)]*\)|\b\w+\s*\(", " ", expression)
    words = set(re.findall(r"\b[a-z]\w*", bare)) - KEYWORDS
    return words, labels


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_series_and_label_is_there(where: str, expression: str) -> None:
    names, labels = named_in(expression)
    assert names, where
    assert names <= series() | FOREIGN
    assert labels <= {label.replace(".", "_") for label in LABELS} | FOREIGN_LABELS


def test_an_unknown_series_would_be_found() -> None:
    found = named_in('sum by (worker) (rate(avatar_gone_total{reason="a=b"}[5m])) / sum(up) > 0.5')
    assert found == ({"avatar_gone_total", "up"}, {"worker", "reason"})


def test_every_metric_is_shown_on_a_dashboard() -> None:
    seen = {re.sub("_(bucket|sum|count)$", "", name) for _, text in expressions() for name in named_in(text)[0]}
    assert {name for *_, name in instruments()} <= seen


def test_every_alert_has_a_runbook() -> None:
    section = PAGES["metrics"].read_text(encoding="utf-8").split("\n## Alerts\n")[1].split("\n## ")[0]
    assert re.findall(r"^### `(\w+)`", section, re.MULTILINE) == [rule["alert"] for rule in RULES]


def test_every_alert_is_tested() -> None:
    tested = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {each["alertname"] for test in tested for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES}


def test_series_of_rule_tests_begin_absent() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    series = [each for test in tests for each in test["input_series"]]
    assert [each["series"] for each in series if not re.match(r"_x[1-9]", each["values"])] == []


def test_panels_have_positions_and_descriptions() -> None:
    for dashboard in DASHBOARDS.values():
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
        corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(corners)) == len(corners)
    assert set(DASHBOARDS) == {"blocks", "capacity", "faults"}


def test_prometheus_scrapes_every_process_of_compose() -> None:
    (scrape,) = SCRAPES
    (found,) = scrape["dns_sd_configs"]
    served = set()
    for profile in (*RUNNING, "text", "voice"):
        for service in (each for each in of(profile).values() if "build" in each):
            (name,) = (each for each, owner in names(profile) if owner is service and each in found["names"])
            served.add(name)
    assert sorted(found["names"]) == sorted(served | {"denoiser"}), "and those of chains, in Kubernetes"
    for service in (each for each in ALL.values() if "build" in each):
        assert service["environment"]["OTEL_METRICS_EXPORTER"] == "prometheus"
        assert service["environment"]["OTEL_EXPORTER_PROMETHEUS_HOST"] == "0.0.0.0"


def test_the_collector_forwards_traces_to_the_trace_store() -> None:
    collector = yaml.safe_load((DEPLOY / "collector/collector.yaml").read_text(encoding="utf-8"))
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(collector[kind])
    assert collector["exporters"]["otlp"]["endpoint"].partition(":")[0] in ALL
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/sources.yaml").read_text(encoding="utf-8"))
    known = {source["uid"]: source for source in sources["datasources"]}
    assert {source["url"].split("/")[2].partition(":")[0] for source in known.values()} <= set(ALL)
    used = {panel["datasource"]["uid"] for board in DASHBOARDS.values() for panel in board["panels"] if targets(panel)}
    assert used == set(known)

"""docs/: the dashboard and the alerts ask for metrics that the gateway has."""

import json
import re

from conftest import ROOT
from families import FAMILIES

DOCS = ROOT / "docs"
METRIC = re.compile(r"\b(?:freeway|all_models)_[a-z_]+")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
KNOWN = {name + suffix for name, kind in FAMILIES.items() for suffix in SUFFIXES[kind]}


def expressions_of_the_dashboard() -> list[str]:
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_dashboard_asks_for_what_there_is():
    asked = expressions_of_the_dashboard()

    assert len(asked) > 20
    assert {name for expr in asked for name in METRIC.findall(expr)} <= KNOWN
    assert all(expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}") for expr in asked)


def test_the_dashboard_shows_every_metric_somewhere():
    shown = {name for expr in expressions_of_the_dashboard() for name in METRIC.findall(expr)}
    families = {name for name in FAMILIES if any(name + suffix in shown for suffix in SUFFIXES[FAMILIES[name]])}

    assert set(FAMILIES) - families == set()


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = json.loads((DOCS / "grafana-dashboard.json").read_text())["panels"]
    places = [(p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in panels
              for x in range(p["gridPos"]["w"]) for y in range(p["gridPos"]["h"])]  # fmt: skip

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_the_alerts_ask_for_what_there_is_and_say_what_to_do():
    text = (DOCS / "alerts.yml").read_text()
    alerts = re.split(r"^      - alert: ", text, flags=re.MULTILINE)[1:]

    assert len(alerts) >= 10
    assert set(METRIC.findall(text)) <= KNOWN | {"freeway_"}
    for alert in alerts:
        assert re.match(r"Freeway\w+\n", alert)
        assert all(f"        {part}" in alert for part in ("expr:", "labels:", "annotations:"))
        assert "summary:" in alert and "description:" in alert


def test_the_table_of_metrics_is_complete():
    told = set(METRIC.findall((DOCS / "monitoring.md").read_text()))
    names = {name + ("_total" if kind == "counter" else "") for name, kind in FAMILIES.items()}

    assert names <= told

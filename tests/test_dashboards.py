"""The dashboard and the alert rules: every name in them is one that the code has."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from reports import report

from esper_jax.monitor import DASHBOARDS, SERIES, Monitor, Prometheus
from esper_jax.train.faults import Fault

LABELS = {s.name: {s.label} - {""} for s in SERIES}
TARGET = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""

BOARD = json.loads((DASHBOARDS / "grafana.json").read_text())
RULES = (DASHBOARDS / "alerts.yml").read_text()
TARGETS = [target for panel in BOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [target["expr"] for target in TARGETS]


def rules():
    """Each alert's expression by its name."""
    found = {}
    for block in re.split(r"\n +- alert: ", RULES)[1:]:
        expression = re.search(r"expr:(.*?)\n +(?:for|labels):", block, re.DOTALL)
        found[block.split()[0]] = expression[1]
    return found


def check(expression):
    """Names and labels of an expression are those of one series of the code."""
    names = set(re.findall(r"\besper_\w+", expression))
    assert names
    assert names <= set(LABELS)
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    matched = re.findall(r"[{,]\s*(\w+)\s*[=!]", expression)
    used = {label.strip() for part in grouped for label in part.split(",")}
    allowed = TARGET.union(*(LABELS[name] for name in names))
    assert used | set(matched) <= allowed
    return names


def test_the_dashboard_shows_every_series_by_its_name():
    shown = [check(expression) for expression in EXPRESSIONS]
    assert set().union(*shown) == set(LABELS)
    for target, names in zip(TARGETS, shown, strict=True):
        legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert legend <= TARGET.union(*(LABELS[name] for name in names))


def test_the_dashboard_is_whole():
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], sum_of(panel, "x", "w"))
        for y in range(panel["gridPos"]["y"], sum_of(panel, "y", "h"))
    ]
    assert len(set(cells)) == len(cells)  # none lies on another
    assert max(x for x, _ in cells) < 24
    # Whoever imports it chooses the data source; no machine's own is named.
    variables = {v["name"]: v for v in BOARD["templating"]["list"]}
    assert set(variables) == {"datasource", *TARGET}
    sources = [panel["datasource"]["uid"] for panel in panels]
    assert set(sources) == {"${datasource}"}


def sum_of(panel, *keys):
    return sum(panel["gridPos"][key] for key in keys)


def test_the_alerts_read_series_that_are_there():
    alerts = rules()
    assert {"EsperLossNotFinite", "EsperRollbackStorm"} <= set(alerts)
    assert {"EsperThroughputRegression", "EsperStuckSeeds"} <= set(alerts)
    for expression in alerts.values():
        check(expression)


def test_the_faults_and_stages_that_alerts_name_are_those_of_the_code():
    [named] = re.findall(r'fault=~"([^"]*)"', RULES)
    assert set(named.split("|")) <= set(Fault.__members__)


def promtool(*arguments, told=""):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    ended = subprocess.run(
        [tool, *map(str, arguments)],
        input=told,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_prometheus_takes_the_rules_and_each_fires_when_it_should():
    assert f"{len(rules())} rules" in promtool(
        "check", "rules", DASHBOARDS / "alerts.yml"
    )
    fixture = Path(__file__).parent / "fixtures" / "alerts_test.yml"
    assert "SUCCESS" in promtool("test", "rules", fixture)
    tested = fixture.read_text()
    assert all(name in tested for name in rules())


def test_prometheus_finds_nothing_to_lint_in_what_is_served():
    writer = Prometheus(port=0)
    with Monitor([writer]) as monitor:
        monitor.write(report(1, {"layers/0": [0, 2]}))
        with urllib.request.urlopen(writer.url, timeout=10) as answer:
            served = answer.read().decode()
    assert promtool("check", "metrics", told=served) == ""


def test_prometheus_can_read_what_the_dashboard_asks(tmp_path):
    path = tmp_path / "rules.yml"
    plain = [e.replace("$__rate_interval", "1m") for e in EXPRESSIONS]
    lines = [
        f"      - {{record: 'panel:{number}', expr: {json.dumps(expression)}}}"
        for number, expression in enumerate(plain)
    ]
    path.write_text("\n".join(["groups:", "  - name: board", "    rules:", *lines]))
    assert f"{len(plain)} rules" in promtool("check", "rules", path)

"""The rules of `deploy/prometheus`, the dashboard of `deploy/grafana`, and the metrics and labels that they use."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

ROOT: Final = Path(__file__).parents[2]
PROMETHEUS: Final = ROOT / "deploy" / "prometheus"
RULES: Final = ("recording.rules.yml", "alerts.rules.yml")
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "verifyserver.json"
OPERATORS: Final = ROOT / "docs" / "operations.md"

# Labels that Prometheus adds to all it scrapes, and metrics of its own.
OF_TARGETS: Final = frozenset({"job", "instance"})
ITS_OWN: Final = {"up": frozenset[str](), "ALERTS": frozenset({"alertname", "alertstate"})}
_NAME: Final = re.compile(r"(?<![\w:\"])(?:verify(?:_\w+|:[\w:]+)|process_\w+|up|ALERTS)(?![\w(])")
_SELECTOR: Final = re.compile(rf"({_NAME.pattern})\{{([^}}]*)\}}")
_GROUPED: Final = re.compile(rf"(?:by|on) \(([\w, ]*)\) [^\"]*?({_NAME.pattern})")
_LABELS: Final = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


class Rule(NamedTuple):
    """A recording rule, or an alert."""

    name: str
    expr: str
    alert: bool
    lasting: str  # its `for`
    labels: dict[str, str]
    annotations: dict[str, str]


@functools.cache
def rules() -> tuple[Rule, ...]:
    """All rules, in order."""
    found: list[Rule] = []
    for name in RULES:
        for group in yaml.safe_load((PROMETHEUS / name).read_text("utf-8"))["groups"]:
            for rule in group["rules"]:
                alert = "alert" in rule
                more = (rule.get("for", ""), rule.get("labels", {}), rule.get("annotations", {}))
                found.append(Rule(rule["alert" if alert else "record"], rule["expr"], alert, *more))
    return tuple(found)


def alerts() -> list[Rule]:
    """The alerting rules."""
    return [rule for rule in rules() if rule.alert]


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return found


def panels() -> list[dict[str, Any]]:
    """Its panels from the top, without rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def concrete(expr: str, window: str = "1m") -> str:
    """A panel's expression with every variable set to All."""
    return re.sub(r"\$(?!__)\w+", ".*", expr.replace("$__rate_interval", window))


def queries() -> dict[str, str]:
    """Every expression of rules and dashboard, by its place."""
    found = {f"rule {rule.name}": rule.expr for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']}, {target['refId']}"] = concrete(target["expr"])
    return found


def names_in(text: str) -> set[str]:
    """Metrics named in a text."""
    return set(_NAME.findall(text))


def asked(expr: str) -> dict[str, set[str]]:
    """By metric: labels by which an expression selects, groups or matches it."""
    found: dict[str, set[str]] = {name: set() for name in names_in(expr)}
    for name, inside in _SELECTOR.findall(expr):
        found[name] |= set(_LABELS.findall(inside))
    for labels, name in _GROUPED.findall(expr):
        found[name] |= {label.strip() for label in labels.split(",") if label.strip()} - {"le"}
    return found


def shown(pages: list[str]) -> dict[str, set[str]]:
    """Labels by metric, in pages of Prometheus' text format."""
    found: dict[str, set[str]] = {}
    for line in "\n".join(pages).splitlines():
        if (match := re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+$", line)) and not line.startswith("#"):
            found.setdefault(match[1], set()).update(_LABELS.findall(match[2] or ""))
    return found

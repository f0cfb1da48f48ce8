"""A real worker and a real API export every metric that rules, dashboard and docs/operations.md name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.api_process import ApiProcess
from support.caller import address
from support.monitoring import ITS_OWN, OF_TARGETS, OPERATORS, asked, names_in, queries, rules, shown
from support.rig import Rig

RECORDED = {rule.name for rule in rules() if not rule.alert}


@pytest.fixture(scope="module")
def scraped(rig: Rig) -> Iterator[dict[str, set[str]]]:
    """Labels by metric, after a request over HTTP and gRPC each, and one that HTTP refuses."""
    with ApiProcess(rig.settings) as api:
        assert api.get_code(address())["error"] == 0
        assert api.call(address()).error == 0
        assert api.http.get("/nothing").status_code == 404
        pages = [httpx.get(rig.worker.metrics_url, trust_env=False).text, api.http.get("/metrics").text]
        yield shown(pages)


@pytest.mark.parametrize(("where", "expr"), queries().items(), ids=list(queries()))
def test_a_query_uses_metrics_and_labels_that_exist(where: str, expr: str, scraped: dict[str, set[str]]) -> None:
    names = asked(expr)
    assert names, where
    for name, labels in names.items():
        if name in RECORDED:
            continue
        there = {**scraped, **ITS_OWN}
        assert name in there, f"{where}: there is no {name}"
        assert labels <= there[name] | OF_TARGETS, f"{where}: {name} has no {labels - there[name] - OF_TARGETS}"


def test_the_operators_page_names_metrics_that_exist(scraped: dict[str, set[str]]) -> None:
    named = {name for name in names_in(OPERATORS.read_text("utf-8")) if "_" in name and not name.endswith("_")}
    assert len(named) > 5
    assert named <= scraped.keys()


def test_every_counter_is_on_the_dashboard_or_in_a_rule(scraped: dict[str, set[str]]) -> None:
    counters = {name for name in scraped if name.startswith("verify_") and name.endswith("_total")}
    assert len(counters) > 10
    assert counters - {name for expr in queries().values() for name in asked(expr)} == set()

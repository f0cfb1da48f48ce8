"""The API's metrics as Prometheus reads them."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from producer.api.counts import BOUNDS, ApiMetrics
from producer.audit import Audit
from producer.contract import ErrorCode
from producer.store.backlog import Backlog

GRPC = {"protocol": "grpc", "verb": "request"}


def shown(metrics: ApiMetrics, backlog: Backlog | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.render(backlog).decode())
    samples = (sample for family in families for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"verify_{name}", frozenset(labels.items())


def test_answers_are_counted_by_protocol_verb_and_error() -> None:
    metrics = ApiMetrics(Audit())
    for error in (ErrorCode.SUCCESS, ErrorCode.SUCCESS, ErrorCode.TIMEOUT):
        metrics.counts["grpc", "request", ""].answered(error, 0.01)
    found = shown(metrics)
    assert found[key("api_requests_total", error="0", **GRPC)] == 2
    assert found[key("api_requests_total", error="6", **GRPC)] == 1
    assert found[key("api_requests_total", error="0", protocol="http", verb="check")] == 0


def test_with_keys_they_are_counted_by_key_too() -> None:
    metrics = ApiMetrics(Audit(), {"app", "shop"})
    metrics.counts["grpc", "request", "app"].answered(ErrorCode.SUCCESS, 0.01)
    found = shown(metrics)
    for name, count in {"app": 1, "shop": 0}.items():
        assert found[key("api_requests_total", error="0", key=name, **GRPC)] == count
        assert found[key("api_request_seconds_count", key=name, **GRPC)] == count


def test_the_histogram_is_cumulative_and_each_bound_belongs_to_its_bucket() -> None:
    metrics = ApiMetrics(Audit())
    for seconds in (0.0, BOUNDS[0], 0.3, BOUNDS[-1] + 1):
        metrics.counts["grpc", "request", ""].answered(ErrorCode.SUCCESS, seconds)
    found = shown(metrics)
    buckets = [found[key("api_request_seconds_bucket", le=str(bound), **GRPC)] for bound in (*BOUNDS, "+Inf")]
    assert buckets == [2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert found[key("api_request_seconds_count", **GRPC)] == 4
    assert math.isclose(found[key("api_request_seconds_sum", **GRPC)], BOUNDS[0] + 0.3 + BOUNDS[-1] + 1)


def test_in_flight_sums_the_verbs_of_a_protocol() -> None:
    metrics = ApiMetrics(Audit())
    metrics.counts["http", "request", ""].in_flight += 2
    metrics.counts["http", "check", ""].in_flight += 1
    assert metrics.in_flight("http") == 3
    found = shown(metrics)
    assert found[key("api_requests_in_flight", protocol="http")] == 3
    assert found[key("api_requests_in_flight", protocol="grpc")] == 0


def test_the_queues_figures_are_unknown_while_the_broker_is_away() -> None:
    metrics = ApiMetrics(Audit())
    there = shown(metrics, Backlog(2, 1, 3, 0, 1, None))
    names = ("queue_requests", "queue_delayed_requests", "queue_suspect_requests", "dead_letters", "workers")
    assert [there[key(name)] for name in (*names, "queue_oldest_age_seconds", "broker_up")] == [2, 1, 3, 0, 1, 0, 1]
    away = shown(metrics)
    assert all(math.isnan(away[key(name)]) for name in (*names, "queue_oldest_age_seconds"))
    assert away[key("broker_up")] == 0

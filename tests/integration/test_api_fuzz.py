"""Whatever is sent to the API: it is answered, and the process survives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from support.api_process import ApiProcess
from support.fake_worker import FakeWorker
from support.redis_server import RedisServer

from bench.fuzz.grpc import GrpcTarget
from bench.fuzz.http import HttpTarget
from bench.fuzz.target import fuzz

EXAMPLES = 30
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with redis_server.client() as client:
        client.flushall()
    with (
        FakeWorker(redis_server),
        ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": "1"}) as api,
    ):
        yield api
        assert api.get_code("a@example.com")["error"] == 0
        assert api.call("a@example.com").error == 0


def test_the_description_holds(api: ApiProcess) -> None:
    # It takes a second to load, which the collection of tests does without.
    import schemathesis  # noqa: PLC0415
    from schemathesis.checks import CHECKS, load_all_checks  # noqa: PLC0415
    from schemathesis.core.result import Ok  # noqa: PLC0415
    from schemathesis.generation import GenerationMode  # noqa: PLC0415

    # /readyz answers 503, as there is no worker; a malformed body is answered 200 with error 1001, by contract.
    load_all_checks()
    unfit: list[Any] = CHECKS.get_by_names(["not_a_server_error", "negative_data_rejection"])
    description = schemathesis.openapi.from_url(f"http://127.0.0.1:{api.http_port}/openapi.json")
    tried = set()
    for found in description.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        for mode in GenerationMode:

            @FUZZ
            @given(case=operation.as_strategy(generation_mode=mode))
            def hold(case: Any) -> None:
                case.call_and_validate(excluded_checks=unfit)

            with contextlib.suppress(Unsatisfiable):  # a GET without parameters has no negative cases
                hold()
            tried.add(operation.label)
    assert tried == {"POST /get_varifycode", "POST /check_varifycode", "GET /healthz", "GET /readyz", "GET /metrics"}


@pytest.mark.parametrize("target", [HttpTarget, GrpcTarget])
def test_mutated_input_is_answered_and_does_no_harm(api: ApiProcess, target: type[HttpTarget | GrpcTarget]) -> None:
    assert fuzz(target(api, seed=7), count=400) == (400, [])

"""One trace from the API to the relay: API and worker run in this process, everything else is real."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, cast
from unittest.mock import Mock

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode
from support.caller import address, message
from support.redis_server import RedisServer
from support.rig import code_in
from support.smtp_server import ScriptedServer

from producer.aio import AsyncVerificationClient
from producer.api.binding import listen
from producer.api.grpc import GrpcServer
from producer.api.http import make_app
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from producer.api.state import Api
from producer.contract import DEFAULT_QUEUE
from producer.setting_types import Bind
from producer.settings import load
from producer.tracing.setup import EXPORTER, set_up
from producer.tracing.spans import Traces, caller_of
from worker.bootstrap import Worker
from worker.contact import BrokerContact

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("redis")]  # the shared server is empty at first

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{CALLER}-01"
UNSAMPLED = f"00-{TRACE_ID}-{CALLER}-00"
ATTRIBUTES = {  # no span has others
    *("messaging.system", "messaging.destination.name", "messaging.message.id"),
    *("messaging.operation.name", "messaging.operation.type", "db.system.name", "db.operation.name"),
    *("http.request.method", "http.route", "http.response.status_code", "url.path", "url.scheme"),
    *("rpc.system.name", "rpc.method", "rpc.response.status_code", "server.address", "server.port"),
    *("network.protocol.name", "error.type", "verify.error", "verify.issue", "verify.outcome", "verify.retry"),
    *("verify.settled", "verify.smtp_code"),
}


class Harness:
    """Worker, API and their spans on one loop."""

    def __init__(self, server: RedisServer, relay: ScriptedServer, **settings: str) -> None:
        own = {
            "VERIFY_REDIS_URL": server.url(),
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay.port}",
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
            "VERIFY_LOCALE": "en",
            "VERIFY_CODE_LENGTH": "12",
        }
        self.settings = load({**own, **settings}, dotenv=None)
        self.server, self.relay = server, relay
        self._kept = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.traces = Traces(provider)
        self.api = Api(self.settings, self.traces)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(self.api)), base_url="http://localhost")
        self._rpc = GrpcServer(self.api)
        self.workers: list[Worker] = []
        self._secrets: set[str] = set()

    async def __aenter__(self) -> Self:
        sockets = listen(Bind("127.0.0.1", 0), "VERIFY_GRPC_BIND")
        self.grpc_port = sockets[0].getsockname()[1]
        await self._rpc.start(sockets)
        await self.add_worker()
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self.workers:
            await worker.stop(5)
        await self._rpc.stop(0)
        await self.http.aclose()
        await self.api.close()

    async def add_worker(self) -> Worker:
        celery_side = Mock(**{"is_revoked.return_value": False})
        worker = Worker(self.settings, lambda _: celery_side, BrokerContact(self.settings.broker_url), self.traces)
        await worker.start()
        worker.fetcher.consume(on=True)
        self.workers.append(worker)
        return worker

    async def post(self, path: str, headers: dict[str, str] | None = None, **body: object) -> Any:
        """The HTTP API's answer."""
        self._secrets |= {str(value) for name, value in body.items() if name in {"email", "varifycode"}}
        return (await self.http.post(path, json=body, headers=headers)).json()

    async def call(self, email: str, **metadata: str) -> int:
        """The error in the gRPC API's answer."""
        self._secrets.add(email)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            method = channel.unary_unary(
                f"/{SERVICE}/{METHOD}", GetVarifyReq.SerializeToString, GetVarifyRsp.FromString
            )
            return int((await method(GetVarifyReq(email=email), metadata=tuple(metadata.items()))).error)

    def push(self, email: str, headers: dict[str, Any], request_id: str | None = None) -> str:
        """Push a message as another program would. Returns its id."""
        self._secrets.add(email)
        made = message({"email": email}, headers=headers, request_id=request_id)
        with self.server.client(1) as client:
            client.lpush(DEFAULT_QUEUE, json.dumps(made))
        return str(made["headers"]["id"])

    async def spans(self, count: int) -> list[ReadableSpan]:
        """All spans by start, once `count` messages are processed. Fails if a span holds private data."""

        async with asyncio.timeout(60):
            while len(named(self._kept.get_finished_spans(), f"process {DEFAULT_QUEUE}")) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        spans = sorted(self._kept.get_finished_spans(), key=lambda span: span.start_time or 0)
        secrets = self._secrets | {code_in(mail) for mail in self.relay.dotted}
        for span in spans:
            said = span.to_json()
            assert [each for each in {*secrets, "@", "code_", "bucket:"} if each in said] == []
            assert set(span.attributes or {}) <= ATTRIBUTES
            assert not span.events
        return spans


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def harness(redis_server: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A test may give settings as the fixture's parameter."""
    async with ScriptedServer() as relay, Harness(redis_server, relay, **getattr(request, "param", {})) as harness:
        yield harness


def tree(spans: list[ReadableSpan]) -> dict[str, str]:
    """Each span's parent, by name: `caller` if it is not among `spans`, empty if there is none."""
    names = {span.context.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent.span_id, "caller") if span.parent else "" for span in spans}


def trace_ids(spans: list[ReadableSpan]) -> set[str]:
    return {f"{span.context.trace_id:032x}" for span in spans}


def named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def assert_nested(spans: list[ReadableSpan]) -> None:
    """Each span lies within its parent; only a sender's may end before its child does."""
    by_id = {span.context.span_id: span for span in spans}
    for span in spans:
        assert span.start_time
        assert span.end_time
        assert span.start_time <= span.end_time
        outer = by_id.get(span.parent.span_id) if span.parent else None
        if outer is not None:
            assert outer.start_time
            assert outer.end_time
            assert outer.start_time <= span.start_time
            assert outer.kind is SpanKind.PRODUCER or span.end_time <= outer.end_time


class TestOneRequest:
    async def test_is_one_trace_from_the_http_api_to_the_relay(self, harness: Harness) -> None:
        email = address()
        answer = await harness.post("/get_varifycode", {"traceparent": PARENT}, email=email)
        assert answer == {"error": 0, "email": email}
        spans = await harness.spans(1)
        assert tree(spans) == {
            "POST /get_varifycode": "caller",
            "send verification": "POST /get_varifycode",
            "process verification": "send verification",
            "issue": "process verification",
            "smtp send": "process verification",
            "settle": "process verification",
        }
        assert trace_ids(spans) == {TRACE_ID}
        assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
        assert_nested(spans)
        server, sent, processed, issued, tried, settled = spans
        assert server.parent
        assert f"{server.parent.span_id:016x}" == CALLER
        kinds = [span.kind for span in spans]
        assert kinds == [SpanKind.SERVER, SpanKind.PRODUCER, SpanKind.CONSUMER, *[SpanKind.CLIENT] * 3]
        assert facts(server) == {
            "http.request.method": "POST",
            "http.route": "/get_varifycode",
            "http.response.status_code": 200,
            "url.path": "/get_varifycode",
            "url.scheme": "http",
            "verify.error": 0,
        }
        queue = {"messaging.system": "redis", "messaging.destination.name": "verification"}
        queue["messaging.message.id"] = facts(sent)["messaging.message.id"]
        for span, operation, kind in (
            (sent, "send", "send"),
            (processed, "process", "process"),
            (settled, "ack", "settle"),
        ):
            whats = {"messaging.operation.name": operation, "messaging.operation.type": kind}
            assert (queue | whats).items() <= facts(span).items()
        assert {"verify.error": 0, "verify.settled": "ack"}.items() <= facts(processed).items()
        assert facts(issued) == {"db.system.name": "redis", "db.operation.name": "issue", "verify.issue": "send"}
        assert facts(tried) == {
            "server.address": "127.0.0.1",
            "server.port": harness.relay.port,
            "network.protocol.name": "smtp",
            "verify.outcome": "accepted",
            "verify.retry": 0,
        }

    async def test_is_one_trace_through_the_grpc_api_too(self, harness: Harness) -> None:
        assert await harness.call(address(), traceparent=PARENT) == 0
        spans = await harness.spans(1)
        assert spans[0].name == "message.VarifyService/GetVarifyCode"
        assert len(spans) == 6
        assert trace_ids(spans) == {TRACE_ID}
        assert_nested(spans)
        assert facts(spans[0]) == {
            "rpc.system.name": "grpc",
            "rpc.method": "message.VarifyService/GetVarifyCode",
            "rpc.response.status_code": "OK",
            "verify.error": 0,
        }

    async def test_without_a_caller_begins_its_own_trace(self, harness: Harness) -> None:
        await harness.post("/get_varifycode", email=address())
        await harness.call(address())
        spans = await harness.spans(2)
        assert len({span.context.trace_id for span in spans}) == 2
        assert [span.kind for span in spans if span.parent is None] == [SpanKind.SERVER] * 2

    async def test_whose_caller_does_not_sample_is_not_sampled_anywhere(self, harness: Harness) -> None:
        await harness.post("/get_varifycode", {"traceparent": UNSAMPLED}, email=address())
        await harness.post("/get_varifycode", email=address())
        assert len(await harness.spans(1)) == 6

    async def test_within_the_cooldown_sends_no_mail_and_says_so(self, harness: Harness) -> None:
        email = address()
        assert await harness.call(email) == 0
        assert await harness.call(email) == 0
        spans = await harness.spans(2)
        assert [facts(span)["verify.issue"] for span in named(spans, "issue")] == ["send", "answered"]
        assert len(named(spans, "smtp send")) == 1

    async def test_that_the_api_refuses_has_only_the_apis_span(self, harness: Harness) -> None:
        assert (await harness.post("/get_varifycode", email="nobody"))["error"] == 3
        assert (await harness.post("/get_varifycode"))["error"] == 1001
        found = await harness.spans(0)
        assert [(span.name, facts(span)["verify.error"]) for span in found] == [
            ("POST /get_varifycode", 3),
            ("POST /get_varifycode", 1001),
        ]


async def test_checks_have_spans_and_other_paths_have_none(harness: Harness) -> None:
    email = address()
    await harness.call(email)
    code = code_in(harness.relay.mails[0])
    assert (await harness.post("/check_varifycode", email=email, varifycode="no such code"))["error"] == 1004
    assert (await harness.post("/check_varifycode", {"traceparent": PARENT}, email=email, varifycode=code))[
        "error"
    ] == 0
    for path in ("/healthz", "/readyz", "/metrics", "/docs", f"/{email}"):
        await harness.http.get(path)
        await harness.http.post(path)
    checks = [span for span in await harness.spans(1) if span.name.startswith("POST")]
    assert [(span.name, facts(span)["verify.error"]) for span in checks] == [
        ("POST /check_varifycode", 1004),
        ("POST /check_varifycode", 0),
    ]
    assert f"{checks[1].context.trace_id:032x}" == TRACE_ID


@pytest.fixture
def global_spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What is exported by the process' own provider, as a web framework would find it."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    return kept


async def test_the_web_framework_makes_no_spans_of_its_own(
    global_spans: InMemorySpanExporter, harness: Harness
) -> None:
    await harness.post("/get_varifycode", email=address())
    await harness.http.get("/somebody@example.com")
    await harness.spans(1)
    assert global_spans.get_finished_spans() == ()


async def test_a_retry_in_another_worker_belongs_to_the_same_trace(harness: Harness) -> None:
    first = harness.workers[0]
    harness.relay.script["rcpt"] = ["450 4.2.1 <patient@example.com> later"]
    email = address()
    asking = asyncio.create_task(harness.post("/get_varifycode", {"traceparent": PARENT}, email=email))
    await harness.spans(1)  # its retry is scheduled
    first.fetcher.consume(on=False)
    await harness.add_worker()
    assert (await asking)["error"] == 0
    spans = await harness.spans(2)
    assert trace_ids(spans) == {TRACE_ID}
    assert [facts(span)["verify.settled"] for span in named(spans, "process verification")] == ["delay", "ack"]
    refused, accepted = named(spans, "smtp send")
    assert {"verify.outcome": "deferred", "verify.smtp_code": 450, "verify.retry": 0}.items() <= facts(refused).items()
    assert facts(refused)["error.type"] == "deferred"
    assert refused.status.status_code is StatusCode.ERROR
    assert {"verify.outcome": "accepted", "verify.retry": 1}.items() <= facts(accepted).items()
    assert [facts(span)["messaging.operation.name"] for span in named(spans, "settle")] == ["delay", "ack"]


@pytest.mark.parametrize(
    "harness", [{"VERIFY_GIVE_UP_AFTER": "1", "VERIFY_REPLY_TIMEOUT": "4"}], indirect=True, ids=["short"]
)
async def test_a_request_given_up_is_a_failed_span_and_a_refused_mailbox_is_not(harness: Harness) -> None:
    harness.relay.script["rcpt"] = ["550 5.1.1 no such user", *["450 4.2.1 later"] * 50]
    assert await harness.call(address()) == 5
    assert await harness.call(address()) == 6
    spans = await harness.spans(3)
    last = {facts(span)["verify.error"]: span for span in spans if "verify.error" in facts(span)}
    assert last[5].status.status_code is StatusCode.UNSET
    assert last[6].status.status_code is StatusCode.ERROR
    assert facts(last[6])["error.type"] == "Timeout"


NO_PARENT: list[dict[str, Any]] = [
    *({"traceparent": value} for value in (7, None, [PARENT], {"a": PARENT}, "", "x" * 10_000, PARENT.upper())),
    *({"traceparent": value} for value in ("\0", "é" * 40, "nonsense", f"{PARENT}\n{PARENT}")),
    {"traceparent": f"00-{'0' * 32}-{CALLER}-01"},
    {"traceparent": f"ff-{TRACE_ID}-{CALLER}-01"},
    {"tracestate": "a=b"},
]
NO_STATE = [
    *("a@example.com", "k=a@example.com", "tenant@vendor=1", "x" * 1000, "=,=,=", 7, None, ["k=v"], "\0"),
    *("é" * 40, "nonsense", "a=1,b", "Upper=1", ",".join(f"k{i}=1" for i in range(33))),
]


@pytest.mark.parametrize("value", ["", "none", " None "])
def test_an_exporter_of_none_turns_tracing_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(EXPORTER, value)
    assert set_up(f"switched off by {value!r}") is None


def test_a_malformed_trace_context_is_ignored_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert [headers for headers in [*NO_PARENT, {"traceparent": "\ud800"}] if caller_of(headers)] == []
    for state in [*NO_STATE, "\ud800", "k=\ud800"]:
        [span] = caller_of({"traceparent": PARENT, "tracestate": state}).values()
        assert not cast(Span, span).get_span_context().trace_state
    assert not caplog.records


async def test_a_message_with_a_malformed_trace_context_is_served(harness: Harness) -> None:
    for headers in NO_PARENT:
        harness.push(address(), headers)
    for state in NO_STATE:
        harness.push(address(), {"traceparent": PARENT, "tracestate": state})
    processed = named(await harness.spans(len(NO_PARENT) + len(NO_STATE)), "process verification")
    assert [facts(span)["verify.error"] for span in processed] == [0] * len(processed)
    assert sum(span.parent is None for span in processed) == len(NO_PARENT)
    assert not any(span.context.trace_state for span in processed)


async def test_the_apis_ignore_hostile_headers_and_pass_on_a_vendors_state(harness: Harness) -> None:
    for value in ("", "nonsense", "00-" + "f" * 8000, "\t", "00-é"):
        headers = [(b"traceparent", value.encode("latin-1"))]
        answer = await harness.http.post("/get_varifycode", json={"email": address()}, headers=headers)
        assert answer.json()["error"] == 0
    twice = [("traceparent", PARENT), ("traceparent", PARENT)]
    await harness.http.post("/get_varifycode", json={"email": address()}, headers=twice)
    assert await harness.call(address(), traceparent="nonsense") == 0
    assert all(f"{span.context.trace_id:032x}" != TRACE_ID for span in await harness.spans(7))
    fine = {"traceparent": PARENT, "tracestate": "vendor=1,other=2"}
    await harness.post("/get_varifycode", fine, email=address())
    states = [dict(span.context.trace_state) for span in await harness.spans(8) if span.context.trace_state]
    assert states == [{"vendor": "1", "other": "2"}] * 6


async def test_an_address_as_request_id_is_masked(harness: Harness) -> None:
    harness.push(address(), {}, request_id=f"whole.{uuid.uuid4()}@example.com")
    [processed, *_] = await harness.spans(1)
    assert facts(processed)["messaging.message.id"] == "***"


async def test_a_malformed_message_and_an_id_conflict_do_no_harm(harness: Harness) -> None:
    same = harness.push(address(), {"traceparent": PARENT})
    await harness.spans(1)
    harness.push(address(), {"traceparent": PARENT}, request_id=same)
    with harness.server.client(1) as client:
        client.lpush(DEFAULT_QUEUE, "no JSON", json.dumps({**message(), "body": "no body"}))
    spans = await harness.spans(2)
    conflict = named(spans, "process verification")[1]
    assert facts(conflict)["verify.settled"] == "dead_letter"
    assert "conflict" in {facts(span)["verify.issue"] for span in named(spans, "issue")}
    assert await harness.call(address()) == 0
    await harness.spans(3)


async def test_a_clients_spans_are_children_of_the_current_span(harness: Harness) -> None:
    async with AsyncVerificationClient(harness.settings, traces=harness.traces) as client:
        with harness.traces.tracer.start_as_current_span("sign up"):
            await client.enqueue(address())
            await client.request(address())
    spans = await harness.spans(2)
    assert len({span.context.trace_id for span in spans}) == 1
    assert tree(spans)["send verification"] == "sign up"
    assert_nested(spans)

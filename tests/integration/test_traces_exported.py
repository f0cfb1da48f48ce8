"""Traces as an operator turns them on: real API processes and workers that export to a collector, or fail to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.api_process import STOP_WITHIN, ApiProcess
from support.caller import address, message
from support.collector import Collector, Kept
from support.process import ROOM, ROOT, eventually
from support.rig import Rig, code_in
from support.worker_process import WorkerProcess

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{CALLER}-01"
ON = {"OTEL_TRACES_EXPORTER": "otlp"}
# What only tracing loads. redis-py loads the rest of OpenTelemetry wherever it is installed.
LOADED = ("producer.tracing.spans", "producer.tracing.export", "opentelemetry.sdk.trace", "opentelemetry.exporter")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Rig]:
    """A rig with a traced worker. Its settings have tracing on."""
    with Rig() as rig:
        rig.settings |= collector.environment
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def api(traced: Rig) -> Iterator[ApiProcess]:
    with ApiProcess(traced.settings) as api:
        yield api


def of_trace(collector: Collector, trace_id: str, count: int) -> list[Kept]:
    """The `count` spans of one trace, once all are exported."""

    def found() -> list[Kept]:
        return [span for span in collector.spans() if span.trace_id == trace_id]

    eventually(lambda: len(found()) >= count)
    time.sleep(0.3)  # three more exports, in which a surplus span would come
    assert len(found()) == count
    return found()


def assert_private(collector: Collector, rig: Rig, *secrets: str) -> None:
    """No export holds an address, a part of one, or a code."""
    assert rig.relay.dotted
    private = {*secrets, "example.com", "code_", *(code_in(mail) for mail in rig.relay.dotted)}
    private |= {part for mail in rig.relay.dotted for part in mail.recipient.split("@")}
    raw = b"".join(collector.bodies)
    assert [each for each in private if each.encode() in raw] == []
    assert "@" not in collector.texts()


def test_one_trace_goes_through_both_processes(collector: Collector, traced: Rig, api: ApiProcess) -> None:
    email = address("somebody")
    answer = api.post("/get_varifycode", {"email": email}, headers={"traceparent": PARENT})
    assert answer == {"error": 0, "email": email}
    spans = of_trace(collector, TRACE_ID, 6)
    names = {span.span_id: span.name for span in spans}
    assert {(span.service, span.name, names.get(span.parent_id, span.parent_id)) for span in spans} == {
        ("verifyserver-api", "POST /get_varifycode", CALLER),
        ("verifyserver-api", "send verification", "POST /get_varifycode"),
        ("verifyserver-worker", "process verification", "send verification"),
        ("verifyserver-worker", "issue", "process verification"),
        ("verifyserver-worker", "smtp send", "process verification"),
        ("verifyserver-worker", "settle", "process verification"),
    }
    assert_private(collector, traced, email)


def test_a_message_that_celery_executes_is_traced_too(collector: Collector, traced: Rig) -> None:
    email, trace_id = address("later"), "3" * 32
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01", "group": "a-group"}
    [request_id] = traced.caller.push(message({"email": email}, headers=headers))
    assert traced.caller.reply(request_id)["error"] == 0
    spans = of_trace(collector, trace_id, 4)
    assert [span.facts["messaging.message.id"] for span in spans if span.name.startswith("process")] == [request_id]
    assert {span.name for span in spans} == {"process verification", "issue", "smtp send", "settle"}
    assert_private(collector, traced, email)


def test_a_process_that_ends_exports_its_last_spans(new_rig: Callable[..., Rig]) -> None:
    with Collector() as collector:
        rig = new_rig()
        rig.settings |= {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_SERVICE_NAME": "ours"}
        worker = rig.add_worker()
        with ApiProcess(rig.settings) as api:
            assert api.call(address()).error == 0
            assert collector.spans() == []
            api.signal(signal.SIGTERM)
            assert api.wait() == 0
            assert {span.name for span in collector.spans()} == {
                "message.VarifyService/GetVarifyCode",
                "send verification",
            }
        assert worker.stop() == 0
        assert {span.service for span in collector.spans()} == {"ours"}
        assert len(collector.spans()) == 6


@pytest.mark.parametrize(
    "silent", [pytest.param(False, id="away"), pytest.param(True, id="silent", marks=pytest.mark.slow)]
)
def test_without_a_collector_requests_are_served_and_processes_end_in_time(
    new_rig: Callable[..., Rig], *, silent: bool
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if silent:
            nobody.listen()
        rig = new_rig()
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        rig.settings |= {**ON, "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        rig.settings |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "30" if silent else "1"}
        worker = rig.add_worker()
        with ApiProcess(rig.settings) as api:
            for _ in range(20):
                assert api.get_code(address())["error"] == 0
            if not silent:
                eventually(lambda: "traces cannot be exported" in api.log and "cannot be exported" in worker.log)
                time.sleep(1)
            began = time.monotonic()
            api.signal(signal.SIGTERM)
            worker.terminate()
            assert api.wait() == 0
            assert worker.wait() == 0
            assert time.monotonic() - began < STOP_WITHIN + ROOM
            for log in (api.log, worker.log):
                assert log.count("traces cannot be exported") == (0 if silent else 1)
        rig.check()


def failed_start(process: str, **environment: str) -> tuple[int, list[str]]:
    """The exit status of a process that must not start, and the lines that it prints."""
    words = {
        "worker": "celery -A worker.app worker -P solo",
        "api": "producer serve --http-bind 127.0.0.1:0 --grpc-bind 127.0.0.1:0",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERIFY_", "OTEL_"))}
    own = {"PYTHONPATH": str(ROOT), "VERIFY_REDIS_URL": "redis://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", *words[process].split()],
        env={**inherited, **own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd="/",
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


REFUSED = "OTEL_*: OpenTelemetry cannot be set up with them: "


class TestStarting:
    @pytest.mark.parametrize(
        ("process", "environment", "line"),
        [
            (
                "worker",
                {"OTEL_TRACES_EXPORTER": "jaeger"},
                "OTEL_TRACES_EXPORTER: 'jaeger' is not allowed; allowed: otlp, console or none",
            ),
            pytest.param(
                "api",
                {**ON, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
                "OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' is not allowed; allowed: http/protobuf",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "worker",
                {**ON, "OTEL_BSP_MAX_QUEUE_SIZE": "0"},
                f"{REFUSED}max_queue_size must be a positive integer.",
                marks=pytest.mark.slow,
            ),
            (
                "api",
                {**ON, "OTEL_EXPORTER_OTLP_HEADERS": "a=b, Authorization s3cret"},
                f"{REFUSED}OTEL_EXPORTER_OTLP_HEADERS must be a comma-separated list of name=value",
            ),
        ],
        ids=["exporter", "protocol", "other", "a secret"],
    )
    def test_a_bad_value_is_one_line(self, process: str, environment: dict[str, str], line: str) -> None:
        assert failed_start(process, **environment) == (2, [line])

    @pytest.mark.parametrize(
        ("process", "missing"),
        [("worker", "opentelemetry.sdk"), pytest.param("api", "opentelemetry.exporter", marks=pytest.mark.slow)],
    )
    def test_a_missing_package_is_one_line(self, process: str, missing: str, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
        status, [line] = failed_start(process, **ON, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert status == 2
        assert line.startswith(f"OTEL_TRACES_EXPORTER: traces need {missing}")
        assert line.endswith(": pip install 'verifyserver[traces]'")


# Writes the names of all loaded modules to a file when a process ends.
_WITNESS = """
import atexit, json, os, sys
atexit.register(lambda: open(f"{os.path.dirname(__file__)}/{os.getpid()}.json", "w").write(json.dumps([*sys.modules])))
"""


@pytest.mark.parametrize("value", [pytest.param(None, marks=pytest.mark.slow), " None "])
def test_without_tracing_nothing_of_it_is_loaded_and_messages_carry_no_context(
    new_rig: Callable[..., Rig], tmp_path: Path, value: str | None
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_WITNESS)
    rig = new_rig()
    rig.settings |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    rig.settings |= {} if value is None else {"OTEL_TRACES_EXPORTER": value}
    with ApiProcess({**rig.settings, "VERIFY_REPLY_TIMEOUT": "0.2"}) as api:
        api.post("/get_varifycode", {"email": address()}, headers={"traceparent": PARENT})
        [pushed] = (json.loads(each) for each in rig.broker.lrange("verification", 0, -1))
        assert {"traceparent", "tracestate"} & pushed["headers"].keys() == set()
        worker = rig.add_worker()
        rig.settled()
        assert worker.stop() == 0
        api.signal(signal.SIGTERM)
        assert api.wait() == 0
    loaded = [set(json.loads(path.read_text())) for path in tmp_path.glob("*.json")]
    assert [{"worker.service", "producer.api.server"} & each for each in loaded if "producer.settings" in each] != []
    assert {"worker.service", "producer.api.server"} <= set.union(*loaded)
    assert [name for each in loaded for name in each if name.startswith(LOADED)] == []


def test_the_env_file_may_set_the_variables_and_console_prints_spans(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    worker = WorkerProcess({**rig.settings, "OTEL_TRACES_EXPORTER": "", "OTEL_TRACES_SAMPLER": ""}, log_level="INFO")
    lines = "OTEL_TRACES_EXPORTER=console\nOTEL_SERVICE_NAME=from-the-file\n"
    Path(worker.log_path.parent, ".env").write_text(lines)
    try:
        worker.start()
        assert rig.caller.ask(address())["error"] == 0
        assert worker.stop() == 0
        assert '"name": "process verification"' in worker.log
        assert "from-the-file" in worker.log
    finally:
        worker.close()


# Another application, which has set up OpenTelemetry for itself ("own"), only imported it ("api"), or neither.
_APPLICATION = """
import sys
from producer.client import VerificationClient
kind, redis_url = sys.argv[1:]
if kind != "none":
    from opentelemetry import trace
if kind == "own":
    from opentelemetry.sdk.trace import TracerProvider
    trace.set_tracer_provider(TracerProvider())
with VerificationClient() as client:
    if kind == "own":
        with trace.get_tracer("theirs").start_as_current_span("sign up") as span:
            client.enqueue("a@example.com")
            print(format(span.get_span_context().trace_id, "032x"))
    else:
        client.enqueue("a@example.com")
        print("producer.tracing.spans" in sys.modules)
"""


@pytest.mark.parametrize(
    ("kind", "switch"), [("own", ""), pytest.param("api", "otlp", marks=pytest.mark.slow), ("none", "otlp")]
)
def test_a_client_joins_the_applications_tracing_and_sets_up_none(
    new_rig: Callable[..., Rig], kind: str, switch: str
) -> None:
    rig = new_rig()
    environment = {**os.environ, **rig.settings, "PYTHONPATH": str(ROOT), "OTEL_TRACES_EXPORTER": switch}
    done = subprocess.run(
        [sys.executable, "-c", _APPLICATION, kind, rig.server.url()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said, header = done.stdout.strip(), json.loads(rig.broker.rpop("verification"))["headers"].get("traceparent")  # type: ignore[arg-type]  # one message
    if kind == "own":
        assert header.split("-")[:2] == ["00", said]
    else:
        assert (said, header) == ("False", None)

"""Audit events: each is counted, and logged without a whole address, a key, or more lines than a disk can bear."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import doc_pages as pages

from producer.api.counts import ApiMetrics
from producer.audit import LINES, Audit, AuditEvent

# What each event's method, which has its name, is called with.
ARGUMENTS: dict[AuditEvent, tuple[object, ...]] = {
    AuditEvent.CODE_BURNT: ("anna@example.com",),
    AuditEvent.BUCKET_EMPTY: ("address", "anna@example.com"),
    AuditEvent.WRONG_KEY: ("http", "192.0.2.1"),
    AuditEvent.MAILBOX_SUPPRESSED: ("anna@example.com",),
    AuditEvent.MESSAGE_TOO_LARGE: (70_000,),
}


def lines(caplog: pytest.LogCaptureFixture, use: Callable[[Audit], None]) -> list[logging.LogRecord]:
    """What is logged while an `Audit` is used, until the end of the period."""

    async def main() -> None:
        audit = Audit()
        use(audit)
        audit.flush()

    with caplog.at_level(logging.WARNING, "verifyserver.audit"):
        asyncio.run(main())
    return caplog.records


def fields_of(event: AuditEvent) -> set[str]:
    """Those that the operators' page lists."""
    [row] = [row for row in pages.rows("docs/operations.md", "Audit events") if row[0] == f"`{event}`"]
    return set(re.findall(r"`(\w+)`", row[-1]))


def test_the_operators_page_lists_every_event() -> None:
    assert {row[0].strip("`") for row in pages.rows("docs/operations.md", "Audit events")} == set(AuditEvent)


@pytest.mark.parametrize("event", AuditEvent)
def test_a_process_writes_the_fields_that_the_page_lists(event: AuditEvent) -> None:
    program = (
        "import asyncio, sys; from producer import logs; from producer.audit import Audit; logs.configure()\n"
        f"async def main(): Audit().{event}(*{ARGUMENTS[event]!r})\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    line = json.loads(done.stderr)
    assert line.keys() == {"event", "logger", "level", "timestamp"} | fields_of(event)
    assert "anna@" not in done.stderr


@pytest.mark.parametrize("event", AuditEvent)
def test_an_event_is_one_warning_with_its_name(event: AuditEvent, caplog: pytest.LogCaptureFixture) -> None:
    [line] = lines(caplog, lambda audit: getattr(audit, event)(*ARGUMENTS[event]))
    assert (line.name, line.levelno, line.getMessage()) == ("verifyserver.audit", logging.WARNING, event.value)
    assert vars(line).get("email", "a***@example.com") == "a***@example.com"


def test_one_kind_of_event_never_hides_another(caplog: pytest.LogCaptureFixture) -> None:
    def flood(audit: Audit) -> None:
        for _ in range(LINES + 5000):
            audit.bucket_empty("address", "anna@example.com")
        audit.wrong_key("grpc", "192.0.2.1")

    found = lines(caplog, flood)
    assert Counter(line.getMessage() for line in found) == {"bucket_empty": LINES + 1, "wrong_key": 1}
    assert [vars(line)["more"] for line in found if "more" in vars(line)] == [5000]


def test_every_event_is_exported_from_the_start() -> None:
    async def main() -> bytes:
        audit = Audit()
        audit.code_burnt("anna@example.com")
        page = ApiMetrics(audit).render(None)
        audit.flush()
        return page

    page = asyncio.run(main()).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    counts = {
        sample.labels["event"]: sample.value
        for sample in families["verify_audit_events"].samples
        if sample.name.endswith("_total")
    }
    assert counts == {**dict.fromkeys(AuditEvent, 0), AuditEvent.CODE_BURNT: 1}
    assert "anna" not in page

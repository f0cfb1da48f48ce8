"""The worker's log of requests: one line each, and a sum where there are too many."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import pytest

from producer.contract import ErrorCode, VerifyRequest
from worker import request_log
from worker.job import Job
from worker.request_log import LINES, RequestLog

LOGGER = "worker.request_log"


def job(name: str) -> Job:
    return Job(name, "tag", VerifyRequest(f"{name}@example.com"), None, None)


def run(caplog: pytest.LogCaptureFixture, level: int, use: Callable[[RequestLog], None]) -> list[logging.LogRecord]:
    """What a `RequestLog` writes while it is used, until the end of the period."""

    async def main() -> None:
        log = RequestLog()
        use(log)
        log.flush()

    with caplog.at_level(level, LOGGER):
        asyncio.run(main())
    return caplog.records


def test_each_request_is_one_line_with_a_masked_address(caplog: pytest.LogCaptureFixture) -> None:
    [line] = run(caplog, logging.INFO, lambda log: log.settled([(job("anna"), ErrorCode.TIMEOUT), (job("bob"), None)]))
    assert line.levelno == logging.INFO
    assert vars(line).items() >= {"request_id": "anna", "email": "a***@example.com", "error": "Timeout"}.items()
    assert vars(line)["seconds"] >= 0


@pytest.mark.parametrize(("level", "at_debug"), [(logging.INFO, 0), (logging.DEBUG, 1000)])
def test_beyond_a_bound_requests_are_summed_up(level: int, at_debug: int, caplog: pytest.LogCaptureFixture) -> None:
    requests: list[tuple[Job, ErrorCode | None]] = [(job("a"), ErrorCode.SUCCESS)] * (LINES + 997)
    requests += [(job("b"), ErrorCode.MAIL_REJECTED)] * 3
    *lines, total = run(caplog, level, lambda log: log.settled(requests))
    assert Counter(line.levelno for line in lines) == Counter({logging.INFO: LINES, logging.DEBUG: at_debug})
    assert total.getMessage() == "more requests answered: Success 997, MailRejected 3"
    assert vars(total)["count"] == 1000


def test_each_period_begins_anew(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "PERIOD", 0.01)

    async def main() -> None:
        log = RequestLog()
        for _ in range(2):
            log.settled([(job("a"), ErrorCode.SUCCESS)] * (LINES + 1))
            await asyncio.sleep(0.02)  # the loop runs timers in their order, so the period is over

    with caplog.at_level(logging.INFO, LOGGER):
        asyncio.run(main())
    assert len(caplog.records) == 2 * (LINES + 1)


def test_a_worker_that_logs_warnings_only_logs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    assert run(caplog, logging.WARNING, lambda log: log.settled([(job("a"), ErrorCode.SUCCESS)])) == []

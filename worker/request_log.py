"""Logs how each request was answered, without drowning the log under load."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from producer.contract import ErrorCode
from producer.logs import mask_email
from worker.job import Finished

logger = logging.getLogger(__name__)

LINES: Final = 20  # at INFO, in each period
PERIOD: Final = 1.0  # seconds


class RequestLog:
    """Subscribes to the settler. Each request is one INFO line, or one DEBUG line beyond LINES in a PERIOD.

    One more INFO line at the end of that period says how many of the latter there were, and with which error codes.
    """

    def __init__(self) -> None:
        self._lines = 0  # so far in this period
        self._summed: Counter[ErrorCode] = Counter()
        self._period: asyncio.TimerHandle | None = None  # begins with the first request

    def settled(self, finished: Finished) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        for job, error in finished:
            if error is None:  # it was not answered
                continue
            if self._period is None:
                self._period = asyncio.get_running_loop().call_later(PERIOD, self.flush)
            if self._lines < LINES:
                level = logging.INFO
                self._lines += 1
            else:
                level = logging.DEBUG
                self._summed[error] += 1
            if not logger.isEnabledFor(level):
                continue
            extra = {
                "request_id": job.request_id,
                "email": mask_email(job.request.email),
                "error": error.title,
                "seconds": round(asyncio.get_running_loop().time() - job.began, 3),
            }
            logger.log(level, "request answered", extra=extra)

    def flush(self) -> None:
        """End the period, with the line that sums up."""
        if self._period is not None:
            self._period.cancel()
            self._period = None
        self._lines = 0
        if self._summed:
            counts = ", ".join(f"{error.title} {count}" for error, count in sorted(self._summed.items()))
            logger.info("more requests answered: %s", counts, extra={"count": self._summed.total()})
            self._summed.clear()

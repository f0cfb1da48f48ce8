"""Logs how each request was answered, without drowning the log under load."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from producer.contract import ErrorCode
from producer.line_limit import LineLimit
from producer.masking import mask_email
from worker.job import Finished

logger = logging.getLogger(__name__)

LINES: Final = 20  # at INFO, in each period
PERIOD: Final = 1.0  # seconds


class RequestLog:
    """Subscribes to the settler. Each request is one INFO line, or one DEBUG line beyond LINES in a PERIOD.

    One more INFO line at the end of that period says how many of the latter there were, and with which error codes.
    """

    def __init__(self) -> None:
        self._limit = LineLimit(LINES, PERIOD, _sum_up)

    def settled(self, finished: Finished) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        for job, error in finished:
            if error is None:  # it was not answered
                continue
            level = logging.INFO if self._limit.admits(error) else logging.DEBUG
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
        self._limit.flush()


def _sum_up(left_out: Counter[ErrorCode]) -> None:
    counts = ", ".join(f"{error.title} {count}" for error, count in sorted(left_out.items()))
    logger.info("more requests answered: %s", counts, extra={"count": left_out.total()})

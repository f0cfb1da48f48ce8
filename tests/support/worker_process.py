"""A worker as an operator starts it: `celery -A worker.app worker`."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

from support.process import START_TIMEOUT, Process, own_environment

STOP_WITHIN: Final = 15.0  # seconds after SIGTERM: the contract's bound


class WorkerProcess(Process):
    """One worker, which is ready when it says so."""

    def __init__(
        self, settings: Mapping[str, str], *, log_level: str = "DEBUG", options: Sequence[str] | None = None
    ) -> None:
        """`settings`: the environment's `VERIFY_*`. `options`: words for the command line, instead of a node name."""
        self.name = f"w{uuid.uuid4().hex[:8]}@test"
        words = ["-A", "worker.app", "worker", "-l", log_level, *(["-n", self.name] if options is None else options)]
        super().__init__("worker", [sys.executable, "-m", "celery", *words], own_environment(settings))

    def wait_until_ready(self) -> None:
        self.wait_for_log(" ready.", START_TIMEOUT)

    @property
    def metrics_url(self) -> str:
        """The address of its metrics, from its log."""
        self.wait_for_log("metrics are at ")
        return str(re.findall(r"metrics are at (http://\S+/metrics)", self.log)[-1])

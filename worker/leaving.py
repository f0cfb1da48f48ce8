"""One request on its way out, as settle knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from producer.contract import ErrorCode
from producer.script import Command
from worker.job import Job


@dataclass(slots=True)
class Leaving:
    """One request on its way out: the steps that are left."""

    job: Job
    error: ErrorCode | None = None  # what it is answered
    mark: ErrorCode | Literal["failed", "unknown"] | None = None
    asks: bool = False  # the mark is a question too: the request may have its answer already
    unmarkable: bool = False  # the mark was refused; the rest need not wait for it
    reply: bool = False
    leave: Command | None = None
    ack: bool = False
    until: float = 0.0

    def doubtful(self) -> bool:
        """Whether the mark's answer decides about the reply: the lease has lapsed, so another may have taken over."""
        if self.mark is None or self.unmarkable:
            return False
        lease = self.job.lease_until
        lapsed = 0 < lease <= asyncio.get_running_loop().time()
        return self.asks or (lapsed and self.error not in {None, ErrorCode.SUCCESS})

    @property
    def marked(self) -> bool:
        """Whether reply and leave may follow."""
        return self.mark is None or self.unmarkable

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return not self.reply and self.leave is None and not self.ack and self.marked

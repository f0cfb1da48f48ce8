"""The intake's word to whoever watches."""

from __future__ import annotations

from typing import Any

from worker.job import Finished, Job


class Watcher:
    """What the intake tells Celery's side, in batches. Called on the intake's loop."""

    def received(self, jobs: list[Job]) -> None:
        """These requests are about to be served."""

    def done(self, finished: Finished) -> None:
        """These requests are off this worker's hands."""

    def to_celery(self, message: dict[str, Any]) -> None:
        """This message needs Celery's own machinery; its delivery tag is the reservation's."""

    def is_revoked(self, request_id: str) -> bool:
        """Whether an operator revoked the request."""
        del request_id
        return False

    def give_up(self, reason: str) -> None:
        """The service cannot work at all."""

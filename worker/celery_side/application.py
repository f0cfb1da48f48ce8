"""The Celery app, and through it what the parts that Celery makes itself (consumer, backend, requests) share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery import Celery

from producer.errors import VerifyError
from producer.settings import Settings

if TYPE_CHECKING:
    from worker.celery_side.bridge import Bridge


class VerifyApp(Celery):  # type: ignore[misc]  # Celery ships no types
    """Celery constructs its parts by name and hands them nothing of ours, except the app: so this carries it."""

    def __init__(self, settings: Settings, config: object) -> None:
        """`config`: the module celeryconfig."""
        super().__init__("verifyserver")
        self.config_from_object(config)
        self.settings = settings
        self.running_bridge: Bridge | None = None  # set while a worker serves
        self.masks_results = False  # set in Flower's process, which shows results to people

    @property
    def bridge(self) -> Bridge:
        """The running worker's. Raises `VerifyError` outside one."""
        if self.running_bridge is None:
            raise VerifyError("verification.send_code runs in a worker only: celery -A worker.app worker")
        return self.running_bridge

"""The Celery app: `celery -A worker.app worker`, `celery -A worker.app flower`."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from typing import Any

import click
from celery import Celery, signals
from click.core import ParameterSource

import celeryconfig
from producer import logs, masking
from producer.errors import VerifyError
from producer.settings import exit_on_bad_setting
from producer.tracing import setup as traces
from worker.bootstrap import SERVICE
from worker.celery_side import (
    control,  # noqa: F401 - importing it replaces Celery's inspect commands by ours
    transport,
)
from worker.celery_side.bridge import Bridge
from worker.celery_side.events import CeleryEvents
from worker.celery_side.flower import QueueLengths
from worker.contact import BrokerContact
from worker.mail.render import check_locale
from worker.tasks import SendCode

EXIT_WITHIN = 14.0  # seconds; the contract says 15

logger = logging.getLogger(__name__)


class VerifyApp(Celery):  # type: ignore[misc]  # Celery ships no types
    """Carries what the parts that Celery makes itself (consumer, backend, requests) share: they get only the app."""

    events_cls = CeleryEvents
    settings = celeryconfig._settings  # noqa: SLF001 - private, as Flower would show it
    broker_contact = BrokerContact(settings.broker_url)
    running_bridge: Bridge | None = None  # set while a worker serves
    masks_results = False  # set in Flower's process, which shows results to people

    @property
    def bridge(self) -> Bridge:
        """The running worker's. Raises `VerifyError` outside one."""
        if self.running_bridge is None:
            raise VerifyError("verification.send_code runs in a worker only: celery -A worker.app worker")
        return self.running_bridge


transport.register(VerifyApp.settings.broker_url)
app = VerifyApp("verifyserver")
app.config_from_object(celeryconfig)
send_code = app.register_task(SendCode())


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logs(loglevel: int | str | None = None, **_: Any) -> None:
    logs.configure(loglevel or logging.INFO)


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _before_start(instance: Any, options: dict[str, Any], **_: Any) -> None:
    # The service runs on one loop in the worker's own process, which a forked or green pool would break.
    pool = options.get("pool")
    if pool is not None and pool.__module__ not in {"celery.concurrency.thread", "celery.concurrency.solo"}:
        sys.stderr.write("--pool: the worker runs with threads only, which is the default; leave the option out\n")
        raise SystemExit(2)
    # Celery's default name is the same for every worker of a host, and `inspect` warns of two with one name.
    context = click.get_current_context(silent=True)
    if context is not None and context.get_parameter_source("hostname") is ParameterSource.DEFAULT:
        instance.hostname = f"worker-{os.getpid()}@{instance.hostname.partition('@')[2]}"
    masking.allow_node_name(instance.hostname)
    with exit_on_bad_setting():
        check_locale(app.settings.locale)
    traces.set_up_or_exit(SERVICE)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _check_queues(instance: Any, **_: Any) -> None:
    queue, taken = app.settings.queue, list(instance.app.amqp.queues.consume_from)
    if queue not in taken:
        logger.warning(
            "queue %s is not among -Q %s: this worker serves no verification requests", queue, ",".join(taken)
        )


@signals.import_modules.connect  # type: ignore[untyped-decorator]
def _before_flower(**_: Any) -> None:
    """Mask what Flower logs, and the results that it shows. Its process runs no worker."""
    context = click.get_current_context(silent=True)
    if context is not None and context.info_name == "flower":
        logs.configure(logging.getLogger().level)
        logging.getLogger("flower.command").setLevel(logging.INFO)  # its DEBUG line shows the secret of its cookies
        app.masks_results = True
        import flower.utils.broker  # noqa: PLC0415 - a worker need not load Flower

        flower.utils.broker.RedisSentinel = functools.partial(QueueLengths, app.settings.broker_url)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _exit_in_time(**_: Any) -> None:
    """With Redis frozen, each of Celery's last commands waits for its whole timeout, one after the other."""

    def end() -> None:
        logger.critical("the shutdown takes too long; requests in hand will be redelivered")
        os._exit(1)

    timer = threading.Timer(EXIT_WITHIN, end)
    timer.daemon = True
    timer.start()

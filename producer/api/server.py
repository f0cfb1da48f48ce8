"""The API server: HTTP and gRPC in one process, on one event loop; and how it shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

import uvicorn

from producer.api.binding import (
    CONNECTIONS_LIMIT,
    LISTEN_BACKLOG,
    PROBE_BIND,
    accept_waiting,
    is_loopback,
    listen,
    require_permission,
)
from producer.api.grpc import GrpcServer
from producer.api.http import make_app
from producer.api.http_connection import HttpConnections
from producer.api.shared_port import SharedPorts
from producer.api.state import Api
from producer.api.tls import Certificates, certificates
from producer.errors import RedisLoginRefused
from producer.redis.protocol import LOGIN_SETTINGS
from producer.setting_types import Bind
from producer.settings import Settings
from producer.tracing.setup import LAST_EXPORT, set_up

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

logger = logging.getLogger(__name__)

DRAIN_REPLIES: Final = 7.5  # seconds of a shutdown in which replies may still come; then callers get Timeout
DRAIN_TOTAL: Final = 9.0  # seconds after which a shutdown ends, whoever is still connected; 10 are promised
_OTHER_FILES: Final = 100  # that a process opens beside its connections
_KEEP_ALIVE: Final = 75.0  # seconds of an idle connection; more than nginx's 60, which must be the first to close


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: HTTP and gRPC shut down together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop_listening(self) -> None:
        for each in self.servers:
            each.close()


def serve(settings: Settings, *, share_port: bool = False, probe_bind: Bind | None = None) -> None:
    """Serve until SIGTERM or SIGINT, and return once everything that was accepted is answered.

    `share_port`: together with other processes that have it; `probe_bind`: where HTTP listens for this process alone,
    too. Raises `CannotListen`, `CannotShare` or `BadSetting`. A second signal ends the process at once.
    """
    require_permission(settings, probe_bind)
    shared = SharedPorts() if share_port else None
    tls = certificates(settings)
    traces = set_up("verifyserver-api")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # its INFO is chatter
    connections = connections_limit(_raise_file_limit())
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, traces, tls, connections, shared, probe_bind))


async def _serve(
    settings: Settings,
    traces: Traces | None,
    tls: Certificates | None,
    limit: int,
    shared: SharedPorts | None,
    probe_bind: Bind | None,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    sockets = listen(settings.http_bind, "VERIFY_HTTP_BIND", shared)
    http_bind = Bind(settings.http_bind.host, sockets[0].getsockname()[1])
    api = Api(settings, traces)
    grpc = GrpcServer(api, limit)
    connections = HttpConnections(limit, tls.http_context() if tls else None, partial(api.metrics.evicted, "http"))
    http = _HttpServer(
        uvicorn.Config(
            make_app(api, f"{'https' if tls else 'http'}://{_reachable(http_bind)}"),
            http=connections.new,  # type: ignore[arg-type]  # a type, says uvicorn; it only calls it
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # a path may hold an address
            server_header=False,
            proxy_headers=False,  # nothing here depends on who asks
            backlog=LISTEN_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,  # type: ignore[arg-type]  # it is handed to call_later
        )
    )
    http_task: asyncio.Task[None] | None = None
    try:
        if probe_bind is not None:
            probe_sockets = listen(probe_bind, PROBE_BIND)
            probe_bind = Bind(probe_bind.host, probe_sockets[0].getsockname()[1])
            sockets += probe_sockets
        grpc_sockets = listen(settings.grpc_bind, "VERIFY_GRPC_BIND", shared)
        grpc_port = grpc_sockets[0].getsockname()[1]
        await grpc.start(grpc_sockets, tls)
        http_task = asyncio.create_task(http.serve(sockets=sockets))
        while not http.started and not http_task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        if shared is not None:
            shared.serve()
        how = ("" if tls is None else " with TLS") + ("" if shared is None else ", which it shares")
        logger.info("the HTTP API listens on %s%s", http_bind, how)
        if probe_bind is not None:
            logger.info("this process alone answers HTTP on %s", probe_bind)
        if settings.demo and not is_loopback(settings.http_bind, "VERIFY_HTTP_BIND"):
            logger.warning("VERIFY_DEMO: whoever opens the page at / can read its inbox, with the codes in it")
        logger.info("the gRPC API listens on %s%s", Bind(settings.grpc_bind.host, grpc_port), how)
        report, stopping = asyncio.create_task(_report_readiness(api)), asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, http_task], return_when=asyncio.FIRST_COMPLETED)
        report.cancel()
        logger.info("shutting down: accepted requests are still answered")
        api.leaving = True
        await grpc.announce_shutdown()
        await accept_waiting([*sockets, *grpc_sockets])
        http.stop_listening()
        grpc.stop_listening()
        if shared is not None:
            shared.close()
        await _drain(api, http, http_task, connections, grpc)
    finally:
        for each in sockets:
            each.close()
        await grpc.stop(0)
        await api.close()
        if traces is not None:
            traces.close().join(LAST_EXPORT)
    logger.info("stopped")


async def _drain(
    api: Api, http: _HttpServer, http_task: asyncio.Task[None], connections: HttpConnections, grpc: GrpcServer
) -> None:
    """Answer what was accepted, and what clients send before they can know that this process ends."""

    async def drain_http() -> None:
        await connections.take_last_requests()
        http.should_exit = True
        await http_task

    servers = asyncio.gather(drain_http(), grpc.stop(DRAIN_TOTAL))
    done, _ = await asyncio.wait([servers], timeout=DRAIN_REPLIES)
    if not done:
        await api.client.close()  # answers Timeout to whoever still waits
        done, _ = await asyncio.wait([servers], timeout=DRAIN_TOTAL - DRAIN_REPLIES)
    if not done:
        http.force_exit = True
        servers.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await servers
    elif (failure := servers.exception()) is not None:
        logger.error("unexpected error while shutting down", extra={"kind": type(failure).__name__})


async def _report_readiness(api: Api) -> None:
    """Log what is still missing at the start. The API serves without it."""
    found = await api.readiness.find()
    if found.problem:
        refused = all(isinstance(error, RedisLoginRefused) for error in found.errors.values())
        what = LOGIN_SETTINGS if refused else "VERIFY_REDIS_URL"
        logger.warning("%s: check %s; until then requests are answered RedisErr", found.problem, what)
    elif not found.workers:
        logger.warning("no worker is alive; requests wait in the queue until one is (celery -A worker.app worker)")


def _reachable(bind: Bind) -> Bind:
    """Where a client on this host reaches what listens on `bind`."""
    return Bind({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind.host, bind.host), bind.port)  # noqa: S104 - replaced


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)
    stop.set()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop if it is installed: an HTTP check takes half the CPU on it, a gRPC call six sevenths."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def _raise_file_limit() -> int | None:
    """Allow as many open files as we may have: a thousand idle clients reach the usual soft limit.

    Returns how many that is; None where nobody says.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - not on every platform

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return None if hard == resource.RLIM_INFINITY else hard
    return None


def connections_limit(files: int | None) -> int:
    """How many connections HTTP and gRPC may have each, so that both together leave files for Redis and the rest.

    Without a file for a new connection, none could be closed to make room for it.
    """
    if files is None:
        return CONNECTIONS_LIMIT
    limit = min(CONNECTIONS_LIMIT, max(1, (files - _OTHER_FILES) // 2))
    if files >= 2 * CONNECTIONS_LIMIT:
        return limit
    logger.warning(
        "HTTP and gRPC take %d connections each, and not %d, because of the limit of %d open files: raise it to %d"
        " (ulimit -Hn)",
        *(limit, CONNECTIONS_LIMIT, files, 2 * CONNECTIONS_LIMIT),
    )
    return limit

"""Both doors in one process, on one event loop; and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

# gRPC's core would write lines of its own to stderr, past our logging and its masks. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import uvicorn

from producer.api.binding import BACKLOG, CannotListen, is_loopback, listen, readiness, require_permission
from producer.api.connection import Connection
from producer.api.context import Api
from producer.api.grpc import GrpcServer
from producer.api.http import make_app
from producer.setting_types import Bind
from producer.settings import Settings
from producer.tracing.setup import FAREWELL, set_up

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

logger = logging.getLogger(__name__)

ANSWERING: Final = 7.5  # seconds of a drain in which replies may still come; then who waits is told Timeout
LEAVING: Final = 9.0  # seconds after which a drain ends, whoever is still connected; 10 are promised
_KEEP_ALIVE: Final = 75.0  # seconds of an idle connection; above the 60 of nginx, which must be the first to close
_TICK: Final = 0.02  # seconds between two looks at what is in flight, while draining


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: two doors end together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to us."""
        yield


def serve(settings: Settings) -> None:
    """Open both doors, and return once SIGTERM or SIGINT came and all that was accepted is answered.

    Raises `CannotListen` if a door may not, or cannot, be opened. A second signal ends the process at once.
    """
    require_permission(settings)
    traces = set_up("verifyserver-doors")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # it tells of each step
    _allow_connections()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, traces))


async def _serve(settings: Settings, traces: Traces | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    sockets = listen(settings.http_bind, "VERIFY_HTTP_BIND")
    api = Api(settings, traces)
    rpc = GrpcServer(api)
    http = _Server(
        uvicorn.Config(
            make_app(api),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # a path may hold an address
            server_header=False,
            proxy_headers=False,  # nothing here depends on who asks
            backlog=BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,  # type: ignore[arg-type]  # it is handed to call_later
        )
    )
    http_task: asyncio.Task[None] | None = None
    try:
        readiness(settings.grpc_bind, "VERIFY_GRPC_BIND")
        try:
            grpc_port = await rpc.start(str(settings.grpc_bind))
        except RuntimeError:  # taken between our look and now
            raise CannotListen(f"VERIFY_GRPC_BIND: cannot listen on {settings.grpc_bind}") from None
        http_task = asyncio.create_task(http.serve(sockets=sockets))
        http_bind = Bind(settings.http_bind.host, sockets[0].getsockname()[1])
        logger.info("the HTTP door is open on %s", http_bind)
        if settings.demo and not is_loopback(settings.http_bind, "VERIFY_HTTP_BIND"):
            logger.warning("VERIFY_DEMO: whoever opens the page at / can read its inbox, with the codes in it")
        logger.info("the gRPC door is open on %s", Bind(settings.grpc_bind.host, grpc_port))
        looking, stopping = asyncio.create_task(_say_readiness(api)), asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, http_task], return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        logger.info("closing: what was accepted is answered")
        await _drain(api, http, http_task, rpc)
    finally:
        for each in sockets:
            each.close()
        await rpc.stop(0)
        await api.close()
        if traces is not None:
            traces.close().join(FAREWELL)
    logger.info("closed")


async def _drain(api: Api, http: _Server, http_task: asyncio.Task[None], rpc: GrpcServer) -> None:
    """Take nothing new, answer what was accepted."""
    api.leaving = True
    await rpc.say_goodbye()
    http.should_exit = True
    doors = asyncio.gather(http_task, _drain_rpc(api, rpc))
    done, _ = await asyncio.wait([doors], timeout=ANSWERING)
    if not done:
        await api.client.close()  # whose replies are not here yet are told that the outcome is unknown
        done, _ = await asyncio.wait([doors], timeout=LEAVING - ANSWERING)
    if not done:
        http.force_exit = True
        doors.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doors
    elif (failure := doors.exception()) is not None:
        logger.error("unforeseen error in closing", extra={"kind": type(failure).__name__})


async def _drain_rpc(api: Api, rpc: GrpcServer) -> None:
    stopping = asyncio.create_task(rpc.stop(LEAVING))
    while api.metrics.in_flight("grpc"):  # noqa: ASYNC110 - an event would cost every request, for the sake of one end
        await asyncio.sleep(_TICK)
    # Only streams are left, such as those that watch our health, which never end by themselves.
    await asyncio.sleep(5 * _TICK)
    await rpc.stop(_TICK)
    await stopping


async def _say_readiness(api: Api) -> None:
    """Whoever started this wants to know at once what is still missing; it serves without."""
    found = await api.readiness.find()
    away = [name for name in ("broker", "results", "codes") if not getattr(found, name)]
    if away:
        logger.warning("Redis cannot be reached (%s); requests are answered RedisErr until it can", ", ".join(away))
    elif not found.workers:
        logger.warning("no worker is alive; requests wait in the queue until one is (celery -A worker.app worker)")


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)
    stop.set()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where there is one: the gRPC door carries 1.3 times as much on it."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def _allow_connections() -> None:
    """As many open files as we may have: a thousand idle clients alone reach the usual soft limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - not on every platform

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""The blocking client, for threads: hands everything to one event loop on a thread of its own.

A blocking socket bounds each read, not the whole: a connection that trickles, or a slow name server, would break the
3 s in which "Redis cannot be reached" is promised. On a loop everything has one deadline, and many threads share one
connection each way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from producer.contract import DEFAULT_PURPOSE, CheckResult, Reply
from producer.core.requests import ClientCore, build_request
from producer.settings import Settings, load

CLOSE_TIMEOUT = 1.0  # seconds in which those who still wait at close() are told so

T = TypeVar("T")


class VerificationClient:
    """Asks for verification codes and checks them. One for the whole process; threads may share it, and wait at once.

    Opens its connections and its thread at the first use; a forked process opens its own. Use it as `with`, or
    `close()` it; one that is forgotten closes itself when it is collected. Every verb may raise `ServerTooOld`, and
    `RuntimeError` once the client is closed.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """`settings`: what is in force; read from the environment if not given, which may raise `BadSetting`."""
        self._settings = settings or load()
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None
        self._stop: Callable[[], object] = _nothing
        self._closed = False
        _clients.add(self)

    def request(self, email: Any, *, purpose: str = DEFAULT_PURPOSE, locale: str | None = None) -> Reply:
        """Ask for a code and wait until a relay accepted the mail or it is certain that none will.

        Answers within `VERIFY_REPLY_TIMEOUT` seconds (`TIMEOUT`: unknown, ask again), and within 3 s with `REDIS_ERR`
        if Redis cannot be reached; for neither does it raise. What is no address or no purpose is answered at once.
        A locale that is unknown, or not a string, means the worker's own. `email` comes back as it was given.
        """
        return self._run(lambda asker: asker.request(build_request(email, purpose, locale)))

    def enqueue(
        self, email: Any, *, purpose: str = DEFAULT_PURPOSE, locale: str | None = None, request_id: str | None = None
    ) -> str:
        """Ask for a code without waiting for the reply. Returns the request id once Redis has the request.

        The same `request_id` sent again is the same request: it brings no second mail. Raises `RedisUnavailable`
        within 3 s; the request may then be on the queue or not, and can be sent again with the same id. Raises
        `ValueError` for a `request_id` that is no printable string of 1 to 255 bytes, `TypeError` for an email that
        JSON cannot say.
        """
        return self._run(lambda asker: asker.enqueue(build_request(email, purpose, locale), request_id))

    def check(self, email: str, code: str, *, purpose: str = DEFAULT_PURPOSE) -> CheckResult:
        """Whether `code` is the live one: `SUCCESS` (and it is consumed), `VARIFY_CODE_ERR` or `VARIFY_EXPIRED`.

        `REDIS_ERR` within 3 s if Redis cannot be reached; the code may then be consumed or not.
        """
        return self._run(lambda asker: asker.check(email, code, purpose))

    def close(self) -> None:
        """Close the connections and end the thread. Requests that still wait are answered `TIMEOUT`."""
        with self._lock:
            self._closed = True
            self._thread = None
        self._stop()

    def _run(self, verb: Callable[[ClientCore], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._thread is None:
                self._thread = _LoopThread(self._settings)
                self._stop = weakref.finalize(self, self._thread.stop)
            future = self._thread.submit(verb)
        try:
            return future.result()
        finally:
            future.cancel()  # a caller that was interrupted leaves nothing; what is done stays done

    def _after_fork(self) -> None:
        # The lock may be held by a thread that does not exist here, and the loop belongs to the parent.
        self._lock = threading.Lock()
        if self._thread is not None:
            self._thread.disown()
            self._thread = None
            self._stop = _nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop on a daemon thread. Knows no client, so that a forgotten client can be collected."""

    def __init__(self, settings: Settings) -> None:
        self._process = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._settings = settings
        self._asker: ClientCore | None = None
        self._thread = threading.Thread(target=self._serve, name="verification-client", daemon=True)
        self._thread.start()

    def submit(self, verb: Callable[[ClientCore], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start the verb on the loop; a future of its outcome."""
        return asyncio.run_coroutine_threadsafe(self._with_asker(verb), self._loop)

    async def _with_asker(self, verb: Callable[[ClientCore], Coroutine[Any, Any, T]]) -> T:
        if self._asker is None:
            self._asker = ClientCore(self._settings)
        return await verb(self._asker)

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def stop(self) -> None:
        """Tell those who still wait, close the connections, end the thread."""
        if os.getpid() != self._process or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is not self._thread:  # a collector may run anywhere
            self._thread.join(2 * CLOSE_TIMEOUT)

    async def _end(self) -> None:
        try:
            if self._asker is not None:
                await self._asker.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=CLOSE_TIMEOUT)
        finally:
            self._loop.stop()

    def disown(self) -> None:
        """In a forked process: let go of the parent's sockets, without a word to the server or to the shared selector.

        An inherited socket would keep the parent's connection open after the parent closed it. Each descriptor is
        pointed elsewhere rather than closed: its number stays taken for the Python object that will close it.
        """
        nowhere = os.open(os.devnull, os.O_RDWR)
        numbers = [key.fd for key in list(self._selector.get_map().values())]
        if hasattr(self._selector, "fileno"):
            numbers.append(self._selector.fileno())
        for number in numbers:
            with contextlib.suppress(OSError):
                os.dup2(nowhere, number, inheritable=False)
        os.close(nowhere)


def _nothing() -> None:
    """What there is to stop before the first use."""


_clients: weakref.WeakSet[VerificationClient] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - this module's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

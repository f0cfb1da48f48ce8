"""The blocking client, for threads: runs the asyncio client on one event loop, on a thread of its own.

A blocking socket limits the time of each read but not of the whole answer: a server that trickles, or a slow name
server, would break the promise that "Redis cannot be reached" is said within 3 s. An event loop limits the whole, and
many threads share one connection each way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import selectors
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from producer.aio import AsyncVerificationClient
from producer.settings import Settings, load

CLOSE_TIMEOUT = 1.0  # seconds in which close() gets its answer to those who still wait

P = ParamSpec("P")
T = TypeVar("T")


def blocking(
    verb: Callable[Concatenate[AsyncVerificationClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[VerificationClient, P], T]:
    """The same verb for the blocking client: signature and documentation stay, and the caller waits."""

    @functools.wraps(verb)
    def wait(self: VerificationClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        future = self._start(lambda client: verb(client, *args, **kwargs))
        try:
            return future.result()
        finally:
            future.cancel()  # an interrupted caller leaves nothing behind; a future that is done stays done

    return wait


class VerificationClient:
    """Asks for verification codes and checks them. Make one for the whole process: all threads may share it.

    Opens its connections and its thread at the first use; a forked process opens its own. Use it with `with`, or
    `close()` it; a client that is garbage-collected closes itself. Every verb may raise `ServerTooOld`, and
    `RuntimeError` once the client is closed.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """`settings`: by default read from the environment, which may raise `BadSetting`."""
        self._settings = settings or load()
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None
        self._closed = False
        _clients.add(self)

    request = blocking(AsyncVerificationClient.request)
    enqueue = blocking(AsyncVerificationClient.enqueue)
    check = blocking(AsyncVerificationClient.check)

    def close(self) -> None:
        """Close the connections and end the thread. Requests that still wait are answered `TIMEOUT`."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    def _start(self, verb: Callable[[AsyncVerificationClient], Coroutine[Any, Any, T]]) -> Future[T]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._thread is None:
                self._thread = _LoopThread(self._settings)
                weakref.finalize(self, self._thread.stop)
            return asyncio.run_coroutine_threadsafe(verb(self._thread.client), self._thread.loop)

    def _after_fork(self) -> None:
        # The lock may be held by a thread that does not exist here, and the loop belongs to the parent.
        self._lock = threading.Lock()
        if self._thread is not None:
            self._thread.disown()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class _LoopThread:
    """An event loop on a daemon thread. It does not refer to its client, so that the client can be collected."""

    def __init__(self, settings: Settings) -> None:
        self._process = os.getpid()
        self._selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        self.client = AsyncVerificationClient(settings)
        self._thread = threading.Thread(target=self._serve, name="verification-client", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def stop(self) -> None:
        """Answer those who still wait, close the connections, end the thread."""
        if os.getpid() != self._process or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        if threading.current_thread() is not self._thread:  # the garbage collector may run on any thread
            self._thread.join(2 * CLOSE_TIMEOUT)

    async def _end(self) -> None:
        try:
            await self.client.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=CLOSE_TIMEOUT)
        finally:
            self.loop.stop()

    def disown(self) -> None:
        """In a forked process: let go of the parent's sockets without disturbing its connections or its selector.

        An inherited socket would keep the parent's connection open after the parent has closed it. Each descriptor is
        redirected rather than closed: its number stays taken until the Python object that owns it closes it.
        """
        nowhere = os.open(os.devnull, os.O_RDWR)
        numbers = [key.fd for key in list(self._selector.get_map().values())]
        if hasattr(self._selector, "fileno"):
            numbers.append(self._selector.fileno())
        for number in numbers:
            with contextlib.suppress(OSError):
                os.dup2(nowhere, number, inheritable=False)
        os.close(nowhere)


_clients: weakref.WeakSet[VerificationClient] = weakref.WeakSet()  # a fork concerns all clients of the process


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - this module's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

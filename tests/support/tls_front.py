"""TLS in front of a server that speaks none."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trustme


def context_for(host: str, authority_file: Path) -> ssl.SSLContext:
    """A server's context for `host`; the authority that vouches for it is written to `authority_file`."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host).configure_cert(context)
    authority.cert_pem.write_to_path(authority_file)
    return context


@asynccontextmanager
async def tls_in_front_of(target: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Listens with TLS and forwards to a port of this host; the port to connect to."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(copy(reader, to_server), copy(from_server, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as front:
        yield front.sockets[0].getsockname()[1]


@contextmanager
def tls_front(target: int, context: ssl.SSLContext) -> Iterator[int]:
    """The same on a thread of its own, for tests that run no loop."""
    opened: Future[tuple[int, asyncio.Task[None]]] = Future()

    async def run() -> None:
        async with tls_in_front_of(target, context) as port:
            task = asyncio.current_task()
            assert task is not None
            opened.set_result((port, task))
            await asyncio.sleep(3600)

    def work() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(run())  # which cancels what still serves a connection

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    port, task = opened.result(60)
    try:
        yield port
    finally:
        task.get_loop().call_soon_threadsafe(task.cancel)
        thread.join(60)

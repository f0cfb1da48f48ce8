"""TLS on one connection of the API, with limits on time and memory."""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any, Final

HANDSHAKE_TIMEOUT: Final = 10.0  # seconds
_CLOSE_TIMEOUT: Final = 2.0  # seconds for the client's close_notify


class TlsConnection(SSLProtocol):
    """asyncio's TLS, with one read buffer for all connections: uvloop's own keeps 256 kB for each.

    It tells of the connection as soon as it is accepted, before the handshake.
    """

    max_size = 4 * 1024  # bytes that are read at a time
    _buffer: Final = bytearray(max_size)  # what is read is taken out at once

    def __init__(
        self,
        application: asyncio.BufferedProtocol,
        context: ssl.SSLContext,
        on_made: Callable[[asyncio.Transport], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`on_made` is called with the transport below TLS."""
        no_waiter: Any = None
        super().__init__(
            *(asyncio.get_running_loop(), application, context, no_waiter),
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT,  # type: ignore[arg-type]  # it is handed to call_later
            ssl_shutdown_timeout=_CLOSE_TIMEOUT,
        )
        self._on_made = on_made
        self._on_lost = on_lost
        self._ssl_buffer = self._buffer
        self._ssl_buffer_view = memoryview(self._buffer)
        self._app_transport.set_read_buffer_limits(self.max_size)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # asyncio's own call
        self._on_made(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._on_lost()

"""Where the API listens, and who may reach it there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import select
import socket
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from producer.api.shared_port import CannotShare, SharedPorts, is_shared
from producer.errors import VerifyError
from producer.setting_types import Bind
from producer.settings import Settings

CONNECTIONS_LIMIT = 10_000  # of each protocol; beyond it, the oldest that never sent a whole request is closed
LISTEN_BACKLOG = 2048  # connections that may wait to be accepted; the kernel's own limit is often 4096
RECEIVE_BUFFER = 32 * 1024  # bytes that the kernel keeps for a connection that is not read; it takes twice as much
ACCEPT_TIMEOUT = 1.0  # seconds in which what waits to be accepted is, when the API shuts down

PROBE_BIND = "--probe-bind"

logger = logging.getLogger(__name__)


class CannotListen(VerifyError):
    """The API cannot listen where its settings say."""


def require_permission(settings: Settings, probe_bind: Bind | None = None) -> None:
    """Raises `CannotListen` if the API would serve other hosts without keys and no setting allows it.

    With keys and without TLS it only warns: in a container every address is beyond loopback, and a proxy may add TLS.
    """
    if settings.allow_plaintext:
        return
    binds = [(settings.http_bind, "VERIFY_HTTP_BIND"), (settings.grpc_bind, "VERIFY_GRPC_BIND")]
    binds += [] if probe_bind is None else [(probe_bind, PROBE_BIND)]
    for bind, name in binds:
        if is_loopback(bind, name):
            continue
        if not settings.api_keys:
            raise CannotListen(
                f"{name}: {bind} is beyond loopback; set VERIFY_API_KEYS,"
                " or VERIFY_ALLOW_PLAINTEXT=1 to listen there without"
            )
        if not settings.tls_cert:
            logger.warning(
                "%s: keys and codes reach %s unencrypted; set VERIFY_TLS_CERT and VERIFY_TLS_KEY,"
                " or VERIFY_ALLOW_PLAINTEXT=1 if a proxy in front speaks TLS",
                name,
                bind,
            )


def listen(bind: Bind, name: str, shared: SharedPorts | None = None) -> list[socket.socket]:
    """Listening sockets, one for each address of the host. Raises `CannotListen`; `name` is the setting's.

    With `shared`, processes that were given it may listen there together.
    """
    with contextlib.ExitStack() as opened:
        sockets = []
        port = bind.port
        for family, address in _addresses(bind, name):
            open_new = partial(_open, family, (address[0], port, *address[2:]))
            try:
                each = open_new() if shared is None else shared.listener(address[0], port, open_new)
            except CannotShare as exc:
                raise CannotListen(f"{name}: cannot share {bind} ({exc})") from None
            except OSError as exc:
                raise CannotListen(f"{name}: {_why_not(bind, address[0], exc, shared=shared is not None)}") from None
            opened.enter_context(each)
            port = each.getsockname()[1]  # port 0 picks one, which the other addresses then use
            sockets.append(each)
        opened.pop_all()
    return sockets


def _open(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # its connections have the same
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
        opened.pop_all()
    return listener


def _why_not(bind: Bind, address: str, exc: OSError, *, shared: bool) -> str:
    why = os.strerror(exc.errno or 0)
    if exc.errno == errno.EADDRINUSE and shared:
        return (
            f"cannot share {bind} ({why}): what listens there is no API with --share-port, or listens at another"
            " address; end it, or choose another port"
        )
    if exc.errno == errno.EADDRINUSE and is_shared(address, bind.port):
        return f"cannot listen on {bind} ({why}); the API there shares its port with those that have --share-port"
    return f"cannot listen on {bind} ({why})"


async def accept_waiting(listeners: Iterable[socket.socket]) -> None:
    """Let the servers on these sockets accept what waits there: to close a socket resets its queue."""
    queues = select.poll()
    for each in listeners:
        queues.register(each, select.POLLIN)
    deadline = time.monotonic() + ACCEPT_TIMEOUT
    while queues.poll(0) and time.monotonic() < deadline:  # noqa: ASYNC110 - the servers accept meanwhile
        await asyncio.sleep(0)


def is_loopback(bind: Bind, name: str) -> bool:
    """Whether only this host can connect. Raises `CannotListen`; `name` is the setting's."""
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _addresses(bind, name))


def _addresses(bind: Bind, name: str) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise CannotListen(f"{name}: the host of {bind} has no address") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))

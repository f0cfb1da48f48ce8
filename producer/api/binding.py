"""Where the API listens, and who may reach it there."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from typing import Any

from producer.errors import VerifyError
from producer.setting_types import Bind
from producer.settings import Settings

CONNECTIONS_LIMIT = 10_000  # of each protocol; beyond it, the oldest that never sent a whole request is closed
LISTEN_BACKLOG = 2048  # connections that may wait to be accepted; the kernel's own limit is often 4096
RECEIVE_BUFFER = 32 * 1024  # bytes that the kernel keeps for a connection that is not read; it takes twice as much

logger = logging.getLogger(__name__)


class CannotListen(VerifyError):
    """The API cannot listen where its settings say."""


def require_permission(settings: Settings) -> None:
    """Raises `CannotListen` if the API would serve other hosts without keys and no setting allows it.

    With keys and without TLS it only warns: in a container every address is beyond loopback, and a proxy may add TLS.
    """
    if settings.allow_plaintext:
        return
    for bind, name in ((settings.http_bind, "VERIFY_HTTP_BIND"), (settings.grpc_bind, "VERIFY_GRPC_BIND")):
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


def listen(bind: Bind, name: str) -> list[socket.socket]:
    """Listening sockets, one for each address of the host. Raises `CannotListen`; `name` is the setting's."""
    with contextlib.ExitStack() as opened:
        sockets = []
        port = bind.port
        for family, address in _addresses(bind, name):
            try:
                each = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # its connections have the same
                if family == socket.AF_INET6:
                    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                each.bind((address[0], port, *address[2:]))
                each.listen(LISTEN_BACKLOG)
            except OSError as exc:
                raise CannotListen(f"{name}: cannot listen on {bind} ({os.strerror(exc.errno or 0)})") from None
            port = each.getsockname()[1]  # port 0 picks one, which the other addresses then use
            sockets.append(each)
        opened.pop_all()
    return sockets


def is_loopback(bind: Bind, name: str) -> bool:
    """Whether only this host can connect. Raises `CannotListen`; `name` is the setting's."""
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _addresses(bind, name))


def _addresses(bind: Bind, name: str) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise CannotListen(f"{name}: the host of {bind} has no address") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))

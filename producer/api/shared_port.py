"""Several API processes on one port, so that one can replace another and no connection is lost.

They share the listening socket itself. A process that starts asks one that runs for it, over a Unix socket whose name
holds the address, and gets that Unix socket as well, so that it can be asked in turn. So there is one queue of
connections: whichever process is free takes the next one, and the kernel closes the queue with the last process.

SO_REUSEPORT would give each process a queue of its own, which is reset when the process ends, with the connections in
it and the handshakes that have not finished; a frozen process would keep its share of new connections waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from producer.errors import VerifyError

ANSWER_TIMEOUT: Final = 5.0  # seconds for the process that is asked
_PAUSE: Final = 0.01  # seconds before another process that starts or ends right now is looked at again
_SILENT: Final = "the API that listens there does not answer; end it"
_CREDENTIALS: Final = struct.Struct("3i")  # process id, user id, group id


class CannotShare(VerifyError):
    """The port cannot be shared."""


class SharedPorts:
    """The listening sockets that this process shares with others."""

    def __init__(self) -> None:
        """Raises `CannotShare` where the system has no such sockets."""
        if sys.platform != "linux":
            raise CannotShare("--share-port needs Linux")
        self._offers: list[tuple[socket.socket, socket.socket]] = []  # where others ask, and what they get

    def listener(self, address: str, port: int, open_new: Callable[[], socket.socket]) -> socket.socket:
        """The socket that listens there: the one of a process that runs, or else a new one.

        Raises `CannotShare`, and what `open_new` raises.
        """
        requests = None
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while port:
            found = _ask(address, port, deadline)
            if found is not None:
                self._offers.append(found)
                return found[1]
            requests = _claim(address, port)  # of several processes that start at once, one gets it
            if requests is not None:
                break
            if time.monotonic() > deadline:
                raise CannotShare(_SILENT)
            time.sleep(_PAUSE)
        try:
            listener = open_new()
        except BaseException:
            if requests is not None:
                requests.close()
            raise
        if requests is None:  # port 0: what it became is known now, and nobody else's
            requests = _claim(address, listener.getsockname()[1])
        if requests is not None:
            requests.listen()
            self._offers.append((requests, listener))
        return listener

    def serve(self) -> None:
        """Answer other processes, on the running loop."""
        for requests, listener in self._offers:
            requests.setblocking(False)
            asyncio.get_running_loop().add_reader(requests, _hand_over, requests, listener)

    def close(self) -> None:
        """Answer nobody any more. The sockets that listen on TCP must be closed before."""
        for requests, _ in self._offers:
            asyncio.get_running_loop().remove_reader(requests)
            requests.close()
        self._offers.clear()


def _claim(address: str, port: int) -> socket.socket | None:
    """The socket where others will ask for this address; None if another process has it, which begins or ends."""
    requests = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        requests.bind(_name(address, port))
    except OSError:
        requests.close()
        return None
    return requests


def is_shared(address: str, port: int) -> bool:
    """Whether a process listens there that would share the port."""
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(_name(address, port))
        except OSError:
            return False
    return True


def _ask(address: str, port: int, deadline: float) -> tuple[socket.socket, socket.socket] | None:
    """What a process that listens there hands over; None if none does. Raises `CannotShare`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(max(_PAUSE, deadline - time.monotonic()))
        try:
            asking.connect(_name(address, port))
            if not _is_ours(asking):
                raise CannotShare("the API that listens there belongs to another user; start this one as that user")
            _, files, _, _ = socket.recv_fds(asking, 1, 2, socket.MSG_CMSG_CLOEXEC)
        except (TimeoutError, BlockingIOError):
            raise CannotShare(_SILENT) from None
        except ConnectionError:
            return None
    if len(files) != 2:  # it was about to end
        return None
    requests, listener = (socket.socket(fileno=each) for each in files)
    return requests, listener


def _hand_over(requests: socket.socket, listener: socket.socket) -> None:
    try:
        asking, _ = requests.accept()
    except OSError:  # another process has answered
        return
    with asking, contextlib.suppress(OSError):
        if _is_ours(asking):
            socket.send_fds(asking, [b"\0"], [requests.fileno(), listener.fileno()])


def _is_ours(peer: socket.socket) -> bool:
    """Whether the process at the other end runs as our user: any local process may use the name."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())


def _name(address: str, port: int) -> str:
    """A name in Linux' abstract namespace, which is the network's own and needs no file."""
    return f"\0verifyserver-api/{address}/{port}"

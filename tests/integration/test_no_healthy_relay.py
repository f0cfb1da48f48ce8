"""A real worker whose only relay is down: the API does not make its callers wait for what cannot come."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from support.api_process import ApiProcess
from support.process import eventually
from support.rig import Rig
from support.smtp_server import HOST, ScriptedServer, running

REPLY_TIMEOUT = 50  # seconds; nothing below may wait for as long


def test_callers_are_answered_early_and_the_mails_go_out_later(new_rig: Callable[..., Rig]) -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    rig = new_rig(relays=f"smtp://{HOST}:{port}", reply_timeout=REPLY_TIMEOUT)
    rig.add_worker()
    emails = [f"u{number}@example.com" for number in range(9)]
    with ApiProcess(rig.settings) as api, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        assert api.get_code(emails[0])["error"] == 6  # its own failure tells the worker that the relay is down
        calls, posts = pool.map(api.call, emails[1:5]), pool.map(api.get_code, emails[5:])
        assert [each.error for each in calls] + [each["error"] for each in posts] == [6] * 8
        assert api.call("nobody").error == api.get_code("nobody")["error"] == 3
        assert time.monotonic() - began < REPLY_TIMEOUT
        with running(ScriptedServer(), port) as relay:
            eventually(lambda: sorted(mail.recipient for mail in relay.mails) == sorted(emails))
            assert api.get_code("later@example.com")["error"] == 0

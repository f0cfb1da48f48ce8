"""Redis, a relay, a worker and a caller, all real, wired for one module or one test; and what must hold after it."""

from __future__ import annotations

import base64
import email
import email.policy
import json
import re
from contextlib import ExitStack
from email.message import EmailMessage
from typing import Any, Self, cast

import redis

from support.caller import Caller, Listener
from support.process import eventually
from support.redis_server import RedisServer
from support.smtp_server import Act, Mail, ScriptedServer, running
from support.worker_process import WorkerProcess

CODE_LENGTH = 12  # as a rule of these tests: six digits are also in any timestamp of a log
# What no log of ours should have: bugs that were survived.
_LOUD = ("Traceback", "unforeseen", "never retrieved", "never awaited", "destroyed but it is pending")
_CODE = re.compile(r"(?:code is|验证码是) (\S+)")


def code_in(mail: Mail) -> str:
    """The code, as a reader of the text part finds it."""
    text = cast(EmailMessage, letter(mail).get_body(("plain",))).get_content()
    found = _CODE.search(text)
    assert found, text
    return found[1]


def letter(mail: Mail) -> EmailMessage:
    """The mail, parsed."""
    content = re.sub(rb"(?m)^\.\.", b".", mail.content)
    return email.message_from_bytes(content, policy=email.policy.default)


class Rig:
    """One of each, on ports of their own. Keyword arguments are settings: `code_ttl=2`."""

    def __init__(
        self,
        *,
        server: RedisServer | None = None,
        relay: ScriptedServer | None = None,
        log_level: str = "DEBUG",
        **settings: object,
    ) -> None:
        """`server`: one that runs already; `relay`: one that does not yet, in place of one that accepts all."""
        self._stack = ExitStack()
        self.server = server or self._stack.enter_context(RedisServer())
        self.relay = self._stack.enter_context(running(relay or ScriptedServer()))
        self.settings = {
            "VERIFY_REDIS_URL": self.server.url(),
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{self.relay.port}",
            "VERIFY_LOCALE": "en",
            "VERIFY_CODE_LENGTH": str(CODE_LENGTH),
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
            **{f"VERIFY_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._log_level = log_level
        self.codes = self._client("CODES", 0)
        self.broker = self._client("BROKER", 1)
        self.results = self._client("RESULTS", 2)
        self.caller = self._stack.enter_context(Caller(self.url("BROKER", 1), self.url("RESULTS", 2)))
        self._events = Listener(self.url("BROKER", 1), "*celeryev*")
        self._stack.callback(self._events.close)
        self.workers: list[WorkerProcess] = []
        # A lost connection is Celery's to report, in its way.
        self.tolerated = [
            "Connection error: network",
            "Connection to broker lost",
        ]  # and what a test provokes on purpose, as the log's lines with a traceback say it

    def url(self, which: str, number: int) -> str:
        """The URL of one of the three databases."""
        return self.settings.get(f"VERIFY_{which}_URL") or self.server.url(number)

    def _client(self, which: str, number: int) -> redis.Redis:
        client = redis.Redis.from_url(self.url(which, number))
        self._stack.callback(client.close)
        return client

    @property
    def worker(self) -> WorkerProcess:
        """The first one."""
        return self.workers[0]

    def add_worker(self, *, wait: bool = True) -> WorkerProcess:
        """Start one more worker."""
        worker = WorkerProcess(self.settings, log_level=self._log_level)
        self._stack.callback(worker.close)
        self.workers.append(worker)
        worker.start(wait=wait)
        return worker

    def script(self, recipient: str, **steps: Act | list[Act]) -> None:
        """How the relay treats one recipient: `rcpt="550 no"`."""
        self.relay.scripts[recipient] = dict(steps)

    def mails_to(self, recipient: str) -> list[Mail]:
        """What the relay accepted."""
        return [mail for mail in list(self.relay.mails) if mail.recipient == recipient]

    def dotted_to(self, recipient: str) -> list[Mail]:
        """What reached the relay whole, accepted or not."""
        return [mail for mail in list(self.relay.dotted) if mail.recipient == recipient]

    def events(self) -> list[dict[str, Any]]:
        """Every task event so far."""
        found: list[dict[str, Any]] = []
        for _, data in list(self._events.heard):
            body = json.loads(base64.b64decode(json.loads(data)["body"]))
            found += body if isinstance(body, list) else [body]
        return [event for event in found if event["type"].startswith("task-")]

    def settled(self, within: float = 10.0) -> None:
        """Nothing waits, nothing is parked, nothing is in a worker's hands."""
        # Notes for a request about to be parked and counters of died workers go by themselves, by their TTL.
        kept = re.compile(rb".+\.(dead$|(unhealthy_)?workers$|woken:|deaths:)|_kombu\.|.*\.pidbox|celeryev")
        eventually(lambda: [key for key in self.broker.scan_iter() if not kept.match(key)] == [], within)

    def assert_ttls(self) -> None:
        """Promise 7."""
        for client in (self.codes, self.results):
            assert [key for key in client.scan_iter() if client.ttl(key) == -1] == []

    def assert_private(self) -> None:
        """Promise 6: no code, no whole address, no body in any log or event."""
        said = "\n".join(worker.log for worker in self.workers) + "\n" + json.dumps(self.events())
        secrets = {code_in(mail) for mail in self.relay.dotted}
        secrets |= {mail.recipient for mail in self.relay.dotted}
        for each in self.caller.pushed:
            secrets.add(str(each.get("body"))[:200] or "-")
            secrets.add(str(each.get("headers")))
        secrets |= {base64.b64encode(text.encode()).decode().rstrip("=") for text in secrets}
        assert [text for text in secrets if text in said] == []

    def check(self) -> None:
        """What must hold after every test, whatever it did."""
        self.settled()
        self.assert_ttls()
        self.assert_private()
        assert {meta["status"] for meta in self.caller.published()} <= {"SUCCESS"}
        lines = [line for worker in self.workers for line in worker.log.splitlines()]
        loud = [line for line in lines if any(each in line for each in _LOUD)]
        assert [line for line in loud if not any(each in line for each in self.tolerated)] == []

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

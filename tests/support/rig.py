"""Redis, an SMTP server, workers and a caller, all real, wired for one module or one test; and what must hold after it.

`with Rig(code_ttl=2) as rig:` starts the servers and checks, at its end, what must hold after every test.
`rig.audit()` checks the promises over every request that `rig.caller` has made.
"""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Final, Self, cast

import redis
from celery import Celery

from support.caller import META, QUEUE, Caller, Listener, address, connect
from support.process import START_TIMEOUT, WAIT_TIMEOUT, eventually
from support.redis_server import RedisServer
from support.sentinel_servers import SentinelServers
from support.smtp_server import Act, Held, Mail, ScriptedServer, running
from support.tcp_proxy import TcpProxy
from support.worker_process import WorkerProcess

CODE_LENGTH: Final = 12  # as a rule of these tests: six digits are also in any timestamp of a log
VISIBILITY: Final = 2  # seconds, for tests that wait for it to pass; the default is 15
DATABASES: Final = ("codes", "broker", "results")
# Lines that no log of ours should have: a bug that was survived.
BUGS: Final = (
    "AttributeError",
    "unexpected error",
    "never retrieved",
    "never awaited",
    "destroyed but",
    "Unrecoverable",
)
_CODE: Final = re.compile(r"(?:code is|验证码是) (\S+)")
_CODE_LINE: Final = re.compile(rb"\n(\d{12})=\r\n")
_MESSAGE_ID: Final = re.compile(rb"\r\nMessage-ID: <([a-p]+)@example\.com>\r\n")
_HELD: Final[dict[str, Callable[[redis.Redis], Any]]] = {
    "queue": lambda client: client.llen(QUEUE),
    "handover": lambda client: client.llen("verification.handover"),
    "unacked": lambda client: client.hlen("unacked"),
    "unacked_index": lambda client: client.zcard("unacked_index"),
    "delayed": lambda client: client.hlen("verification.parked"),
    "delayed.due": lambda client: client.zcard("verification.parked.due"),
    "delayed.ready": lambda client: client.zcard("verification.parked.ready"),
    "suspects": lambda client: client.llen("verification.suspects"),
}


def parsed(mail: Mail) -> EmailMessage:
    """The mail as a mail program reads it."""
    content = re.sub(rb"(?m)^\.\.", b".", mail.content)
    return email.message_from_bytes(content, policy=email.policy.default)


def code_in(mail: Mail) -> str:
    """The code, as a reader of the text part finds it."""
    if found := _CODE_LINE.search(mail.content):  # to parse it would take a thousand times as long
        return found[1].decode()
    text = cast(EmailMessage, parsed(mail).get_body(("plain",))).get_content()
    spelt = _CODE.search(text)
    assert spelt, text
    return spelt[1]


def reference_in(mail: Mail) -> str:
    """The part of its Message-ID that belongs to its request."""
    found = _MESSAGE_ID.search(mail.content)
    assert found, mail.content
    return found[1].decode()


def reference(request_id: str) -> str:
    """The part of the Message-ID that belongs to this request."""
    digest = hashlib.sha256(request_id.encode()).hexdigest()[:32]
    return digest.translate(str.maketrans("0123456789", "ghijklmnop"))


def held_in(broker: redis.Redis) -> dict[str, int]:
    """How many requests are where in this broker database; places without any are left out."""
    counts = {name: int(count(broker)) for name, count in _HELD.items()}
    return {name: count for name, count in counts.items() if count}


def keys_without_ttl(client: redis.Redis) -> list[bytes]:
    """Those of one database."""
    keys = list(client.scan_iter(count=10_000))
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.pttl(key)
    return [key for key, life in zip(keys, pipeline.execute(), strict=True) if life == -1]


class Calling(Held):
    """A reply before which the test does something, and which may come `after` seconds later still."""

    def __init__(self, text: str, call: Callable[[], object], *, after: float = 0.0) -> None:
        super().__init__(text)
        self._call, self._after = call, after

    async def pause(self) -> None:
        """Do it, and wait."""
        self.reached.set()
        await asyncio.to_thread(self._call)
        await asyncio.sleep(self._after)


@dataclass
class Audit:
    """What `Rig.audit` found, by request id."""

    errors: dict[str, int]
    mails: dict[str, list[Mail]]


class Rig:
    """One of each, on ports of their own. Keyword arguments are settings: `code_ttl=2`.

    Timeouts of the product are so long that they do not run out on a loaded machine; a test of one sets it.
    """

    def __init__(
        self,
        *,
        server: RedisServer | None = None,
        sentinels: SentinelServers | None = None,
        own: Iterable[str] = (),
        aof: str = "",
        relay: ScriptedServer | None = None,
        redis_proxy: bool = False,
        relay_proxy: bool = False,
        log_level: str = "DEBUG",
        **settings: object,
    ) -> None:
        """`server`: a Redis that runs already; `sentinels`: not started yet, in place of the one server; `own`:
        databases (`"results"`) on a server of their own; `aof`: the servers' fsync policy; `relay`: an SMTP server that
        is not started yet, in place of one that accepts everything; `redis_proxy`, `relay_proxy`: workers connect
        through one."""
        self._stack = ExitStack()
        self._log_level = log_level
        self._redis_options = ("--appendfsync", aof) if aof else ()
        self._aof = bool(aof)
        self._sentinels = self._stack.enter_context(sentinels) if sentinels else None
        self.server = server or (sentinels.servers[0] if sentinels else self._start_redis())
        self.servers = {which: self._start_redis() if which in own else self.server for which in DATABASES}
        self.relay = self._stack.enter_context(running(relay or ScriptedServer()))
        redis_url, relay_port = (sentinels or self.server).url(), self.relay.port
        if redis_proxy:
            self.redis_proxy = self._stack.enter_context(TcpProxy(self.server.port))
            redis_url = self.redis_proxy.url()
        if relay_proxy:
            self.relay_proxy = self._stack.enter_context(TcpProxy(relay_port))
            relay_port = self.relay_proxy.port
        self.settings = {
            "VERIFY_REDIS_URL": redis_url,
            **{f"VERIFY_{which.upper()}_URL": self.servers[which].url(DATABASES.index(which)) for which in own},
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay_port}",
            "VERIFY_LOCALE": "en",
            "VERIFY_CODE_LENGTH": str(CODE_LENGTH),
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
            "VERIFY_REPLY_TIMEOUT": "60",
            "VERIFY_CONNECT_TIMEOUT": "30",
            "VERIFY_SEND_TIMEOUT": "60",
            **{f"VERIFY_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.codes, self.broker, self.results = (self._client(which) for which in DATABASES)
        self.caller = self._stack.enter_context(Caller(self._where("broker"), self._where("results")))
        self._events = Listener(self._where("broker"), "*celeryev*")
        self._stack.callback(self._events.close)
        self.workers: list[WorkerProcess] = []
        self.tolerated: list[str] = []  # parts of lines with a traceback that do not count, as a test provokes them

    def _start_redis(self) -> RedisServer:
        return self._stack.enter_context(RedisServer(aof=self._aof, options=self._redis_options))

    def url(self, which: str) -> str:
        """The URL of one of the three databases, past any proxy."""
        if given := self.settings.get(f"VERIFY_{which.upper()}_URL"):
            return given
        return (self._sentinels or self.server).url(DATABASES.index(which))

    def _where(self, which: str) -> str | redis.Redis:
        return self._sentinels.client(DATABASES.index(which)) if self._sentinels else self.url(which)

    def _client(self, which: str) -> redis.Redis:
        client = connect(self._where(which))
        self._stack.callback(client.close)
        return client

    # Workers

    @property
    def worker(self) -> WorkerProcess:
        """The first one."""
        return self.workers[0]

    @property
    def alive(self) -> list[WorkerProcess]:
        """The workers that run."""
        return [worker for worker in self.workers if worker.alive]

    def add_worker(self, *, wait: bool = True, environment: Mapping[str, str] | None = None) -> WorkerProcess:
        """Start one more worker, with this environment on top of its own."""
        worker = WorkerProcess(self.settings, log_level=self._log_level)
        worker.environment |= environment or {}
        self._stack.callback(worker.close)
        self.workers.append(worker)
        worker.start(wait=wait)
        return worker

    def add_workers(self, count: int) -> list[WorkerProcess]:
        """Start several at once."""
        workers = [self.add_worker(wait=False) for _ in range(count)]
        for worker in workers:
            worker.wait_for_log(" ready.", START_TIMEOUT)
        return workers

    def kill_workers(self) -> None:
        """Kill all that run."""
        for worker in self.alive:
            worker.kill()

    # The relay

    def script(self, recipient: str, **steps: Act | list[Act]) -> None:
        """How the relay treats one recipient: `rcpt="550 no"`."""
        self.relay.scripts[recipient] = dict(steps)

    def hold_at_dot(self, count: int) -> tuple[Held, list[str]]:
        """Request codes; the final dot of each mail has arrived and is answered when the test sets `release`."""
        held = Held("250 2.0.0 ok")
        emails = [address() for _ in range(count)]
        for recipient in emails:
            self.script(recipient, dot=[held])
        ids = self.caller.request_all(*emails)
        eventually(lambda: len(self.relay.dotted) == count)
        return held, ids

    def mails_to(self, recipient: str) -> list[Mail]:
        """What the relay accepted."""
        return [mail for mail in list(self.relay.mails) if mail.recipient == recipient]

    def dotted_to(self, recipient: str) -> list[Mail]:
        """What reached the relay whole, accepted or not."""
        return [mail for mail in list(self.relay.dotted) if mail.recipient == recipient]

    # Redis

    def events(self) -> list[dict[str, Any]]:
        """Every task event so far."""
        found: list[dict[str, Any]] = []
        for _, data in list(self._events.heard):
            body = json.loads(base64.b64decode(json.loads(data)["body"]))
            found += body if isinstance(body, list) else [body]
        return [event for event in found if event["type"].startswith("task-")]

    def command(self, *words: Any) -> Any:
        """Any command, to the broker's server."""
        return self.broker.execute_command(*words)  # type: ignore[no-untyped-call]

    def dead_letters(self) -> list[bytes]:
        """The list as it stands."""
        return cast(list[bytes], self.broker.lrange("verification.dead", 0, -1))

    def held(self) -> dict[str, int]:
        """How many requests are where in the broker database; places without any are left out."""
        return held_in(self.broker)

    # What must hold

    def settled(self, within: float = WAIT_TIMEOUT) -> None:
        """Nothing waits, nothing is delayed, nothing is in a worker's hands."""
        # Notes about a delay that is due and counts of dead workers go by themselves, by their TTL.
        kept = re.compile(
            rb".+\.(dead$|workers$|unhealthy_workers$|waiter$|turn$|woken:|deaths:)|_kombu\.|.*\.pidbox|celeryev"
        )

        def left() -> list[bytes]:
            return [key for key in self.broker.scan_iter() if not kept.match(key)]

        try:
            eventually(lambda: not left(), within)
        except AssertionError:
            raise AssertionError(f"{left()}\n{self.state()}") from None

    def assert_ttls(self) -> None:
        """Promise 7: no key without a TTL."""
        for client in (self.codes, self.results):
            assert keys_without_ttl(client) == []

    def assert_private(self) -> None:
        """Promise 6: no code, whole address, word for an end user or body in any log or event, in base64 neither."""
        events = (base64.b64decode(json.loads(data)["body"]).decode() for _, data in list(self._events.heard))
        said = "\n".join([*(worker.log for worker in self.workers), *events])
        secrets = {code_in(mail) for mail in list(self.relay.dotted)}
        secrets |= {mail.recipient for mail in list(self.relay.dotted)}
        emails = (_argument_in(each, "email") for each in self.caller.pushed)
        secrets |= {each.strip() for each in emails if isinstance(each, str)}
        leaks = secrets & set(_secrets_in(said))
        for run in set(re.findall(r"[A-Za-z0-9+/]{16,}", said)):
            for start in range(4):
                text = base64.b64decode(run[start : start + (len(run) - start) // 4 * 4]).decode("latin-1")
                leaks |= secrets & set(_secrets_in(text))
        parts = {str(each.get(name))[:200] for each in self.caller.pushed[:500] for name in ("body", "headers")}
        parts |= {str(_argument_in(each, "client")) for each in self.caller.pushed}
        leaks |= {part for part in parts if len(part) > 4 and part in said}
        assert leaks == set(), "a code, a whole address or a body in a log or an event"

    def assert_no_bugs(self, *others: str) -> None:
        """No line of a log tells of a bug, or of one of `others`."""
        lines = [line for worker in self.workers for line in worker.log.splitlines()]
        loud = [line for line in lines if any(sign in line for sign in (*BUGS, *others))]
        assert [line for line in loud if not any(each in line for each in self.tolerated)] == []

    def check(self) -> None:
        """What must hold after every test, whatever it did."""
        self.settled()
        self.assert_ttls()
        self.assert_private()
        assert {meta["status"] for meta in self.caller.published()} <= {"SUCCESS"}
        self.assert_no_bugs("Traceback")

    def audit(
        self,
        *,
        twice: Iterable[str] = (),
        refused: Iterable[str] = (),
        dead: int = 0,
        heard: bool = True,
        fresh: bool = True,
        codes_kept: bool = True,
    ) -> Audit:
        """Check the promises over every request of `caller`.

        `twice`: ids that promise 3 allows a second mail; `refused`: recipients whose final dot was answered with a
        refusal; `dead`: how many dead letters there must be; `heard`: every reply was published while we listened;
        `fresh`: some worker runs and must serve a new request; `codes_kept`: Redis lost no data.
        """
        if fresh:
            assert self.caller.ask(address("fresh"))["error"] == 0, self.state()
            assert self.alive
        asked: dict[str, Any] = {}
        for each in self.caller.pushed:
            asked.setdefault(each["headers"]["id"], _argument_in(each, "email"))
        errors = self._audit_replies(asked, heard=heard)
        eventually(lambda: not self.held())
        assert self.broker.llen("verification.dead") == dead
        mails = self._audit_mails(asked, errors, set(twice), set(refused), codes_kept=codes_kept)
        self.assert_ttls()
        self.assert_private()
        self.assert_no_bugs()
        return Audit(errors, mails)

    def _audit_replies(self, asked: dict[str, Any], *, heard: bool) -> dict[str, int]:
        try:
            self.caller.replies(asked)
        except AssertionError as exc:
            raise AssertionError(self.state()) from exc
        published = defaultdict(list)
        if heard:  # what was published last may still be on its way
            self.caller.published()
        for channel, data in list(self.caller.listener.heard):
            if data:
                published[channel.removeprefix(META)].append(json.loads(data))
        errors = {}
        for request_id, recipient in asked.items():
            stored = self.caller.stored(request_id)
            # A reply of 1 is not final: it is published alone, and the same id may have been asked again.
            heard_states = [state for state in published[request_id] if not stored or state["result"]["error"] != 1]
            states = [stored, *heard_states] if stored else heard_states
            assert {state["status"] for state in states} == {"SUCCESS"}
            results = [state["result"] for state in states]
            assert (results[0]["error"] == 1) == (stored is None), "a reply of 1 is never stored, every other one is"
            assert all(result == results[0] for result in results), results
            assert results[0]["email"] == recipient
            assert not heard or published[request_id], f"the reply was stored, not published: {stored}"
            errors[request_id] = results[0]["error"]
        return errors

    def _audit_mails(
        self,
        asked: dict[str, Any],
        errors: dict[str, int],
        twice: set[str],
        refused: set[str],
        *,
        codes_kept: bool,
    ) -> dict[str, list[Mail]]:
        by_reference = {reference(request_id): request_id for request_id in asked}
        unsure = {reference(request_id) for request_id in self.caller.unsure}
        mails: dict[str, list[Mail]] = defaultdict(list)
        codes: dict[str, set[str]] = defaultdict(set)
        # A mail that came whole may have been accepted, unless the script has refused it.
        whole = [mail for mail in list(self.relay.dotted) if mail.recipient not in refused]
        whole += [mail for mail in list(self.relay.mails) if mail.recipient in refused]
        for mail in whole:
            ref = reference_in(mail)
            if ref in unsure:
                continue
            assert ref in by_reference, "a mail that nobody asked for"
            request_id = by_reference[ref]
            assert mail.recipient == asked[request_id].strip()
            mails[request_id].append(mail)
            codes[mail.recipient].add(code_in(mail))
        for request_id, sent in mails.items():
            most = 2 if request_id in twice else 1
            assert len(sent) <= most, f"{len(sent)} mails of one request; {self.state()}"
            assert len({code_in(mail) for mail in sent}) == 1
        if codes_kept:
            for recipient, seen in codes.items():
                assert len(seen) == 1, "two codes within one life"
                live = cast(bytes | None, self.codes.get(f"code_{recipient}"))
                assert live is None or live.decode() in seen
        accepted = {mail.recipient for mail in list(self.relay.mails)}
        for request_id, error in errors.items():
            if error == 0:
                assert asked[request_id].strip() in accepted, "Success without a mail that a relay accepted"
            elif error != 6 and request_id not in twice:
                assert request_id not in mails, f"answered {error}, and a mail went out"
        return mails

    def state(self) -> str:
        """Where requests are and what the workers said last, for the message of a failed assertion."""
        try:
            where = str(self.held())
        except redis.RedisError as exc:
            where = repr(exc)
        return where + "\n" + "\n".join(worker.log[-1500:] for worker in self.workers if worker.log_path.exists())

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


NewRig = Callable[..., Rig]  # the fixture `new_rig`


@contextmanager
def operator_app(rig: Rig) -> Iterator[Celery]:
    """An operator's Celery app, for inspect and control; with sentinels, it connects to the present primary."""
    sentinels = rig._sentinels
    broker_url = sentinels.primary.url(DATABASES.index("broker")) if sentinels else rig.url("broker")
    with Celery("operator", set_as_current=False) as app:
        app.config_from_object({"broker_url": broker_url, "broker_transport": "kombu.transport.redis:Transport"})
        yield app


def _argument_in(envelope: dict[str, Any], name: str) -> Any:
    """This keyword argument of a message, None if there is none to be found."""
    try:
        return json.loads(base64.b64decode(envelope["body"]))[1][name]
    except (ValueError, LookupError, TypeError):
        return None


def _secrets_in(text: str) -> list[str]:
    """What may be a code or an address."""
    around = [text[max(0, found.start() - 64) : found.end() + 64] for found in re.finditer("@", text)]
    return re.findall(r"\d{12}", text) + [each for part in around for each in re.findall(r"[\w.+-]+@[\w.-]+\w", part)]

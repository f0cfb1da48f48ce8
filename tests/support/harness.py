"""Everything real: Redis servers, workers, a relay that keeps every mail, a requester; and the promises to check."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from support.caller import META, QUEUE, Listener, message
from support.process import eventually
from support.redis_server import RedisServer
from support.sentinel_servers import SentinelServers
from support.smtp_server import Act, Held, Mail, ScriptedServer, running
from support.tcp_proxy import TcpProxy
from support.worker_process import WorkerProcess

VISIBILITY: Final = 2  # seconds; the default is 15
BACK: Final = VISIBILITY + 3  # seconds within which what a dead worker held is served, by contract
CODE_LENGTH: Final = 12  # six digits are also in any timestamp of a log
_CODE: Final = re.compile(rb"\n(\d{12})=\r\n")
_MESSAGE_ID: Final = re.compile(rb"\r\nMessage-ID: <([a-p]+)@example\.com>\r\n")
_DATABASES: Final = ("codes", "broker", "results")
_AWAY: Final = (redis.ConnectionError, redis.TimeoutError)
_HELD: Final[dict[str, Callable[[redis.Redis], Any]]] = {
    "queue": lambda client: client.llen(QUEUE),
    "unacked": lambda client: client.hlen("unacked"),
    "unacked_index": lambda client: client.zcard("unacked_index"),
    "parked": lambda client: client.hlen("verification.parked"),
    "parked.due": lambda client: client.zcard("verification.parked.due"),
    "parked.ready": lambda client: client.zcard("verification.parked.ready"),
    "suspects": lambda client: client.llen("verification.suspects"),
}


class Calling(Held):
    """A reply before which the test does something, and for which it may wait `after` seconds more."""

    def __init__(self, text: str, call: Callable[[], object], *, after: float = 0.0) -> None:
        super().__init__(text)
        self._call, self._after = call, after

    async def pause(self) -> None:
        """Do it, and wait."""
        self.reached.set()
        await asyncio.to_thread(self._call)
        await asyncio.sleep(self._after)


@dataclass
class Asked:
    """What was pushed under one request id."""

    email: Any
    envelope: dict[str, Any]


@dataclass
class Finding:
    """What `Stage.check` saw, for a test that wants to know more."""

    errors: dict[str, int]
    mails: dict[str, list[Mail]] = field(default_factory=dict)


def code_in(mail: Mail) -> str:
    """The code, which stands alone on a line; parsing a mail takes a thousand times as long."""
    found = _CODE.search(mail.content)
    assert found, mail.content
    return found[1].decode()


def reference_in(mail: Mail) -> str:
    """What its Message-ID is made of."""
    found = _MESSAGE_ID.search(mail.content)
    assert found, mail.content
    return found[1].decode()


def reference(request_id: str) -> str:
    """What a mail's Message-ID is made of."""
    digest = hashlib.sha256(request_id.encode()).hexdigest()[:32]
    return digest.translate(str.maketrans("0123456789", "ghijklmnop"))


class Stage:
    """One of each, on ports of their own; keyword arguments are settings: `send_timeout=3`."""

    def __init__(
        self,
        *,
        aof: str = "",
        redis_proxy: bool = False,
        relay_proxy: bool = False,
        sink: ScriptedServer | None = None,
        own: Iterable[str] = (),
        watched: SentinelServers | None = None,
        log_level: str = "DEBUG",
        **settings: object,
    ) -> None:
        """`aof`: its fsync policy; `own`: databases (`"results"`) on a server of their own.

        `watched`: servers behind sentinels, in the place of all three; `server` is then the first of them.
        """
        self._stack = ExitStack()
        self._log_level = log_level
        options = ("--appendfsync", aof) if aof else ()
        self.watched = self._stack.enter_context(watched) if watched else None
        self.server = (
            self.watched.servers[0]
            if self.watched
            else self._stack.enter_context(RedisServer(aof=bool(aof), options=options))
        )
        self.servers = dict.fromkeys(_DATABASES, self.server)
        for which in own:
            self.servers[which] = self._stack.enter_context(RedisServer(aof=bool(aof), options=options))
        self.sink = self._stack.enter_context(running(sink or ScriptedServer()))
        self.redis_proxy = self._stack.enter_context(TcpProxy(self.server.port)) if redis_proxy else None
        self.relay_proxy = self._stack.enter_context(TcpProxy(self.sink.port)) if relay_proxy else None
        relay = self.relay_proxy.port if self.relay_proxy else self.sink.port
        server = f"redis://127.0.0.1:{self.redis_proxy.port if self.redis_proxy else self.server.port}"
        self.settings = {
            "VERIFY_REDIS_URL": self.watched.url() if self.watched else server,
            **{f"VERIFY_{which.upper()}_URL": self.url(which) for which in own},
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay}",
            "VERIFY_LOCALE": "en",
            "VERIFY_CODE_LENGTH": str(CODE_LENGTH),
            "VERIFY_VISIBILITY_TIMEOUT": str(VISIBILITY),
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
            **{f"VERIFY_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.codes, self.broker, self.results = (self._client(which) for which in self.servers)
        self._listener = Listener(self._where("results"), f"{META}*")
        self._events = Listener(self._where("broker"), "*celeryev*")
        self._stack.callback(self._listener.close)
        self._stack.callback(self._events.close)
        self.workers: list[WorkerProcess] = []
        self.asked: dict[str, Asked] = {}
        self.strangers: set[str] = set()  # request ids whose mails and replies are not this stage's to check

    # Parts

    def url(self, which: str) -> str:
        """The URL of one of the three databases, past any proxy."""
        return (self.watched or self.servers[which]).url(_DATABASES.index(which))

    def _where(self, which: str) -> str | redis.Redis:
        return self.watched.client(_DATABASES.index(which)) if self.watched else self.url(which)

    def _client(self, which: str) -> redis.Redis:
        where = self._where(which)
        if isinstance(where, str):
            where = redis.Redis.from_url(where, socket_timeout=30, retry=Retry(NoBackoff(), 0))
        client = where
        self._stack.callback(client.close)
        return client

    def add_worker(self, *, wait: bool = True, environment: Mapping[str, str] | None = None) -> WorkerProcess:
        """Start one more worker."""
        worker = WorkerProcess({**self.settings, **(environment or {})}, log_level=self._log_level)
        self._stack.callback(worker.close)
        self.workers.append(worker)
        worker.start(wait=wait)
        return worker

    def add_workers(self, count: int) -> list[WorkerProcess]:
        """Start several at once."""
        workers = [self.add_worker(wait=False) for _ in range(count)]
        for worker in workers:
            worker.wait_for_log(" ready.", 60)
        return workers

    @property
    def worker(self) -> WorkerProcess:
        """The first one."""
        return self.workers[0]

    @property
    def alive(self) -> list[WorkerProcess]:
        """Those that run."""
        return [worker for worker in self.workers if worker.alive]

    def kill_workers(self) -> None:
        """Kill all that run."""
        for worker in self.alive:
            worker.kill()

    def command(self, *words: Any) -> Any:
        """Any command, to the broker's server."""
        return self.broker.execute_command(*words)  # type: ignore[no-untyped-call]

    def dead_letters(self) -> list[bytes]:
        """As they stand in the list."""
        return cast(list[bytes], self.broker.lrange("verification.dead", 0, -1))

    def whole(self, recipient: str) -> list[Mail]:
        """The mails to a recipient that came whole, accepted or not."""
        return [mail for mail in list(self.sink.dotted) if mail.recipient == recipient]

    def script(self, recipient: str, **steps: Act | list[Act]) -> None:
        """How the relay treats one recipient: `rcpt="550 no"`."""
        self.sink.scripts[recipient] = dict(steps)

    # Requests

    def push(self, *emails: Any, headers: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """One request for each address; their ids. Redis has acknowledged them."""
        envelopes = [message({"email": email, **kwargs}, headers=headers) for email in emails]
        self.push_envelopes(*envelopes, emails=emails)
        return [each["headers"]["id"] for each in envelopes]

    def push_envelopes(self, *envelopes: dict[str, Any], emails: Iterable[Any]) -> None:
        """Push these as they are."""
        for envelope, email in zip(envelopes, emails, strict=True):
            self.asked.setdefault(envelope["headers"]["id"], Asked(email, envelope))
        for start in range(0, len(envelopes), 1000):
            self.broker.lpush(QUEUE, *(json.dumps(each) for each in envelopes[start : start + 1000]))

    def push_in_spite_of_all(self, email: str, stop: Callable[[], bool]) -> str | None:
        """Push under one id until Redis acknowledges it, as a caller does; None if `stop()` was true before."""
        envelope = message({"email": email})
        while True:
            try:
                self.push_envelopes(envelope, emails=[email])
            except redis.RedisError:
                if stop():
                    # It may have been queued: a mail and a reply of it are nobody's fault.
                    self.strangers.add(envelope["headers"]["id"])
                    self.asked.pop(envelope["headers"]["id"], None)
                    return None
                time.sleep(0.05)
                continue
            return str(envelope["headers"]["id"])

    def stored(self, request_id: str) -> dict[str, Any] | None:
        """The stored reply, whole."""
        raw = self.results.get(META + request_id)
        return json.loads(raw) if raw is not None else None

    def reply(self, request_id: str, within: float = 10.0) -> int:
        """The error in the stored reply."""
        deadline = time.monotonic() + within
        while True:
            with contextlib.suppress(*_AWAY):
                if (stored := self.stored(request_id)) is not None:
                    error: int = stored["result"]["error"]
                    return error
            assert time.monotonic() < deadline, f"no reply within {within} s\n{self._state()}"
            time.sleep(0.01)

    def replies(self, request_ids: Iterable[str], within: float = 10.0) -> list[int]:
        """The errors of many."""
        deadline = time.monotonic() + within
        return [self.reply(each, max(0.0, deadline - time.monotonic())) for each in request_ids]

    def answered(self, request_ids: Iterable[str]) -> int:
        """How many have a stored reply."""
        keys = [META + each for each in request_ids]
        return sum(value is not None for value in self.results.mget(keys)) if keys else 0

    def ask(self, email: Any, within: float = 10.0) -> int:
        """Request, and the reply's error."""
        return self.reply(self.push(email)[0], within)

    # What must hold

    def held(self) -> dict[str, int]:
        """What is still somewhere in the broker database, and where."""
        return held_in(self.broker)

    def _state(self) -> str:
        try:
            where = str(self.held())
        except redis.RedisError as exc:
            where = repr(exc)
        return where + "\n" + "\n".join(worker.log[-1500:] for worker in self.workers if worker.log_path.exists())

    def check(
        self,
        *,
        twice: Iterable[str] = (),
        refused: Iterable[str] = (),
        dead: int = 0,
        within: float = 15.0,
        heard: bool = True,
        fresh: bool = True,
        codes_kept: bool = True,
    ) -> Finding:
        """The promises, over everything that was asked on this stage.

        `twice`: ids that promise 3 allows a second mail; `refused`: recipients whose final dot was answered with a
        refusal; `dead`: how many dead letters there must be; `heard`: every reply was published while we listened;
        `fresh`: some worker runs and must serve a new request; `codes_kept`: Redis lost no data.
        """
        if fresh:
            assert self.ask(new_address("fresh"), within) == 0, self._state()
            assert self.alive
        errors = self._check_replies(within, heard=heard)
        eventually_empty(self.held, within, self._state)
        assert self.broker.llen("verification.dead") == dead
        mails = self._check_mails(errors, set(twice), set(refused), codes_kept=codes_kept)
        self._check_ttls()
        self._check_logs()
        return Finding(errors, mails)

    def _check_replies(self, within: float, *, heard: bool) -> dict[str, int]:
        self.replies(self.asked, within)
        if heard:  # published with being stored, and heard a moment later
            channels = {META + request_id for request_id in self.asked}
            with contextlib.suppress(AssertionError):  # which were not is said below
                eventually(lambda: channels <= {channel for channel, _ in list(self._listener.heard)}, within)
        published = defaultdict(list)
        for channel, data in list(self._listener.heard):
            published[channel.removeprefix(META)].append(json.loads(data))
        errors = {}
        for request_id, asked in self.asked.items():
            stored = self.stored(request_id)
            assert stored is not None
            states = [stored, *published[request_id]]
            assert {state["status"] for state in states} == {"SUCCESS"}
            results = [state["result"] for state in states]
            assert all(result == results[0] for result in results), results
            assert results[0]["email"] == asked.email
            assert not heard or published[request_id], f"the reply was stored, not published: {stored}"
            errors[request_id] = results[0]["error"]
        return errors

    def _check_mails(
        self, errors: dict[str, int], twice: set[str], refused: set[str], *, codes_kept: bool
    ) -> dict[str, list[Mail]]:
        by_reference = {reference(request_id): request_id for request_id in self.asked}
        strangers = {reference(request_id) for request_id in self.strangers}
        mails: dict[str, list[Mail]] = defaultdict(list)
        codes: dict[str, set[str]] = defaultdict(set)
        # A mail that came whole may have been accepted, unless the script has said no to it.
        whole = [mail for mail in list(self.sink.dotted) if mail.recipient not in refused]
        whole += [mail for mail in list(self.sink.mails) if mail.recipient in refused]
        for mail in whole:
            ref = reference_in(mail)
            if ref in strangers:
                continue
            assert ref in by_reference, "a mail that nobody asked for"
            request_id = by_reference[ref]
            assert mail.recipient == self.asked[request_id].email.strip()
            mails[request_id].append(mail)
            codes[mail.recipient].add(code_in(mail))
        for request_id, sent in mails.items():
            most = 2 if request_id in twice else 1
            assert len(sent) <= most, f"{len(sent)} mails of one request; {self._state()}"
            assert len({code_in(mail) for mail in sent}) == 1
        if codes_kept:
            for recipient, seen in codes.items():
                assert len(seen) == 1, "two codes within one life"
                live = cast(bytes | None, self.codes.get(f"code_{recipient}"))
                assert live is None or live.decode() in seen
        accepted = {mail.recipient for mail in list(self.sink.mails)}
        for request_id, error in errors.items():
            email = self.asked[request_id].email
            if error == 0:
                assert email.strip() in accepted, "Success without a mail that a relay accepted"
            elif error != 6 and request_id not in twice:
                assert request_id not in mails, f"answered {error}, and a mail went out"
        return mails

    def _check_ttls(self) -> None:
        for which, client in (("codes", self.codes), ("results", self.results)):
            keys = list(client.scan_iter(count=10_000))
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.pttl(key)
            lasting = [key for key, life in zip(keys, pipeline.execute(), strict=True) if life == -1]
            assert lasting == [], f"keys without a TTL in {which}"

    def _check_logs(self) -> None:
        said = "\n".join(worker.log for worker in self.workers)
        for _, data in list(self._events.heard):
            said += "\n" + base64.b64decode(json.loads(data)["body"]).decode()
        secrets = {asked.email.strip() for asked in self.asked.values() if isinstance(asked.email, str)}
        secrets |= {code_in(mail) for mail in list(self.sink.dotted)}
        leaks = secrets & set(_secrets_in(said))
        for run in set(re.findall(r"[A-Za-z0-9+/]{16,}", said)):
            for start in range(4):
                text = base64.b64decode(run[start : start + (len(run) - start) // 4 * 4]).decode("latin-1")
                leaks |= secrets & set(_secrets_in(text))
        assert leaks == set(), "a code or a whole address in a log or an event"
        for sign in ("AttributeError", "unforeseen", "never retrieved", "Unrecoverable"):
            assert sign not in said, said[max(0, said.index(sign) - 3000) : said.index(sign) + 3000]

    def close(self) -> None:
        """End everything."""
        for server in set(self.servers.values()):
            server.resume()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _secrets_in(text: str) -> list[str]:
    """What may be a code or an address."""
    around = [text[max(0, found.start() - 64) : found.end() + 64] for found in re.finditer("@", text)]
    return re.findall(r"\d{12}", text) + [each for part in around for each in re.findall(r"[\w.+-]+@[\w.-]+\w", part)]


def held_in(client: redis.Redis) -> dict[str, int]:
    """What is still somewhere in this broker database, and where."""
    counts = {name: int(count(client)) for name, count in _HELD.items()}
    return {name: count for name, count in counts.items() if count}


def eventually_empty(held: Callable[[], dict[str, int]], within: float, state: Callable[[], str]) -> None:
    """Wait until nothing is held anywhere."""
    deadline = time.monotonic() + within
    while left := held():
        assert time.monotonic() < deadline, f"left after {within} s: {left}\n{state()}"
        time.sleep(0.02)


class Load:
    """A caller in the background that asks again and again, at most so many a second, whatever happens to Redis."""

    def __init__(self, stage: Stage, *, a_second: float = 100, name: str = "load") -> None:
        self._stage, self._pause, self._name = stage, 1 / a_second, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.ids: list[str] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            request_id = self._stage.push_in_spite_of_all(new_address(self._name), self._stop.is_set)
            if request_id is not None:
                self.ids.append(request_id)
            time.sleep(self._pause)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(40)


def new_address(name: str = "user") -> str:
    """An address that no other request uses."""
    return f"{name}.{uuid.uuid4().hex[:10]}@example.com"


__all__ = ["BACK", "VISIBILITY", "Calling", "Load", "Stage", "eventually", "message", "new_address"]

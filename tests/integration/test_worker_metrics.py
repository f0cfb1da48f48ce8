"""The worker's `/metrics`, scraped as Prometheus does: each number moves exactly as the traffic says."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.caller import address, message
from support.process import eventually
from support.rig import Rig
from support.smtp_server import HOST, Drop, Held, ScriptedServer
from support.worker_process import WorkerProcess

from demo.redis import ask as ask_redis
from producer.store.backlog import backlog, read_backlog

Page = dict[str, float]  # by name and labels, as Prometheus writes them
# What moves by itself.
_RESTLESS = re.compile(r"process_|verify_queue_oldest_age|_seconds_sum|_seconds_bucket")


def url_of(worker: WorkerProcess) -> str:
    """Where this worker says that its metrics are."""
    return worker.metrics_url


def ask(url: str, method: str = "GET", path: str = "/metrics") -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


def scrape(worker: WorkerProcess) -> Page:
    status, content_type, text = ask(url_of(worker))
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    page: Page = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = sample.name + (f"{{{labels}}}" if labels else "")
            assert key not in page, f"{key} is there twice"
            page[key] = sample.value
    return page


class SentinelServers:
    """What moved in a worker's numbers since this was made."""

    def __init__(self, rig: Rig, worker: WorkerProcess | None = None) -> None:
        self.worker = worker or rig.worker
        self._relay = f"smtp://{HOST}:{rig.relay.port}"
        self._before = scrape(self.worker)

    def moved(self) -> Page:
        after = scrape(self.worker)
        assert after.keys() >= self._before.keys()
        moved = {key: value - self._before.get(key, 0) for key, value in after.items() if not _RESTLESS.match(key)}
        return {
            key.removeprefix("verify_").replace(f",relay={self._relay}", ""): value
            for key, value in moved.items()
            if value and not re.search("_seconds_(sum|bucket)", key)
        }

    def expect(self, wanted: Page) -> None:
        """Exactly these moved; connections apart, which idle and end when they like."""

        def found() -> Page:
            return {key: value for key, value in self.moved().items() if "relay_connections" not in key}

        try:
            eventually(lambda: found() == wanted, within=3)
        except AssertionError:
            assert found() == wanted  # to show the difference


def asked(rig: Rig, email: str, **headers: object) -> int:
    [request_id] = rig.caller.push(message({"email": email}, headers=headers))
    error: int = rig.caller.reply(request_id)["error"]
    return error


def now() -> float:
    return datetime.now(UTC).timestamp()


TAKEN, REPLIES, SENDS = (
    "worker_requests_taken_total{path=%s}",
    "worker_replies_total{error=%d}",
    ("worker_sends_total{outcome=%s}"),
)


def test_a_request_and_one_within_its_cooldown(rig: Rig) -> None:
    email = address()
    watched = SentinelServers(rig)
    assert asked(rig, email, enqueued_at=now()) == 0
    assert asked(rig, email, enqueued_at=now()) == 0
    watched.expect(
        {
            TAKEN % "fast": 2,
            REPLIES % 0: 2,
            SENDS % "accepted": 1,
            "worker_cooldown_hits_total": 1,
            "worker_reply_seconds_count": 2,
            "worker_accepted_seconds_count": 1,
        }
    )


def test_an_answer_that_is_repeated_is_no_cooldown_hit(rig: Rig) -> None:
    first = message({"email": address()})
    rig.caller.replies(rig.caller.push(first))
    rig.settled()
    watched = SentinelServers(rig)
    rig.caller.push(first)
    watched.expect({TAKEN % "fast": 1, REPLIES % 0: 1})


def test_durations_are_counted_from_enqueued_at(rig: Rig) -> None:
    before = scrape(rig.worker)
    assert asked(rig, address(), enqueued_at=now() - 7) == 0
    assert asked(rig, address(), enqueued_at=now() + 3600) == 0  # a clock that is ahead
    assert asked(rig, address()) == 0  # nobody wrote it down
    for name in ("verify_worker_reply_seconds", "verify_worker_accepted_seconds"):
        eventually(lambda: scrape(rig.worker)[f"{name}_count"] == before[f"{name}_count"] + 2)  # noqa: B023
        after = scrape(rig.worker)
        assert after[f"{name}_sum"] - before[f"{name}_sum"] == pytest.approx(7.2, abs=0.5)
        steps = {le: after[f"{name}_bucket{{le={le}}}"] - before[f"{name}_bucket{{le={le}}}"] for le in ("5.0", "10.0")}
        assert steps == {"5.0": 1, "10.0": 2}
        assert after[f"{name}_bucket{{le=+Inf}}"] == after[f"{name}_count"]


def test_refusals_and_bad_input(rig: Rig) -> None:
    gone, full = address(), address()
    rig.script(gone, rcpt="550 5.1.1 no such user")
    rig.script(full, dot="554 5.6.0 no")
    watched = SentinelServers(rig)
    assert [asked(rig, email) for email in (gone, full, "nobody")] == [5, 5, 3]
    watched.expect(
        {
            TAKEN % "fast": 3,
            REPLIES % 5: 2,
            REPLIES % 3: 1,
            SENDS % "recipient_rejected": 1,
            SENDS % "message_rejected": 1,
        }
    )


def test_retries(rig: Rig) -> None:
    later, lost = address(), address()
    rig.script(later, rcpt=["450 4.2.0 later"])
    rig.script(lost, dot=[Drop()])
    watched = SentinelServers(rig)
    assert [asked(rig, email) for email in (later, lost)] == [0, 0]
    watched.expect(
        {
            TAKEN % "fast": 4,
            REPLIES % 0: 2,
            SENDS % "deferred": 1,
            SENDS % "unknown": 1,
            SENDS % "accepted": 2,
            "worker_retries_total": 2,
        }
    )


def test_joins_held_parked_and_connections(rig: Rig) -> None:
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=hold)
    watched = SentinelServers(rig)
    first = rig.caller.request(email)
    assert hold.reached.wait(10)
    others = [rig.caller.request(email) for _ in range(3)]
    eventually(lambda: rig.broker.hlen("verification.parked") == 3)
    assert (
        watched.moved().items()
        >= {
            "worker_requests_held": 1,
            "worker_joins_total": 3,
            "queue_delayed_requests": 3,
            TAKEN % "fast": 4,
        }.items()
    )
    assert scrape(rig.worker)[f"verify_worker_relay_connections{{relay=smtp://{HOST}:{rig.relay.port}}}"] >= 1
    hold.release.set()
    assert rig.caller.replies([first, *others]) == [0] * 4
    watched.expect({TAKEN % "fast": 7, REPLIES % 0: 4, SENDS % "accepted": 1, "worker_joins_total": 3})


def test_what_goes_through_celery(rig: Rig) -> None:
    watched = SentinelServers(rig)
    assert asked(rig, address(), eta=(datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()) == 0
    watched.expect({TAKEN % "celery": 1, REPLIES % 0: 1, SENDS % "accepted": 1})


def test_dead_letters_by_the_kind_of_their_reason(rig: Rig) -> None:
    known = message({"email": address()})
    rig.caller.replies(rig.caller.push(known))
    watched = SentinelServers(rig)
    stranger = message({"email": address()})
    stranger["headers"]["task"] = "other"
    rig.broker.lpush("verification", b"no JSON")
    rig.caller.push(
        stranger,
        message({"email": address()}, content_type="application/x-python-serialize"),
        message({"email": address()}, body="%%%"),
        message({"email": address()}, headers={"eta": "soon"}),
        message({"email": address()}, request_id=known["headers"]["id"]),
    )
    watched.expect(
        {
            "worker_dead_letters_total{reason=envelope}": 2,
            "worker_dead_letters_total{reason=unknown_task}": 1,
            "worker_dead_letters_total{reason=body}": 1,
            "worker_dead_letters_total{reason=time}": 1,
            "worker_dead_letters_total{reason=id_conflict}": 1,
            "dead_letters": 6,
            TAKEN % "fast": 1,
        }
    )


def test_nothing_but_the_page_is_served_and_nobody_holds_it_up(rig: Rig) -> None:
    url = url_of(rig.worker)
    port = urlsplit(url).port
    assert port
    idle = [socket.create_connection((HOST, port)) for _ in range(50)]
    assert [ask(url, *what)[0] for what in (("GET", "/"), ("POST", "/metrics"))] == [404, 405]
    assert ask(url, "HEAD")[::2] == (200, "")
    assert ask(url, path="/metrics?name[]=up")[0] == 200
    for rubbish in (b"\x16\x03\x01 TLS\r\n\r\n", b"\r\n\r\n", b"G" * 100_000):
        with socket.create_connection((HOST, port), timeout=10) as connection:
            connection.sendall(rubbish)
            connection.settimeout(10)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = connection.recv(1000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert scrape(rig.worker)["verify_broker_up"] == 1
    for each in idle:
        each.close()


def test_two_workers_and_one_port(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    first = rig.add_worker(wait=False)
    url = url_of(first)
    first.wait_for_log(" ready.", 30)
    rig.settings["VERIFY_METRICS_BIND"] = url.removeprefix("http://").removesuffix("/metrics")
    second = rig.add_worker()
    [line] = [line for line in second.log.splitlines() if "VERIFY_METRICS_BIND" in line]
    assert f"cannot listen on {rig.settings['VERIFY_METRICS_BIND']}" in line
    assert "goes on without metrics" in line
    assert "metrics are at" not in second.log
    first.stop()
    email = address()
    assert rig.caller.ask(email)["error"] == 0
    assert len(rig.mails_to(email)) == 1


def test_a_dead_workers_requests_come_back(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(visibility_timeout=1)
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=[hold])
    doomed, heir = rig.add_worker(wait=False), None
    request_id = rig.caller.request(email)
    assert hold.reached.wait(30)
    heir = rig.add_worker()
    watched = SentinelServers(rig, heir)
    doomed.kill()
    hold.release.set()
    assert rig.caller.reply(request_id, within=20)["error"] == 0
    assert watched.moved()["worker_redeliveries_total"] == 1
    assert scrape(heir)["verify_workers"] >= 1


def test_a_sick_relay_and_an_empty_bucket(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_sends_per_hour=1, resend_cooldown=0)
    away = ScriptedServer()  # which never starts
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        away.port = taken.getsockname()[1]
        user = f"smtp://anna%40example.com:secret@{HOST}:{away.port}"
        rig.settings["VERIFY_RELAYS"] = f"{user},{rig.settings['VERIFY_RELAYS']}"
        worker = rig.add_worker()
        email = address()
        assert [asked(rig, email), asked(rig, email)] == [0, 4]
        page = scrape(worker)
    unhealthy, well = f"smtp://***@{HOST}:{away.port}", f"smtp://{HOST}:{rig.relay.port}"
    assert page[f"verify_worker_relay_unhealthy{{relay={unhealthy}}}"] == 1
    assert page[f"verify_worker_relay_unhealthy{{relay={well}}}"] == 0
    assert page[f"verify_worker_sends_total{{outcome=unavailable,relay={unhealthy}}}"] == 1
    assert page[f"verify_worker_sends_total{{outcome=accepted,relay={well}}}"] == 1
    assert page[f"verify_worker_relay_connections{{relay={unhealthy}}}"] == 0
    assert page["verify_worker_rate_limited_total"] == 1
    assert page["verify_worker_replies_total{error=4}"] == 1
    assert not [key for key in page if "anna" in key or "secret" in key]


def test_the_sign_of_life_says_whether_any_relay_is_healthy(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer({"banner": Drop()}))
    rig.add_worker()
    eventually(lambda: backlog_of(rig) == (0, 1, 0))  # a relay never tried counts as healthy
    request_id = rig.caller.request(address())
    eventually(lambda: backlog_of(rig) == (0, 1, 1))
    assert 0 < rig.broker.ttl("verification.unhealthy_workers") <= 60
    del rig.relay.script["banner"]
    assert rig.caller.reply(request_id, within=60)["error"] == 0
    eventually(lambda: backlog_of(rig) == (0, 1, 0))


def backlog_of(rig: Rig) -> tuple[int, int, int]:
    """Requests in the queue, living workers, and those of them without a healthy relay."""
    found = read_backlog(ask_redis(rig.url("BROKER", 1), backlog("verification"))[0])
    return found.queued, found.workers, found.unhealthy_workers


def test_without_redis_the_page_still_comes_and_shows_no_stale_figures(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    worker = rig.add_worker()
    rig.caller.ask(address())
    assert scrape(worker)["verify_queue_requests"] == 0
    rig.server.kill()
    page = scrape(worker)
    assert page["verify_broker_up"] == 0
    assert str(page["verify_queue_requests"]) == "nan"
    assert page["verify_worker_replies_total{error=0}"] == 1
    rig.server.start()
    eventually(lambda: scrape(worker)["verify_broker_up"] == 1)


def test_the_queue_while_the_relay_is_slow(rig: Rig) -> None:
    watched, hold, born = SentinelServers(rig), Held("250 ok"), now() - 5
    emails = [address() for _ in range(60)]
    for email in emails:
        rig.script(email, dot=hold)
    ids = rig.caller.push(*(message({"email": email}, headers={"enqueued_at": born}) for email in emails))
    eventually(lambda: watched.moved().get("worker_requests_held") == 32)  # as many as connections
    page = scrape(rig.worker)
    assert page["verify_queue_requests"] == 28
    assert page["verify_queue_oldest_age_seconds"] == pytest.approx(now() - born, abs=1)
    assert watched.moved()["worker_requests_held"] == 32
    hold.release.set()
    assert set(rig.caller.replies(ids)) == {0}
    eventually(lambda: scrape(rig.worker)["verify_worker_requests_held"] == 0)
    assert scrape(rig.worker)["verify_queue_oldest_age_seconds"] == 0

"""The worker's `/metrics`, scraped as Prometheus does: each number changes exactly as the traffic says."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from support.caller import address, message
from support.process import WAIT_TIMEOUT, eventually
from support.rig import Rig
from support.smtp_server import HOST, Drop, Held, ScriptedServer
from support.worker_process import WorkerProcess

from demo.embedded_redis import ask as ask_redis
from producer.store.backlog import backlog, read_backlog

Page = dict[str, float]  # by name and labels, as Prometheus writes them
# Metrics that change by themselves.
_UNSTEADY = re.compile(r"^process_|^verify_queue_oldest_age|_seconds_(sum|bucket)")


def ask(url: str, method: str = "GET", path: str = "/metrics") -> tuple[int, str, str]:
    """Ask the metrics server; returns status, content type and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


def scrape(worker: WorkerProcess) -> Page:
    status, content_type, text = ask(worker.metrics_url)
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


class Changes:
    """How a worker's metrics have changed since this was made."""

    def __init__(self, rig: Rig, worker: WorkerProcess | None = None) -> None:
        self.worker = worker or rig.worker
        self._relay = f"smtp://{HOST}:{rig.relay.port}"
        self._before = scrape(self.worker)

    def now(self) -> Page:
        after = scrape(self.worker)
        assert after.keys() >= self._before.keys()
        return {
            key.removeprefix("verify_").replace(f",relay={self._relay}", ""): change
            for key, value in after.items()
            if (change := value - self._before.get(key, 0)) and not _UNSTEADY.search(key)
        }

    def expect(self, wanted: Page) -> None:
        """Wait until exactly these have changed, connections apart, which end when they like."""

        def found() -> Page:
            return {key: value for key, value in self.now().items() if "relay_connections" not in key}

        try:
            eventually(lambda: found() == wanted)
        except AssertionError:
            assert found() == wanted  # to show the difference


def asked(rig: Rig, email: str, **headers: object) -> int:
    [request_id] = rig.caller.push(message({"email": email}, headers=headers))
    error: int = rig.caller.reply(request_id)["error"]
    return error


TAKEN = "worker_requests_taken_total{path=%s}"
REPLIES = "worker_replies_total{error=%d}"
SENDS = "worker_sends_total{outcome=%s}"


def test_a_request_and_one_within_its_cooldown(rig: Rig) -> None:
    email = address()
    changes = Changes(rig)
    assert asked(rig, email, enqueued_at=time.time()) == 0
    assert asked(rig, email, enqueued_at=time.time()) == 0
    changes.expect(
        {
            TAKEN % "fast": 2,
            REPLIES % 0: 2,
            SENDS % "accepted": 1,
            "worker_cooldown_hits_total": 1,
            "worker_reply_seconds_count": 2,
            "worker_accepted_seconds_count": 1,
        }
    )


def test_a_repeated_answer_is_not_a_cooldown_hit(rig: Rig) -> None:
    first = message({"email": address()})
    rig.caller.replies(rig.caller.push(first))
    rig.settled()
    changes = Changes(rig)
    rig.caller.push(first)
    changes.expect({TAKEN % "fast": 1, REPLIES % 0: 1})


def test_rejected_mails_and_invalid_addresses(rig: Rig) -> None:
    gone, full = address(), address()
    rig.script(gone, rcpt="550 5.1.1 no such user")
    rig.script(full, dot="554 5.6.0 no")
    changes = Changes(rig)
    assert [asked(rig, email) for email in (gone, full, "nobody")] == [5, 5, 3]
    changes.expect(
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
    changes = Changes(rig)
    assert [asked(rig, email) for email in (later, lost)] == [0, 0]
    changes.expect(
        {
            TAKEN % "fast": 4,
            REPLIES % 0: 2,
            SENDS % "deferred": 1,
            SENDS % "unknown": 1,
            SENDS % "accepted": 2,
            "worker_retries_total": 2,
        }
    )


def test_requests_that_wait_for_another_requests_send(rig: Rig) -> None:
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=hold)
    changes = Changes(rig)
    first = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    others = [rig.caller.request(email) for _ in range(3)]
    eventually(lambda: rig.broker.hlen("verification.parked") == 3)
    wanted = {"worker_requests_held": 1, "worker_joins_total": 3, "queue_delayed_requests": 3, TAKEN % "fast": 4}
    eventually(lambda: changes.now().items() >= wanted.items())
    assert scrape(rig.worker)[f"verify_worker_relay_connections{{relay=smtp://{HOST}:{rig.relay.port}}}"] >= 1
    hold.release.set()
    assert rig.caller.replies([first, *others]) == [0] * 4
    changes.expect({TAKEN % "fast": 7, REPLIES % 0: 4, SENDS % "accepted": 1, "worker_joins_total": 3})


def test_a_request_that_celery_runs(rig: Rig) -> None:
    changes = Changes(rig)
    assert asked(rig, address(), group="a-group") == 0
    changes.expect({TAKEN % "celery": 1, REPLIES % 0: 1, SENDS % "accepted": 1})


def test_a_request_with_an_eta_counts_once(rig: Rig) -> None:
    changes = Changes(rig)
    assert asked(rig, address(), eta=(datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()) == 0
    changes.expect({TAKEN % "fast": 1, REPLIES % 0: 1, SENDS % "accepted": 1})


def test_dead_letters_by_code(rig: Rig) -> None:
    known = message({"email": address()})
    rig.caller.replies(rig.caller.push(known))
    changes = Changes(rig)
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
    changes.expect(
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


def test_the_metrics_server_survives_idle_and_broken_clients(rig: Rig) -> None:
    url = rig.worker.metrics_url
    port = urlsplit(url).port
    assert port
    idle = [socket.create_connection((HOST, port)) for _ in range(50)]
    assert [ask(url, *what)[0] for what in (("GET", "/"), ("POST", "/metrics"))] == [404, 405]
    assert ask(url, "HEAD")[::2] == (200, "")
    assert ask(url, path="/metrics?name[]=up")[0] == 200
    for junk in (b"\x16\x03\x01 TLS\r\n\r\n", b"\r\n\r\n", b"G" * 100_000):
        with socket.create_connection((HOST, port), timeout=60) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):  # it may hang up before all has been sent
                connection.sendall(junk)
                answer = connection.recv(1000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert scrape(rig.worker)["verify_broker_up"] == 1
    for each in idle:
        each.close()


def test_a_worker_whose_metrics_port_is_taken_goes_on_without(new_rig: Callable[..., Rig]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        bind = f"{HOST}:{taken.getsockname()[1]}"
        rig = new_rig(metrics_bind=bind)
        worker = rig.add_worker()
        [line] = [line for line in worker.log.splitlines() if "VERIFY_METRICS_BIND" in line]
        assert f"cannot listen on {bind}" in line
        assert "goes on without metrics" in line
        assert "metrics are at" not in worker.log
        email = address()
        assert rig.caller.ask(email)["error"] == 0
        assert len(rig.mails_to(email)) == 1


def test_a_dead_workers_requests_are_counted_as_redelivered(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(visibility_timeout=5)
    email, hold = address(), Held("250 ok")
    rig.script(email, dot=[hold])
    doomed = rig.add_worker(wait=False)
    request_id = rig.caller.request(email)
    assert hold.reached.wait(WAIT_TIMEOUT)
    heir = rig.add_worker()
    changes = Changes(rig, heir)
    doomed.kill()
    hold.release.set()
    assert rig.caller.reply(request_id, within=WAIT_TIMEOUT)["error"] == 0
    eventually(lambda: changes.now().get("worker_redeliveries_total") == 1)
    assert scrape(heir)["verify_workers"] >= 1


def test_an_unhealthy_relay_and_an_empty_bucket(new_rig: Callable[..., Rig]) -> None:
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
        eventually(lambda: scrape(worker)["verify_worker_replies_total{error=4}"] == 1)
        page = scrape(worker)
    unhealthy, healthy = f"smtp://***@{HOST}:{away.port}", f"smtp://{HOST}:{rig.relay.port}"
    assert page[f"verify_worker_relay_unhealthy{{relay={unhealthy}}}"] == 1
    assert page[f"verify_worker_relay_unhealthy{{relay={healthy}}}"] == 0
    assert page[f"verify_worker_sends_total{{outcome=unavailable,relay={unhealthy}}}"] == 1
    assert page[f"verify_worker_sends_total{{outcome=accepted,relay={healthy}}}"] == 1
    assert page[f"verify_worker_relay_connections{{relay={unhealthy}}}"] == 0
    assert page["verify_worker_rate_limited_total{bucket=address}"] == 1
    assert page["verify_audit_events_total{event=bucket_empty}"] == 1
    assert '"bucket": "address"' in worker.log
    assert not [key for key in page if "anna" in key or "secret" in key]


def test_the_sign_of_life_says_whether_any_relay_is_healthy(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay=ScriptedServer({"banner": Drop()}))
    rig.add_worker()
    eventually(lambda: backlog_of(rig) == (0, 1, 0))  # a relay never tried counts as healthy
    request_id = rig.caller.request(address())
    eventually(lambda: backlog_of(rig) == (0, 1, 1))
    assert 0 < rig.broker.ttl("verification.unhealthy_workers") <= 60
    del rig.relay.script["banner"]
    assert rig.caller.reply(request_id, within=WAIT_TIMEOUT)["error"] == 0
    eventually(lambda: backlog_of(rig) == (0, 1, 0))


def backlog_of(rig: Rig) -> tuple[int, int, int]:
    """Requests in the queue, living workers, and those of them without a healthy relay."""
    found = read_backlog(ask_redis(rig.url("broker"), backlog("verification"))[0])
    return found.queued, found.workers, found.unhealthy_workers


def test_without_redis_the_page_shows_no_stale_figures(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    worker = rig.add_worker()
    rig.caller.ask(address())
    eventually(lambda: scrape(worker)["verify_worker_replies_total{error=0}"] == 1)
    assert scrape(worker)["verify_queue_requests"] == 0
    rig.server.kill()
    page = scrape(worker)
    assert page["verify_broker_up"] == 0
    assert str(page["verify_queue_requests"]) == "nan"
    assert page["verify_worker_replies_total{error=0}"] == 1
    rig.server.start()
    eventually(lambda: scrape(worker)["verify_broker_up"] == 1)


def test_the_queue_while_the_relay_is_slow(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(relay_connections=32)
    rig.add_worker()
    changes, hold, born = Changes(rig), Held("250 ok"), time.time() - 5
    emails = [address() for _ in range(60)]
    for email in emails:
        rig.script(email, dot=hold)
    ids = rig.caller.push(*(message({"email": email}, headers={"enqueued_at": born}) for email in emails))
    eventually(lambda: changes.now().get("worker_requests_held") == 32)  # as many as may be on their way
    page = scrape(rig.worker)
    assert page["verify_queue_requests"] == 28
    assert page["verify_queue_oldest_age_seconds"] <= time.time() - born
    assert page["verify_queue_oldest_age_seconds"] >= 5
    assert changes.now()["worker_requests_held"] == 32
    hold.release.set()
    assert set(rig.caller.replies(ids)) == {0}
    eventually(lambda: scrape(rig.worker)["verify_worker_requests_held"] == 0)
    assert scrape(rig.worker)["verify_queue_oldest_age_seconds"] == 0

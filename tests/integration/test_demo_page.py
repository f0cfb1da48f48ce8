"""The demo page's parts at a real door: the way of a request, the inbox, and who may see them. No browser."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.api_process import ApiProcess
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import Rig, code_in
from support.smtp_server import Held

from demo.catcher import Catcher
from demo.mailpit_api import Inbox
from producer.api.demo.fetch import LIMIT
from producer.api.demo.mailpit import NEWEST

STATIONS = ["door", "queue", "worker", "relay", "reply"]
DEMO = {"VERIFY_DEMO": "1"}


@pytest.fixture(scope="module")
def doors(rig: Rig) -> Iterator[ApiProcess]:
    with ApiProcess({**rig.settings, **DEMO}) as doors:
        yield doors


@pytest.fixture
def bare(redis_server: RedisServer) -> dict[str, str]:
    """Settings of doors that nobody works behind."""
    return {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": "2"}


def ask(doors: ApiProcess, email: str, **more: str) -> list[dict[str, Any]]:
    """The whole stream."""
    answer = doors.http.post("/demo/request", content=json.dumps({"email": email, **more}).encode())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def stations(lines: list[dict[str, Any]]) -> list[str]:
    return [line["station"] for line in lines if "note" not in line]


class TestTheWay:
    def test_all_stations_in_their_order_with_times_that_only_grow(self, doors: ApiProcess, rig: Rig) -> None:
        lines = ask(doors, "way@example.com")
        assert stations(lines) == STATIONS
        times = [line["at"] for line in lines]
        assert times == sorted(times)
        assert times[0] == 0
        assert [line.get("error") for line in lines] == [None] * 4 + [0]
        assert 0 < lines[-1]["life"] <= 600
        [mail] = rig.mails_to("way@example.com")
        said = json.dumps(lines)
        assert code_in(mail) not in said
        assert "@" not in said

    def test_it_is_told_while_it_happens(self, doors: ApiProcess, rig: Rig) -> None:
        held = Held("250 OK")
        rig.script("held@example.com", dot=held)
        with doors.http.stream("POST", "/demo/request", content=b'{"email": "held@example.com"}') as answer:
            lines = answer.iter_lines()
            assert [json.loads(next(lines))["station"] for _ in STATIONS[:-1]] == STATIONS[:-1]
            assert held.reached.wait(10)
            held.release.set()
            assert json.loads(next(lines))["error"] == 0

    def test_who_goes_away_in_the_middle_disturbs_nobody(self, doors: ApiProcess, rig: Rig) -> None:
        held = Held("250 OK")
        rig.script("gone@example.com", dot=held)
        with doors.http.stream("POST", "/demo/request", content=b'{"email": "gone@example.com"}'):
            assert held.reached.wait(10)
        eventually(lambda: doors.metric("verify_api_requests_in_flight", protocol="http") == 0)
        held.release.set()
        assert ask(doors, "next@example.com")[-1]["error"] == 0

    def test_a_resend_tells_the_life_that_its_code_has_left(self, new_rig: Callable[..., Rig]) -> None:
        rig = new_rig(resend_cooldown=0)
        rig.add_worker()
        with ApiProcess({**rig.settings, **DEMO}) as doors:
            first = ask(doors, "life@example.com")[-1]["life"]
            time.sleep(1.1)
            assert ask(doors, "life@example.com")[-1]["life"] <= first - 1

    def test_the_mail_is_in_the_language_that_was_asked_for(self, doors: ApiProcess, rig: Rig) -> None:
        for locale, recipient in (("zh-CN", "zh@example.com"), ("en", "en@example.com")):
            assert ask(doors, recipient, locale=locale)[-1]["error"] == 0
            [mail] = rig.mails_to(recipient)
            assert (b"Subject: Your verification code" in mail.content) == (locale == "en")

    def test_what_is_no_address_gets_no_further_than_the_door(self, doors: ApiProcess) -> None:
        lines = ask(doors, "nobody")
        assert stations(lines) == ["door", "reply"]
        assert lines[-1]["error"] == 3

    def test_what_is_malformed_is_answered_in_the_same_form(self, doors: ApiProcess) -> None:
        for body in (b"", b"7", b'{"mail": "x"}', b'{"email": "a@example.com", "purpose": "No"}'):
            answer = doors.http.post("/demo/request", content=body)
            assert json.loads(answer.text)["error"] == 1001
        assert doors.http.post("/demo/request", content=b"x" * 20_000).status_code == 413

    def test_a_relay_that_defers_is_told_at_the_relay(self, doors: ApiProcess, rig: Rig) -> None:
        rig.script("later@example.com", rcpt=["451 later"])
        lines = ask(doors, "later@example.com")
        assert stations(lines) == STATIONS
        assert [line["station"] for line in lines if line.get("note") == "again"] == ["relay"]
        assert lines[-1]["error"] == 0

    def test_a_relay_that_is_away_is_a_timeout(self, new_rig: Callable[..., Rig]) -> None:
        rig = new_rig(reply_timeout=2, give_up_after=3, relays="smtp://127.0.0.1:9")
        rig.add_worker()
        with ApiProcess({**rig.settings, **DEMO}) as doors:
            lines = ask(doors, "away@example.com")
        assert stations(lines) == STATIONS
        assert {line["station"] for line in lines if line.get("note") == "again"} == {"relay"}
        assert lines[-1]["error"] == 6

    def test_a_missing_worker_is_told_at_the_queue(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO}) as doors:
            lines = ask(doors, "alone@example.com")
        assert stations(lines) == ["door", "queue", "reply"]
        [note] = [line for line in lines if "note" in line]
        assert (note["station"], note["note"]) == ("queue", "no worker")
        assert lines[-1]["error"] == 6

    def test_without_redis_the_error_is_told(self) -> None:
        with ApiProcess({"VERIFY_REDIS_URL": "redis://127.0.0.1:1", **DEMO}) as doors:
            assert ask(doors, "a@example.com")[-1]["error"] == 1

    def test_stations_are_told_again_after_the_events_connection_was_lost(self, doors: ApiProcess, rig: Rig) -> None:
        assert stations(ask(doors, "before@example.com")) == STATIONS
        ids = [each["id"] for each in rig.broker.client_list(_type="pubsub") if each["psub"] == "1"]
        assert ids
        for each in ids:
            rig.broker.client_kill_filter(_id=each)
        assert stations(ask(doors, "after@example.com")) == STATIONS

    @pytest.mark.parametrize("stamp", [10**400, True, None, "now"], ids=["huge", "bool", "none", "text"])
    def test_an_event_with_an_impossible_time_is_passed_over(
        self, redis_server: RedisServer, bare: dict[str, str], stamp: object
    ) -> None:
        with ApiProcess({**bare, **DEMO}) as doors, redis_server.client(1) as broker:
            body = b'{"email": "forged@example.com"}'
            with doors.http.stream("POST", "/demo/request", content=body) as answer:
                lines = answer.iter_lines()
                assert [json.loads(next(lines))["station"] for _ in range(2)] == ["door", "queue"]
                request_id = json.loads(broker.lindex("verification", 0))["headers"]["id"]
                for kind, at in (("task-received", stamp), ("task-started", time.time())):
                    event = {"type": kind, "uuid": request_id, "timestamp": at}
                    packed = json.dumps({"body": b64encode(json.dumps([event]).encode()).decode()})
                    assert broker.publish("/1.celeryev/task.multi", packed) == 1
                # Heard on the same connection, so that nothing became of the first.
                assert json.loads(next(lines))["station"] == "relay"


class TestThePage:
    def test_without_the_setting_there_is_none(self, bare: dict[str, str]) -> None:
        with ApiProcess(bare) as doors:
            for path in ("/", "/page/page.js", "/page/mail/x", "/demo/facts", "/demo/inbox", "/demo/inbox/x"):
                assert doors.http.get(path).status_code == 404
            assert doors.http.post("/demo/request", content=b"{}").status_code == 404

    def test_all_that_it_names_is_there_and_comes_from_here(self, doors: ApiProcess) -> None:
        page = doors.http.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "://" not in page.text
        wanted = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text))
        seen: set[str] = set()
        while wanted - seen:
            name = (wanted - seen).pop()
            part = doors.http.get(name)
            assert part.status_code == 200, name
            wanted |= {f"/page/{each}" for each in re.findall(r'from "\./([^"]+)"', part.text)}
            seen.add(name)
            assert {url for url in re.findall(r"\w+://[\w.]+", part.text) if url != "http://www.w3.org"} == set()
        assert seen >= {f"/page/{name}" for name in ("style.css", "page.js", "words.js", "icon.svg")}

    def test_nothing_in_it_is_inline_and_its_policy_allows_nothing_else(self, doors: ApiProcess) -> None:
        page = doors.http.get("/")
        assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", page.text) == []
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy

    def test_what_it_must_know(self, doors: ApiProcess) -> None:
        facts = doors.http.get("/demo/facts").json()
        assert (facts["ttl"], facts["cooldown"], facts["inbox"], facts["flower"]) == (600, 10, False, None)

    @pytest.mark.parametrize("path", ["/page/", "/page/nothing", "/page/__init__.py", "/page/%2e%2e/routes.py"])
    def test_nothing_else_is_served(self, doors: ApiProcess, path: str) -> None:
        assert doors.http.get(path).status_code == 404

    def test_with_keys_the_page_is_open_and_what_it_asks_for_is_not(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO, "VERIFY_API_KEYS": "k3y"}) as doors:
            for path in ("/", "/page/page.js", "/page/style.css"):
                assert doors.http.get(path).status_code == 200
            for path in ("/demo/facts", "/demo/inbox", "/demo/inbox/x", "/demo", "/pages", "/metrics", "/page"):
                assert doors.http.get(path).status_code == 401
            assert doors.http.post("/demo/request", content=b"{}").status_code == 401
            assert doors.http.get("/demo/facts", headers={"Authorization": "Bearer k3y"}).json()["keys"] is True

    @pytest.mark.parametrize("path", ["/demo/facts", "/demo/inbox", "/demo/inbox/x", "/page/mail/x"])
    def test_a_name_that_a_site_may_lead_here_reads_nothing(self, doors: ApiProcess, path: str) -> None:
        for host in ("evil.example", "127.0.0.1.evil.example:8081", "localhost.evil.example", "localhost@evil.example"):
            answer = doors.http.get(path, headers={"Host": host})
            assert (answer.status_code, answer.json()["error"]) == (403, 1001)
        for host in ("localhost:8081", "demo.localhost", "[::1]:8081", "192.0.2.1"):
            assert doors.http.get(path, headers={"Host": host}).status_code in {200, 404}
        asked = doors.http.post(
            "/demo/request", content=b'{"email": "a@example.com"}', headers={"Host": "evil.example"}
        )
        assert asked.status_code == 403

    def test_nor_does_it_where_a_container_binds_beyond_its_loopback(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO, "VERIFY_HTTP_BIND": "0.0.0.0:0", "VERIFY_ALLOW_PLAINTEXT": "1"}) as doors:
            assert doors.http.get("/demo/facts", headers={"Host": "evil.example"}).status_code == 403
            assert doors.http.get("/demo/facts").status_code == 200

    def test_with_keys_any_name_may_lead_here(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO, "VERIFY_API_KEYS": "k3y"}) as doors:
            headers = {"Host": "demo.example.com", "Authorization": "Bearer k3y"}
            assert doors.http.get("/demo/facts", headers=headers).status_code == 200

    def test_beyond_loopback_a_line_says_who_can_read_the_inbox(self, bare: dict[str, str]) -> None:
        settings = {**bare, **DEMO, "VERIFY_API_KEYS": "k3y"}
        with ApiProcess({**settings, "VERIFY_HTTP_BIND": "0.0.0.0:0"}) as doors:
            assert doors.log.count("whoever opens the page") == 1
        with ApiProcess(settings) as doors:
            assert "whoever opens the page" not in doors.log


class TestTheInbox:
    def test_it_shows_the_mails_of_the_catcher(self, new_rig: Callable[..., Rig]) -> None:
        with Catcher() as catcher, Inbox(catcher) as inbox:
            rig = new_rig(relays=catcher.url)
            rig.add_worker()
            with ApiProcess(
                {**rig.settings, **DEMO, "VERIFY_DEMO_INBOX": inbox.url, "VERIFY_API_KEYS": "k3y"}
            ) as doors:
                doors.http.headers["Authorization"] = "Bearer k3y"
                assert doors.http.get("/demo/inbox").json() == {"mails": []}
                for name in ("anna", "bob"):
                    assert ask(doors, f"{name}@example.com", locale="en")[-1]["error"] == 0
                mails = doors.http.get("/demo/inbox").json()["mails"]
                assert [mail["to"] for mail in mails] == [["bob@example.com"], ["anna@example.com"]]
                assert {mail["subject"] for mail in mails} == {"Your verification code"}
                mail = doors.http.get(f"/demo/inbox/{mails[0]['id']}").json()
                code = rig.codes.get("code_bob@example.com").decode()  # type: ignore[union-attr]
                assert code in mail["text"]
                del doors.http.headers["Authorization"]  # a frame has none
                view = doors.http.get(f"/page/mail/{mail['view']}")
                assert code in view.text
                assert view.headers["content-type"] == "text/html; charset=utf-8"
                policy = view.headers["content-security-policy"]
                assert policy.startswith("default-src 'none'; ")
                assert policy.endswith("; sandbox")
                assert "script-src" not in policy
                assert doors.http.get("/page/mail/other").status_code == 404
            rig.worker.stop()

    def test_without_one_it_is_said(self, doors: ApiProcess) -> None:
        answer = doors.http.get("/demo/inbox")
        assert answer.status_code == 404
        assert "VERIFY_DEMO_INBOX" in answer.json()["detail"]

    def test_one_that_is_away_is_said(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO, "VERIFY_DEMO_INBOX": "http://127.0.0.1:1"}) as doors:
            answer = doors.http.get("/demo/inbox")
            assert (answer.status_code, answer.json()["error"]) == (502, 2)
            assert "cannot be reached" in answer.json()["detail"]

    @pytest.mark.parametrize(("reply", "why"), [
        (b"", "something else"),
        (b"220 hello\r\n", "something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{not JSON", "something else"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"messages": [{"ID": "../../etc"}]}', "something else"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "something else"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (LIMIT + 1), "more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"[" * 99, "something else"),
    ], ids=["silence", "SMTP", "a list", "no JSON", "a path", "elsewhere", "upgrade", "too much", "cut"])  # fmt: skip
    def test_what_it_answers_is_not_trusted(
        self, hostile: ApiProcess, says: list[bytes], reply: bytes, why: str
    ) -> None:
        says[:] = [reply]
        answer = hostile.http.get("/demo/inbox")
        assert answer.status_code == 502
        assert why in answer.json()["detail"]

    def test_what_is_not_shown_is_not_even_judged(self, hostile: ApiProcess, says: list[bytes]) -> None:
        fit = b'{"ID": "a", "To": [%s]}' % b",".join([b'{"Address": "b"}'] * NEWEST + [b"0"] * 1000)
        says[:] = [b'HTTP/1.1 200 OK\r\n\r\n{"messages": [%s]}' % b",".join([fit] * NEWEST + [b"0"] * 1000)]
        mails = hostile.http.get("/demo/inbox").json()["mails"]
        assert [mail["to"] for mail in mails] == [["b"] * NEWEST] * NEWEST

    @pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
    def test_one_that_never_ends_is_left(self, hostile: ApiProcess, says: list[bytes], begin: bytes) -> None:
        says[:] = [begin, *[b"x"] * 100]
        answer = hostile.http.get("/demo/inbox")
        assert answer.status_code == 502
        assert "within" in answer.json()["detail"]

    def test_a_mails_id_leads_nowhere_else(self, hostile: ApiProcess, says: list[bytes], heard: list[bytes]) -> None:
        says[:] = [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"]
        assert hostile.http.get("/demo/inbox/..%3Fx%0d%0aHost:y").status_code == 502
        assert heard[-1].startswith(b"GET /api/v1/message/..%3Fx%0D%0AHost%3Ay HTTP/1.1\r\n")


@pytest.fixture(scope="module")
def says() -> list[bytes]:
    """What the hostile catcher answers, piece by piece, a tenth of a second between two."""
    return []


@pytest.fixture(scope="module")
def heard() -> list[bytes]:
    """What it was asked."""
    return []


@pytest.fixture(scope="module")
def hostile(redis_server: RedisServer, says: list[bytes], heard: list[bytes]) -> Iterator[ApiProcess]:
    """ApiProcess that look into a catcher that says what it wants."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            heard.append(connection.recv(65536))
            with contextlib.suppress(OSError):  # the door has left
                for i, piece in enumerate(list(says)):
                    time.sleep(0.1 if i else 0)
                    connection.sendall(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), **DEMO, "VERIFY_DEMO_INBOX": url}) as doors:
            yield doors
        server.shutdown()

"""The demo page's routes in a real API process: progress, inbox, and who may read them. No browser."""

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
from support.api_process import KEYS, WITH_KEY, ApiProcess
from support.caller import address
from support.process import eventually
from support.redis_server import RedisServer
from support.rig import Rig, code_in
from support.smtp_server import Held

from demo.catcher import Catcher
from demo.mailpit_api import Inbox
from producer.api.demo.fetch import LIMIT
from producer.api.demo.inbox import NEWEST
from producer.contract import ErrorCode

STAGES = ["api", "queue", "worker", "relay", "reply"]
DEMO = {"VERIFY_DEMO": "1"}


@pytest.fixture(scope="module")
def api(rig: Rig) -> Iterator[ApiProcess]:
    with ApiProcess({**rig.settings, **DEMO}) as api:
        yield api


@pytest.fixture(scope="module")
def bare(redis_server: RedisServer) -> dict[str, str]:
    """Settings of an API without a worker."""
    return {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": "8"}


@pytest.fixture(scope="module")
def alone(bare: dict[str, str]) -> Iterator[ApiProcess]:
    """An API on all addresses, without a worker, whose inbox is nowhere."""
    everywhere = {"VERIFY_HTTP_BIND": "0.0.0.0:0", "VERIFY_ALLOW_PLAINTEXT": "1"}
    with ApiProcess({**bare, **DEMO, **everywhere, "VERIFY_DEMO_INBOX": "http://127.0.0.1:1"}) as api:
        yield api


def ask(api: ApiProcess, email: str, **more: str) -> list[dict[str, Any]]:
    """The whole stream."""
    answer = api.http.post("/demo/request", content=json.dumps({"email": email, **more}).encode())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def stages(lines: list[dict[str, Any]]) -> list[str]:
    return [line["stage"] for line in lines if "note" not in line]


class TestProgress:
    def test_all_stages_in_order_with_times_that_only_grow(self, api: ApiProcess, rig: Rig) -> None:
        lines = ask(api, "way@example.com")
        assert stages(lines) == STAGES
        times = [line["at"] for line in lines]
        assert times == sorted(times)
        assert times[0] == 0
        assert [line.get("error") for line in lines] == [None] * 4 + [0]
        assert 0 < lines[-1]["life"] <= 600
        [mail] = rig.mails_to("way@example.com")
        said = json.dumps(lines)
        assert code_in(mail) not in said
        assert "@" not in said

    def test_stages_are_reported_while_they_happen(self, api: ApiProcess, rig: Rig) -> None:
        held = Held("250 OK")
        rig.script("held@example.com", dot=held)
        with api.http.stream("POST", "/demo/request", content=b'{"email": "held@example.com"}') as answer:
            lines = answer.iter_lines()
            assert [json.loads(next(lines))["stage"] for _ in STAGES[:-1]] == STAGES[:-1]
            assert held.reached.wait(60)
            held.release.set()
            assert json.loads(next(lines))["error"] == 0

    def test_a_client_that_leaves_disturbs_nobody(self, api: ApiProcess, rig: Rig) -> None:
        held = Held("250 OK")
        rig.script("gone@example.com", dot=held)
        with api.http.stream("POST", "/demo/request", content=b'{"email": "gone@example.com"}'):
            assert held.reached.wait(60)
        eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="http") == 0)
        held.release.set()
        assert ask(api, "next@example.com")[-1]["error"] == 0

    def test_a_second_request_reports_the_life_that_its_code_has_left(self, api: ApiProcess) -> None:
        first = ask(api, "life@example.com")[-1]["life"]
        time.sleep(1.1)
        assert ask(api, "life@example.com")[-1]["life"] <= first - 1

    def test_the_mail_is_in_the_requested_language(self, api: ApiProcess, rig: Rig) -> None:
        for locale, recipient in (("zh-CN", "zh@example.com"), ("en", "en@example.com")):
            assert ask(api, recipient, locale=locale)[-1]["error"] == 0
            [mail] = rig.mails_to(recipient)
            assert (b"Subject: Your verification code" in mail.content) == (locale == "en")

    def test_an_invalid_address_gets_no_further_than_the_api(self, api: ApiProcess) -> None:
        lines = ask(api, "nobody")
        assert stages(lines) == ["api", "reply"]
        assert lines[-1]["error"] == 3

    def test_a_malformed_body_is_answered_1001_with_the_field(self, api: ApiProcess) -> None:
        for body, detail in (
            (b"7", "the body is not a JSON object"),
            (b'{"mail": "x"}', "email is missing"),
            (b'{"email": "a@example.com", "purpose": "No"}', "purpose must be 1 to 32 characters of a-z, 0-9, _ and -"),
        ):
            assert api.http.post("/demo/request", content=body).json() == {"error": 1001, "detail": detail}
        assert api.http.post("/demo/request", content=b"x" * 20_000).status_code == 413

    def test_a_deferral_is_a_note_at_the_relay(self, api: ApiProcess, rig: Rig) -> None:
        rig.script("later@example.com", rcpt=["451 later"])
        lines = ask(api, "later@example.com")
        assert stages(lines) == STAGES
        assert [line["stage"] for line in lines if line.get("note") == "again"] == ["relay"]
        assert lines[-1]["error"] == 0

    @pytest.mark.slow
    def test_a_relay_that_is_away_is_a_timeout(self, new_rig: Callable[..., Rig]) -> None:
        rig = new_rig(reply_timeout=2, give_up_after=3, relays="smtp://127.0.0.1:9")
        rig.add_worker()
        with ApiProcess({**rig.settings, **DEMO}) as api:
            lines = ask(api, "away@example.com")
        assert stages(lines) == STAGES
        assert {line["stage"] for line in lines if line.get("note") == "again"} == {"relay"}
        assert lines[-1]["error"] == 6

    def test_a_missing_worker_is_a_note_at_the_queue(self, alone: ApiProcess) -> None:
        lines = ask(alone, "alone@example.com")
        assert stages(lines) == ["api", "queue", "reply"]
        [note] = [line for line in lines if "note" in line]
        assert (note["stage"], note["note"]) == ("queue", "no worker")
        assert lines[-1]["error"] == 6

    def test_without_redis_the_error_is_1(self) -> None:
        with ApiProcess({"VERIFY_REDIS_URL": "redis://127.0.0.1:1", **DEMO}) as api:
            assert ask(api, "a@example.com")[-1]["error"] == 1

    def test_stages_come_back_after_the_events_connection_was_lost(self, api: ApiProcess, rig: Rig) -> None:
        assert stages(ask(api, "before@example.com")) == STAGES
        ids = [each["id"] for each in rig.broker.client_list(_type="pubsub") if each["psub"] == "1"]
        assert ids
        for each in ids:
            rig.broker.client_kill_filter(_id=each)
        eventually(lambda: stages(ask(api, address())) == STAGES)

    def test_an_event_with_an_impossible_time_is_ignored(self, redis_server: RedisServer, alone: ApiProcess) -> None:
        with redis_server.client(1) as broker:
            body = b'{"email": "forged@example.com"}'
            with alone.http.stream("POST", "/demo/request", content=body) as answer:
                lines = answer.iter_lines()
                assert [json.loads(next(lines))["stage"] for _ in range(2)] == ["api", "queue"]
                request_id = json.loads(broker.lindex("verification", 0))["headers"]["id"]
                received = [("task-received", at) for at in (10**400, True, None, "now")]
                for kind, at in (*received, ("task-started", time.time())):
                    event = {"type": kind, "uuid": request_id, "timestamp": at}
                    packed = json.dumps({"body": b64encode(json.dumps([event]).encode()).decode()})
                    assert broker.publish("/1.celeryev/task.multi", packed) == 1
                # It came on the same connection, so those before it were ignored.
                assert json.loads(next(lines))["stage"] == "relay"


class TestThePage:
    def test_without_the_setting_there_is_no_page(self, bare: dict[str, str]) -> None:
        with ApiProcess(bare) as api:
            for path in ("/", "/page/page.js", "/page/mail/x", "/demo/facts", "/demo/inbox", "/demo/inbox/x"):
                assert api.http.get(path).status_code == 404
            assert api.http.post("/demo/request", content=b"{}").status_code == 404

    def test_everything_it_loads_comes_from_here_and_nothing_is_inline(self, api: ApiProcess) -> None:
        page = api.http.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "://" not in page.text
        wanted = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text))
        seen: set[str] = set()
        while wanted - seen:
            name = (wanted - seen).pop()
            part = api.http.get(name)
            assert part.status_code == 200, name
            wanted |= {f"/page/{each}" for each in re.findall(r'from "\./([^"]+)"', part.text)}
            seen.add(name)
            assert {url for url in re.findall(r"\w+://[\w.]+", part.text) if url != "http://www.w3.org"} == set()
        assert seen >= {f"/page/{name}" for name in ("style.css", "page.js", "words.js", "icon.svg")}
        assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", page.text) == []
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy

    def test_facts(self, api: ApiProcess) -> None:
        facts = api.http.get("/demo/facts").json()
        assert (facts["ttl"], facts["cooldown"], facts["inbox"], facts["flower"]) == (600, 10, False, None)
        assert facts["errors"] == {
            str(int(code)): {"meaning": code.meaning, "advice": code.advice} for code in ErrorCode
        }

    def test_nothing_else_is_served(self, api: ApiProcess) -> None:
        for path in ("/page/", "/page/nothing", "/page/__init__.py", "/page/%2e%2e/routes.py"):
            assert api.http.get(path).status_code == 404

    def test_with_keys_the_page_is_open_and_its_data_is_not(self, bare: dict[str, str]) -> None:
        with ApiProcess({**bare, **DEMO, "VERIFY_API_KEYS": KEYS}) as api:
            for path in ("/", "/page/page.js", "/page/style.css"):
                assert api.http.get(path).status_code == 200
            for path in ("/demo/facts", "/demo/inbox", "/demo/inbox/x", "/demo", "/pages", "/metrics", "/page"):
                assert api.http.get(path).status_code == 401
            assert api.http.post("/demo/request", content=b"{}").status_code == 401
            with_key = {"Host": "demo.example.com", **WITH_KEY}  # with a key any host name will do
            assert api.http.get("/demo/facts", headers=with_key).json()["keys"] is True
            assert "whoever opens the page" not in api.log

    @pytest.mark.parametrize("path", ["/demo/facts", "/demo/inbox", "/demo/inbox/x", "/page/mail/x"])
    def test_a_foreign_host_name_reads_nothing(self, api: ApiProcess, path: str) -> None:
        for host in ("evil.example", "127.0.0.1.evil.example:8081", "localhost.evil.example", "localhost@evil.example"):
            answer = api.http.get(path, headers={"Host": host})
            assert (answer.status_code, answer.json()["error"]) == (403, 1001)
        for host in ("localhost:8081", "demo.localhost", "[::1]:8081", "192.0.2.1"):
            assert api.http.get(path, headers={"Host": host}).status_code in {200, 404}
        asked = api.http.post("/demo/request", content=b'{"email": "a@example.com"}', headers={"Host": "evil.example"})
        assert asked.status_code == 403

    def test_beyond_loopback_host_names_are_checked_and_a_warning_is_logged(self, alone: ApiProcess) -> None:
        assert alone.http.get("/demo/facts", headers={"Host": "evil.example"}).status_code == 403
        assert alone.http.get("/demo/facts").status_code == 200
        assert alone.log.count("whoever opens the page") == 1


class TestTheInbox:
    def test_it_shows_the_mails_of_the_catcher(self, new_rig: Callable[..., Rig]) -> None:
        with Catcher() as catcher, Inbox(catcher) as inbox:
            rig = new_rig(relays=catcher.url)
            rig.add_worker()
            with ApiProcess({**rig.settings, **DEMO, "VERIFY_DEMO_INBOX": inbox.url, "VERIFY_API_KEYS": KEYS}) as api:
                api.http.headers.update(WITH_KEY)
                assert api.http.get("/demo/inbox").json() == {"mails": []}
                for name in ("anna", "bob"):
                    assert ask(api, f"{name}@example.com", locale="en")[-1]["error"] == 0
                mails = api.http.get("/demo/inbox").json()["mails"]
                assert [mail["to"] for mail in mails] == [["bob@example.com"], ["anna@example.com"]]
                assert {mail["subject"] for mail in mails} == {"Your verification code"}
                mail = api.http.get(f"/demo/inbox/{mails[0]['id']}").json()
                code = rig.codes.get("code_bob@example.com").decode()  # type: ignore[union-attr]
                assert code in mail["text"]
                del api.http.headers["Authorization"]  # a frame sends none
                view = api.http.get(f"/page/mail/{mail['view']}")
                assert code in view.text
                assert view.headers["content-type"] == "text/html; charset=utf-8"
                policy = view.headers["content-security-policy"]
                assert policy.startswith("default-src 'none'; ")
                assert policy.endswith("; sandbox")
                assert "script-src" not in policy
                assert api.http.get("/page/mail/other").status_code == 404
            rig.worker.stop()

    def test_without_an_inbox_the_answer_names_the_setting(self, api: ApiProcess) -> None:
        answer = api.http.get("/demo/inbox")
        assert answer.status_code == 404
        assert "VERIFY_DEMO_INBOX" in answer.json()["detail"]

    def test_an_unreachable_inbox_is_an_error(self, alone: ApiProcess) -> None:
        answer = alone.http.get("/demo/inbox")
        assert (answer.status_code, answer.json()["error"]) == (502, 2)
        assert "cannot be reached" in answer.json()["detail"]

    @pytest.mark.parametrize(("reply", "why"), [
        (b"", "something else"),
        (b"220 hello\r\n", "something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{not JSON", "something else"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"messages": [{"ID": "../../etc"}]}', "something else"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "answered 101"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (LIMIT + 1), "more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"[" * 99, "something else"),
    ], ids=["silence", "SMTP", "a list", "no JSON", "a path", "elsewhere", "upgrade", "too much", "cut"])  # fmt: skip
    def test_what_it_answers_is_not_trusted(
        self, hostile: ApiProcess, answers: list[bytes], reply: bytes, why: str
    ) -> None:
        answers[:] = [reply]
        answer = hostile.http.get("/demo/inbox")
        assert answer.status_code == 502
        assert why in answer.json()["detail"]

    def test_what_is_not_shown_is_not_validated(self, hostile: ApiProcess, answers: list[bytes]) -> None:
        fit = b'{"ID": "a", "To": [%s]}' % b",".join([b'{"Address": "b"}'] * NEWEST + [b"0"] * 1000)
        answers[:] = [b'HTTP/1.1 200 OK\r\n\r\n{"messages": [%s]}' % b",".join([fit] * NEWEST + [b"0"] * 1000)]
        mails = hostile.http.get("/demo/inbox").json()["mails"]
        assert [mail["to"] for mail in mails] == [["b"] * NEWEST] * NEWEST

    @pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
    def test_an_endless_answer_is_cut_off(self, hostile: ApiProcess, answers: list[bytes], begin: bytes) -> None:
        answers[:] = [begin, *[b"x"] * 100]
        answer = hostile.http.get("/demo/inbox")
        assert answer.status_code == 502
        assert "within" in answer.json()["detail"]

    def test_a_mails_id_leads_nowhere_else(
        self, hostile: ApiProcess, answers: list[bytes], received: list[bytes]
    ) -> None:
        answers[:] = [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"]
        assert hostile.http.get("/demo/inbox/..%3Fx%0d%0aHost:y").status_code == 502
        assert received[-1].startswith(b"GET /api/v1/message/..%3Fx%0D%0AHost%3Ay HTTP/1.1\r\n")


@pytest.fixture(scope="module")
def answers() -> list[bytes]:
    """What the hostile catcher answers, in pieces a tenth of a second apart."""
    return []


@pytest.fixture(scope="module")
def received() -> list[bytes]:
    """What the catcher received."""
    return []


@pytest.fixture(scope="module")
def hostile(redis_server: RedisServer, answers: list[bytes], received: list[bytes]) -> Iterator[ApiProcess]:
    """An API whose inbox is a hostile catcher."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            received.append(connection.recv(65536))
            with contextlib.suppress(OSError):  # the API has left
                for i, piece in enumerate(list(answers)):
                    time.sleep(0.1 if i else 0)
                    connection.sendall(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), **DEMO, "VERIFY_DEMO_INBOX": url}) as api:
            yield api
        server.shutdown()

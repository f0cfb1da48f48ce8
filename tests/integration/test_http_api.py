"""The HTTP API in a process of its own, with a real Redis server and a fake worker."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis as redis_py
from support.api_process import ApiProcess, answer_of, request_bytes
from support.fake_worker import FakeWorker
from support.process import WAIT_TIMEOUT, eventually
from support.redis_server import RedisServer

from producer.contract import ErrorCode

A = "a@example.com"
REPLY_TIMEOUT = 8  # seconds: a test waits for it, and on a loaded machine it must not run out in the others
ASK, CHECK = "/get_varifycode", "/check_varifycode"


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with ApiProcess(
        {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": str(REPLY_TIMEOUT), "VERIFY_MAX_QUEUE": "1000"}
    ) as api:
        yield api


@pytest.fixture(autouse=True)
def _empty(redis: redis_py.Redis) -> None:
    """The shared server is empty at first."""


class TestRequest:
    @pytest.mark.parametrize("email", [
        *(A, " A@b.example ", "ü@例子.example", "a\u0000@b", "", "nobody", "😀@x.example", 'q"\\/@b.cn', "x" * 10_000)
    ])  # fmt: skip
    def test_the_address_comes_back_as_given(self, api: ApiProcess, redis_server: RedisServer, email: str) -> None:
        with FakeWorker(redis_server):
            said = api.get_code(email)
        assert said["email"] == email
        assert type(said["error"]) is int
        assert set(said) == {"error", "email"}

    def test_as_bytes(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server):
            body = '{"email":"ü@x.example"}'.encode()
            with api.knock(request_bytes(ASK, body)) as connection:
                status, headers, answer = answer_of(connection)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert answer == '{"error": 0, "email": "ü@x.example"}'.encode()

    def test_half_a_surrogate_pair_comes_back(self, api: ApiProcess) -> None:
        answer = api.http.post(ASK, content=b'{"email": "\\ud800@x.example"}')
        assert answer.json() == {"error": 3, "email": "\ud800@x.example"}

    @pytest.mark.parametrize("error", range(7))
    def test_every_answer_of_the_worker_comes_through(
        self, api: ApiProcess, redis_server: RedisServer, error: int
    ) -> None:
        with FakeWorker(redis_server, error=lambda _: error):
            assert api.get_code(A) == {"error": error, "email": A}

    def test_purpose_locale_and_client_travel(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server) as worker:
            for more in ({"purpose": "login", "locale": "en"}, {"locale": None}, {"locale": 7}, {"locale": "xx"}):
                assert api.get_code(A, **more)["error"] == 0
            for more in ({"locale": "e" * 36}, {"client": "c" * 64}, {"client": None}, {"client": ""}):
                assert api.get_code(A, **more)["error"] == 0
        assert [each.kwargs for each in worker.taken] == [
            {"email": A, "purpose": "login", "locale": "en"},
            {"email": A},
            {"email": A},
            {"email": A, "locale": "xx"},
            {"email": A},
            {"email": A, "client": "c" * 64},
            {"email": A},
            {"email": A},
        ]

    def test_a_header_stands_for_the_client(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server) as worker:
            for more, header in (({}, "a"), ({"client": "b"}, "a"), ({"client": None}, "x" * 64), ({}, "")):
                said = api.post(ASK, {"email": A, **more}, headers={"X-Verify-Client": header})
                assert said["error"] == 0
        assert [each.kwargs.get("client") for each in worker.taken] == ["a", "b", "x" * 64, None]
        for twice in ([("X-Verify-Client", "x" * 65)], [("X-Verify-Client", "a"), ("X-Verify-Client", "b")]):
            said = api.post(ASK, {"email": A}, headers=twice)
            assert said == {"error": 1001, "detail": "x-verify-client must come once, with at most 64 characters"}

    @pytest.mark.parametrize("kind", ["text/json", "application/x-www-form-urlencoded", "nonsense", ""])
    def test_the_content_type_does_not_matter(self, api: ApiProcess, redis_server: RedisServer, kind: str) -> None:
        with FakeWorker(redis_server):
            assert api.post(ASK, {"email": A}, headers={"Content-Type": kind})["error"] == 0

    def test_without_a_worker_it_is_a_timeout(self, api: ApiProcess) -> None:
        began = time.monotonic()
        assert api.get_code(A) == {"error": 6, "email": A}
        assert time.monotonic() - began >= REPLY_TIMEOUT


NO_OBJECT = "the body is not a JSON object"
PURPOSE = "purpose must be 1 to 32 characters of a-z, 0-9, _ and -"
MALFORMED_BODIES = {
    "empty": (b"", NO_OBJECT),
    "not JSON": (b"{email}", NO_OBJECT),
    "not UTF-8": (b'{"email": "\xff@x.example"}', NO_OBJECT),
    "a number": (b"7", NO_OBJECT),
    "a list": (b'["a@example.com"]', NO_OBJECT),
    "null": (b"null", NO_OBJECT),
    "nested lists": (b"[" * 10_000 + b"]" * 6_000, NO_OBJECT),
    "nested objects": (b'{"a":' * 3_000, NO_OBJECT),
    "nested email": (b'{"email": ' + b"[" * 8_000 + b"]" * 8_000 + b"}", NO_OBJECT),
    "a long number": (b'{"email": ' + b"9" * 10_000 + b"}", NO_OBJECT),
    "no email": (b'{"mail": "a@example.com"}', "email is missing"),
    "email a number": (b'{"email": 7}', "email must be a string"),
    "email null": (b'{"email": null}', "email must be a string"),
    "email a list": (b'{"email": ["a@example.com"]}', "email must be a string"),
    "a malformed purpose": (b'{"email": "a@example.com", "purpose": "Not One"}', PURPOSE),
    "an empty purpose": (b'{"email": "a@example.com", "purpose": ""}', PURPOSE),
    "a purpose too long": (b'{"email": "a@example.com", "purpose": "' + b"p" * 33 + b'"}', PURPOSE),
    "a purpose with a line's end": (b'{"email": "a@example.com", "purpose": "p\\n"}', PURPOSE),
    "purpose null": (b'{"email": "a@example.com", "purpose": null}', PURPOSE),
    "purpose a number": (b'{"email": "a@example.com", "purpose": 7}', PURPOSE),
}
CLIENT = "client must be a string of at most 64 characters"
MALFORMED_CLIENTS = {"too long": "c" * 65, "a number": 7, "a list": ["c"], "false": False}


class TestMalformed:
    @pytest.mark.parametrize("client", MALFORMED_CLIENTS.values(), ids=MALFORMED_CLIENTS.keys())
    def test_what_cannot_be_a_client_is_1001(self, api: ApiProcess, client: object) -> None:
        assert api.post(ASK, {"email": A, "client": client}) == {"error": 1001, "detail": CLIENT}

    @pytest.mark.parametrize(("body", "detail"), MALFORMED_BODIES.values(), ids=MALFORMED_BODIES.keys())
    @pytest.mark.parametrize("path", [ASK, CHECK])
    def test_it_is_1001_and_detail_names_the_field(
        self, api: ApiProcess, redis_server: RedisServer, path: str, body: bytes, detail: str
    ) -> None:
        body = body.replace(b'{"email"', b'{"varifycode": "1", "email"').replace(
            b'{"mail"', b'{"varifycode": "1", "mail"'
        )
        answer = api.http.post(path, content=body)
        assert (answer.status_code, answer.json()) == (200, {"error": 1001, "detail": detail})
        with redis_server.client(1) as broker:
            assert broker.llen("verification") == 0

    @pytest.mark.parametrize("code", [None, 7, ["1"], {}])
    def test_a_code_that_is_not_a_string(self, api: ApiProcess, code: object) -> None:
        assert api.check(A, code) == {"error": 1001, "detail": "varifycode must be a string"}

    def test_every_field_is_named(self, api: ApiProcess) -> None:
        answer = api.post(CHECK, {"purpose": 7})
        assert answer == {"error": 1001, "detail": f"email is missing; varifycode is missing; {PURPOSE}"}

    @pytest.mark.parametrize("path", [ASK, CHECK])
    def test_a_wrong_method(self, api: ApiProcess, path: str) -> None:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            answer = api.http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert answer.json() == {"error": 1001, "detail": "use POST with a JSON body"}

    def test_a_wrong_path(self, api: ApiProcess) -> None:
        for path in ("/", "/get_varifycode/", "/nothing", "/%00"):
            answer = api.http.post(path, content=b"{}")
            assert (answer.status_code, answer.json()["error"]) == (404, 1001)

    @pytest.mark.parametrize(
        "junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"]
    )
    def test_what_is_not_http(self, api: ApiProcess, junk: bytes) -> None:
        with api.knock(junk) as connection:
            status, _, body = answer_of(connection)
        assert (status, json.loads(body)["error"]) == (400, 1001)

    def test_an_endless_head(self, api: ApiProcess) -> None:
        with api.knock(b"GET / HTTP/1.1\r\n" + b"X-Filler: 0123456789\r\n" * 2000) as connection:
            status, _, body = answer_of(connection)
        assert (status, json.loads(body)["error"]) == (431, 1001)


class TestTooLarge:
    def test_a_body_is_refused_unread(self, api: ApiProcess) -> None:
        head = request_bytes(ASK, b"").replace(b"Content-Length: 0", b"Content-Length: 16385")
        with api.knock(head) as connection:
            status, _, body = answer_of(connection)
        assert (status, json.loads(body)["error"]) == (413, 1001)

    def test_one_just_small_enough_is_read(self, api: ApiProcess) -> None:
        body = b'{"email": 7}'.ljust(16384)
        assert api.http.post(ASK, content=body).json()["error"] == 1001
        assert api.http.post(ASK, content=body + b" ").status_code == 413

    def test_a_client_that_first_sends_all_sees_the_answer(self, api: ApiProcess) -> None:
        assert api.http.post(ASK, content=b"x" * 5_000_000).status_code == 413

    def test_chunks_without_end_are_cut(self, api: ApiProcess) -> None:
        head = b"POST /get_varifycode HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        with api.knock(head) as connection:
            answers: list[int] = []
            reader = threading.Thread(target=lambda: answers.append(answer_of(connection)[0]))
            reader.start()
            began = time.monotonic()
            with contextlib.suppress(OSError):  # the API hangs up
                while time.monotonic() - began < WAIT_TIMEOUT:
                    connection.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")
            reader.join(60)
        assert answers == [413]

    def test_a_malformed_length(self, api: ApiProcess) -> None:
        for length in (b"99999999999999999999999999", b"-1", b"1e3", "²".encode()):
            with api.knock(request_bytes(ASK, b"").replace(b"Length: 0", b"Length: " + length)) as connection:
                assert answer_of(connection)[0] in {400, 413}


class TestCheck:
    def test_the_right_code_works_once(self, api: ApiProcess, redis: redis_py.Redis) -> None:
        redis.set("code_" + A, "123456", ex=60)
        assert [api.check(A, code) for code in ("000000", "123456 ", "123456", "123456")] == [
            {"error": error, "email": A} for error in (1004, 1004, 0, 1003)
        ]

    def test_the_purpose_is_part_of_it(self, api: ApiProcess, redis: redis_py.Redis) -> None:
        redis.set(f"code:login:{A}", "123456", ex=60)
        assert api.check(A, "123456")["error"] == 1003
        assert api.check(A, "123456", purpose="login")["error"] == 0

    def test_of_a_crowd_one_succeeds(self, api: ApiProcess, redis: redis_py.Redis) -> None:
        redis.set("code_" + A, "123456", ex=60)
        with ThreadPoolExecutor(16) as pool:
            errors = sorted(said["error"] for said in pool.map(lambda _: api.check(A, "123456"), range(50)))
        assert errors == [0] + [1003] * 49

    def test_no_get_consumes(self, api: ApiProcess, redis: redis_py.Redis) -> None:
        redis.set("code_" + A, "123456", ex=60)
        for path in (CHECK, "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
            api.http.get(path, params={"email": A, "varifycode": "123456"})
        assert redis.get("code_" + A) == b"123456"

    def test_odd_addresses(self, api: ApiProcess) -> None:
        for email in ("", "nobody", "a\u0000b", "x" * 10_000):
            assert api.check(email, "1") == {"error": 1003, "email": email}


class TestProbesAndDocs:
    def test_readyz_needs_a_worker(self, api: ApiProcess, redis_server: RedisServer) -> None:
        answer = api.http.get("/readyz")
        parts = {"broker": True, "results": True, "codes": True, "workers": 0, "leaving": False}
        assert (answer.status_code, answer.json()) == (503, {"ready": False, **parts})
        with redis_server.client(1) as broker:
            broker.zadd("verification.workers", {"long gone": time.time() - 6, "alive": time.time()})
        eventually(lambda: api.http.get("/readyz").status_code == 200)
        assert api.http.get("/readyz").json() == {**parts, "ready": True, "workers": 1}
        assert [api.http.head(path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        assert api.http.get("/healthz").json() == {"status": "ok"}

    def test_metrics(self, api: ApiProcess, redis_server: RedisServer) -> None:
        before = api.metric("verify_api_requests_total", protocol="http", error="5", verb="request")
        with FakeWorker(redis_server, error=lambda _: 5):
            api.get_code(A)
        assert api.metric("verify_api_requests_total", protocol="http", error="5", verb="request") == before + 1
        refused = api.metric("verify_api_refusals_total", status="404")
        api.http.get("/nothing")
        assert api.metric("verify_api_refusals_total", status="404") == refused + 1
        with redis_server.client(1) as broker:
            says_when = json.dumps({"headers": {"enqueued_at": time.time() - 30}})
            broker.lpush("verification", "the oldest does not say when", says_when)
            broker.hset("verification.parked", "id", "1 x")
            broker.rpush("verification.dead", "x", "x", "x")
            time.sleep(0.3)
            figures = ("queue_requests", "queue_delayed_requests", "dead_letters", "workers", "broker_up")
            assert [api.metric(f"verify_{name}") for name in figures] == [2, 1, 3, 0, 1]
            assert 29 < api.metric("verify_queue_oldest_age_seconds") < 40
        text = api.http.get("/metrics").text
        assert "@" not in text
        assert "verify_api_request_seconds_bucket" in text
        assert "process_open_fds" in text

    def test_openapi_and_its_page_need_nothing_from_elsewhere(self, api: ApiProcess) -> None:
        page, described = api.http.get("/docs"), api.http.get("/openapi.json").json()
        assert page.headers["content-type"].startswith("text/html")
        assert set(described["paths"]) == {ASK, CHECK, "/healthz", "/readyz", "/metrics"}
        assert [url for url in re.findall(r'(?:src|href)="([^"]+)"', page.text) if not url.startswith("/")] == []
        for url in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert api.http.get(url).status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert page.headers["x-content-type-options"] == "nosniff"

    def test_openapi_has_every_error_code_and_whole_curl_lines(self, api: ApiProcess) -> None:
        described = api.http.get("/openapi.json").json()
        for error in ErrorCode:
            assert f"| {int(error)} | {error.title}&ensp; | {error.meaning} |" in described["info"]["description"]
        line = f'curl http://127.0.0.1:{api.http_port}{ASK} -d \'{{"email": "a@example.com"}}\'\n'
        assert line in described["paths"][ASK]["post"]["description"]

    def test_aliases_with_the_right_spelling(self, api: ApiProcess, redis: redis_py.Redis) -> None:
        redis.set("code_" + A, "123456", ex=60)
        assert api.post("/check_verifycode", {"email": A, "varifycode": "123456"}) == {"error": 0, "email": A}
        assert api.post("/get_verifycode", {"email": "nobody"}) == {"error": 3, "email": "nobody"}


class TestOverload:
    def test_a_full_queue_is_4_until_there_is_room_again(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with redis_server.client(1) as broker:
            broker.lpush("verification", *(["x"] * 600))
            broker.hset("verification.parked", mapping={str(i): "x" for i in range(401)})
            assert api.get_code(A) == {"error": 4, "email": A}
            assert api.call(A).error == 4
            assert broker.llen("verification") == 600
            broker.delete("verification")
        with FakeWorker(redis_server):
            assert api.get_code(A)["error"] == 0

    def test_a_crowd_does_not_overshoot(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with redis_server.client(1) as broker, ThreadPoolExecutor(32) as pool:
            broker.lpush("verification", *(["x"] * 990))
            errors = [said.error for said in pool.map(lambda i: api.call(f"u{i}@example.com"), range(200))]
            assert broker.llen("verification") == 1001  # it is not full with 1000, but with more
        assert (errors.count(6), errors.count(4)) == (11, 189)


class TestSlowClients:
    def test_a_thousand_that_send_nothing_hold_nothing_up(self, api: ApiProcess, redis_server: RedisServer) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the API does so itself
        silent = [api.knock(port=port) for port in (api.http_port, api.grpc_port) for _ in range(1000)]
        try:
            with FakeWorker(redis_server):
                assert api.get_code(A)["error"] == 0
                assert api.call(A).error == 0
                assert api.http.get("/healthz").status_code == 200
        finally:
            for each in silent:
                each.close()

    def test_half_a_request_times_out(self, api: ApiProcess, redis_server: RedisServer) -> None:
        half = request_bytes(ASK, b"x" * 100)[:-50]
        *heads, body = [api.knock(said) for said in (b"", b"POST /get", b"\r\n", half)]
        with FakeWorker(redis_server):
            assert api.get_code(A)["error"] == 0
        status, headers, said = answer_of(body)
        assert (status, json.loads(said)["error"], headers["connection"]) == (408, 1001, "close")
        assert [answer_of(each)[0] for each in heads] == [0, 0, 0]
        for each in (*heads, body):
            each.close()

    def test_byte_by_byte(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server), api.knock() as connection:
            for byte in request_bytes(ASK, json.dumps({"email": A}).encode()):
                connection.sendall(bytes([byte]))
                time.sleep(0.002)
            assert answer_of(connection)[0] == 200

    def test_a_client_that_closes_its_half(self, api: ApiProcess, redis_server: RedisServer) -> None:
        whole = request_bytes(ASK, json.dumps({"email": A}).encode())
        with FakeWorker(redis_server, before=lambda *_: time.sleep(0.2)), api.knock(whole) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert answer_of(connection)[0] == 200
            assert connection.recv(1) == b""

    def test_a_client_that_goes_away(self, api: ApiProcess) -> None:
        for _ in range(20):
            api.knock(request_bytes(ASK, json.dumps({"email": A}).encode())).close()
        eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="http") == 0)

    def test_requests_in_a_pipeline(self, api: ApiProcess, redis_server: RedisServer) -> None:
        one = request_bytes(ASK, json.dumps({"email": A}).encode())
        with FakeWorker(redis_server), api.knock(one * 3) as connection:
            data = b""
            while data.count(b"}") < 3 and (more := connection.recv(65536)):
                data += more
        assert data.count(b"HTTP/1.1 200") == 3

    def test_a_client_that_asks_for_http2(self, api: ApiProcess, redis_server: RedisServer) -> None:
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAA")
        body = json.dumps({"email": A}).encode()
        whole = request_bytes(ASK, body, *upgrade)
        with FakeWorker(redis_server):
            for cut in (0, 30, len(whole) - len(body), len(whole) - 5):
                with api.knock(whole[:cut]) as connection:
                    time.sleep(0.05)
                    connection.sendall(whole[cut:])
                    assert answer_of(connection)[0::2] == (200, b'{"error": 0, "email": "a@example.com"}')
                    connection.sendall(whole)
                    assert answer_of(connection)[0] == 200

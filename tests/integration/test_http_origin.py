"""Without keys, the HTTP API answers no page of another origin, and to no name that a site could point at it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
import redis as redis_py
from support.api_process import ApiProcess, answer_of
from support.redis_server import RedisServer

ASK = "/get_varifycode"
ROUTES = [("POST", ASK), ("POST", "/check_varifycode"), ("GET", "/"), ("POST", "/demo/request")]
ROUTES += [("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/nothing")]
BODY = b'{"email": "nobody", "varifycode": "1"}'
# What browsers send beside Host: to this API's own pages, and from elsewhere.
OWN = [
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://{host}"},
    {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    {"Origin": "http://{host}"},
    {},
]
FOREIGN = [
    {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
]


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_DEMO": "1"}) as api:
        yield api


@pytest.fixture(autouse=True)
def _empty(redis: redis_py.Redis) -> None:
    """The shared server is empty at first."""


def answers(api: ApiProcess, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    host = f"127.0.0.1:{api.http_port}"
    return api.http.request(
        method, path, content=BODY, headers={name: value.format(host=host) for name, value in headers.items()}
    )


def is_refused(answer: httpx.Response, what: str) -> bool:
    return answer.status_code == 403 and answer.json()["error"] == 1001 and what in answer.json()["detail"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_refuses_a_foreign_host_and_origin(api: ApiProcess, method: str, path: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8081", "localhost@evil.example", "1.2.3", "", "x" * 300):
        assert is_refused(answers(api, method, path, {"Host": host}), "VERIFY_ALLOW_PLAINTEXT=1")
    for host in ("localhost", "localhost:8081", "LOCALHOST.", "demo.localhost", "[::1]:8081", "192.0.2.1"):
        assert answers(api, method, path, {"Host": host}).status_code not in {400, 403}
    for headers in FOREIGN:
        assert is_refused(answers(api, method, path, headers), "VERIFY_API_KEYS")
    for headers in OWN:
        assert answers(api, method, path, headers).status_code not in {400, 403}


def test_a_form_elsewhere_sends_no_mail(api: ApiProcess, redis_server: RedisServer) -> None:
    form = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    answer = api.http.post(ASK, content=b'{"email": "a@example.com"}', headers={**form, "Content-Type": "text/plain"})
    assert is_refused(answer, "another origin")
    with redis_server.client(1) as broker:
        assert broker.llen("verification") == 0


def test_a_link_elsewhere_may_be_followed(api: ApiProcess) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert api.http.get("/", headers=link).status_code == 200
    assert is_refused(api.http.get("/", headers={**link, "Sec-Fetch-Dest": "iframe"}), "another origin")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n", 403),
        (b"GET /healthz HTTP/1.0\r\n", 200),  # as old health checks do; browsers do not
    ],
)
def test_a_missing_or_second_host_is_refused(api: ApiProcess, head: bytes, status: int) -> None:
    with api.knock(head + b"\r\n") as connection:
        answer = answer_of(connection)
    assert answer[0] == status
    if status == 400:
        assert json.loads(answer[2]) == {"error": 1001, "detail": "a request names its Host once"}


def test_behind_a_proxy_any_host_will_do_and_no_foreign_origin(redis_server: RedisServer) -> None:
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_ALLOW_PLAINTEXT": "1"}) as api:
        assert api.post(ASK, {"email": "nobody"}, headers={"Host": "verify.example.com"})["error"] == 3
        own = {"Host": "verify.example.com", "Origin": "https://verify.example.com"}
        assert api.post(ASK, {"email": "nobody"}, headers=own)["error"] == 3
        for headers in FOREIGN:
            assert is_refused(answers(api, "POST", ASK, headers), "VERIFY_API_KEYS")
        with api.knock(b"GET /healthz HTTP/1.1\r\n\r\n") as connection:
            assert answer_of(connection)[0] == 400


def test_with_keys_the_key_decides(redis_server: RedisServer) -> None:
    key = "0123456789abcdef"
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_API_KEYS": f"a:{key}"}) as api:
        elsewhere = {"Host": "verify.example.com", "Origin": "https://shop.example.com", "Sec-Fetch-Site": "same-site"}
        assert api.http.post(ASK, content=BODY, headers=elsewhere).status_code == 401
        with_key = {**elsewhere, "Authorization": f"Bearer {key}"}
        assert api.post(ASK, {"email": "nobody"}, headers=with_key)["error"] == 3

"""Every example gets a reply from a real worker, and a real mail is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from support.api_process import KEY, KEYS, ApiProcess
from support.caller import address
from support.examples_run import BUILD_TIMEOUT, EXAMPLES, build, copied, fenced, lines_at_top, shell
from support.redis_server import RedisServer
from support.rig import CODE_LENGTH, Rig, code_in

README = EXAMPLES / "README.md"
LINES: Final = [line for block in fenced(README, "sh") for line in block.splitlines()]
REPLY_TIMEOUT: Final = 60  # seconds, on a busy machine
LONGEST: Final = 80  # lines: an example is read in one go
INVALID: Final = ['no"address\\', "用户 \u2028@", pytest.param("<>", marks=pytest.mark.slow)]


def tools(*names: str) -> list[object]:
    """Parameters that need a program which pip does not install."""
    return [pytest.param(name, marks=[pytest.mark.tools, pytest.mark.timeout(2 * BUILD_TIMEOUT)]) for name in names]


def line_for(file: str) -> str:
    """The README's line that runs this example."""
    [found] = [line for line in LINES if re.search(rf"(^| ){re.escape(file)} ", line)]
    return found


def at_redis(server: RedisServer) -> Mapping[str, str]:
    """The environment of an example that uses Redis."""
    return {"VERIFY_REDIS_URL": server.url(), "VERIFY_REPLY_TIMEOUT": str(REPLY_TIMEOUT)}


def at_api(api: ApiProcess) -> Mapping[str, str]:
    """The environment of an example that uses the API. Java reads its arguments in the locale's encoding."""
    where = {"HTTP_API": f"http://127.0.0.1:{api.http_port}", "GRPC_API": f"127.0.0.1:{api.grpc_port}"}
    return {**where, "API_KEY": KEY, "VERIFY_REPLY_TIMEOUT": str(REPLY_TIMEOUT), "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """With a Redis password that must be percent-encoded."""
    with RedisServer(password="p4ss word") as server, Rig(server=server, reply_timeout=REPLY_TIMEOUT) as rig:
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def api(rig: Rig) -> Iterator[ApiProcess]:
    """It asks for a key."""
    with ApiProcess({**rig.settings, "VERIFY_API_KEYS": KEYS}) as api:
        yield api


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module", params=["ask.py", "ask_celery.py", *tools("ask.mjs", "ask.cpp")])
def redis_line(request: pytest.FixtureRequest, examples: Path) -> str:
    """The README's line of an example that uses Redis, which is built if need be."""
    found = line_for(request.param)
    if request.param != "ask.cpp":
        return found
    assert found in lines_at_top(examples / "ask.cpp")
    compiler, found = found.split(" && ")
    build(f"{compiler} -Wall -Wextra -Werror", examples)
    return found


@pytest.fixture(
    scope="module",
    params=["ask_grpc.py", *tools("ask.sh", "ask_http.mjs", "Ask.java", "ask.go", "ask.php", "ask_grpc.mjs")],
)
def api_line(request: pytest.FixtureRequest, examples: Path) -> str:
    """The README's line of an example that uses the API; its packages are installed."""
    if request.param == "ask_grpc.mjs":
        [install] = [line for line in LINES if line.startswith("npm ")]
        build(install, examples)
    return line_for(request.param)


def test_the_readme_lists_each_example_and_each_is_short() -> None:
    files = [*EXAMPLES.glob("[Aa]sk*.*"), *EXAMPLES.glob("gateserver/*.cpp"), *EXAMPLES.glob("gateserver/*.h")]
    assert len(files) == 15
    assert {path.name: n for path in files if (n := len(path.read_text("utf-8").splitlines())) > LONGEST} == {}
    listed = re.findall(r"(?m)^\| \[\S+\]\((\S+?)\)", README.read_text("utf-8"))
    assert {path.name for path in files if path.parent == EXAMPLES} | {"gateserver/README.md"} == set(listed)
    assert all(line_for(path.name) for path in files if path.parent == EXAMPLES)


def assert_mailed(rig: Rig, email: str, shown: tuple[int, str, str]) -> None:
    """It printed Success, and one mail has the code that lies in Redis."""
    status, output, errors = shown
    assert (status, errors) == (0, "")
    assert json.loads(output) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert rig.codes.get(f"code_{email}") == code_in(mail).encode()


def test_over_redis_it_asks_and_prints_the_reply(rig: Rig, examples: Path, redis_line: str) -> None:
    email = address()
    assert_mailed(rig, email, shell(redis_line.replace("a@example.com", email), examples, at_redis(rig.server)))


@pytest.mark.parametrize("email", INVALID)
def test_over_redis_an_invalid_address_comes_back_as_given(
    rig: Rig, examples: Path, redis_line: str, email: str
) -> None:
    line = redis_line.replace("a@example.com", f"'{email}'")
    status, output, errors = shell(line, examples, at_redis(rig.server))
    assert (status, errors) == (1, "")
    assert json.loads(output) == {"email": email, "error": 3}


@pytest.mark.usefixtures("redis")  # an empty one
def test_over_redis_without_a_worker_it_stops_waiting(
    redis_server: RedisServer, examples: Path, redis_line: str
) -> None:
    environment = {**at_redis(redis_server), "VERIFY_REPLY_TIMEOUT": "3"}
    status, output, errors = shell(redis_line, examples, environment)
    assert (status, (output + errors).count("no reply within 3 s")) == (1, 1)
    with redis_server.client(1) as broker:
        assert broker.llen("verification") == 1


def test_over_redis_it_fails_when_redis_is_down(
    new_redis_server: Callable[..., RedisServer], examples: Path, redis_line: str
) -> None:
    server = new_redis_server()
    server.kill()
    assert shell(redis_line, examples, at_redis(server))[0] == 1


def test_over_the_api_it_asks_and_prints_the_reply(rig: Rig, api: ApiProcess, examples: Path, api_line: str) -> None:
    email = address()
    assert_mailed(rig, email, shell(api_line.replace("a@example.com", email), examples, at_api(api)))


@pytest.mark.parametrize("email", INVALID)
def test_over_the_api_an_invalid_address_comes_back_as_given(
    api: ApiProcess, examples: Path, api_line: str, email: str
) -> None:
    status, output, _ = shell(api_line.replace("a@example.com", f"'{email}'"), examples, at_api(api))
    assert status == 1
    assert json.loads(output) == {"email": email, "error": 3}


def test_over_the_api_it_fails_and_says_so_when_the_api_is_down(examples: Path, api_line: str) -> None:
    nowhere = {"HTTP_API": "http://127.0.0.1:9", "GRPC_API": "127.0.0.1:9"}
    status, output, errors = shell(api_line, examples, nowhere)
    assert status != 0
    assert output == ""
    assert errors


@pytest.mark.parametrize("file", ["ask_client.py", "ask_asyncio.py"])
def test_with_a_client_it_asks_and_prints_the_replies(rig: Rig, examples: Path, file: str) -> None:
    first, second = address(), address()
    line = line_for(file).replace("PYTHONPATH=..", f"PYTHONPATH={EXAMPLES.parent}")
    command = line.replace(" a@example.com", f" {first}").replace(" b@example.com", f" {second}")
    status, output, errors = shell(command, examples, rig.settings)
    assert (status, errors) == (0, "")
    emails = [first, second] if second in command else [first]
    assert [json.loads(each) for each in output.splitlines()] == [{"email": each, "error": 0} for each in emails]
    assert [len(rig.mails_to(each)) for each in emails] == [1] * len(emails)

    status, output, _ = shell(line.replace("a@example.com", "'<>'"), examples, rig.settings)
    assert (status, json.loads(output.splitlines()[0])) == (1, {"email": "<>", "error": 3})
    nowhere = {**rig.settings, "VERIFY_REDIS_URL": "redis://127.0.0.1:1"}
    status, output, _ = shell(line, examples, nowhere)
    assert (status, json.loads(output.splitlines()[0])["error"]) == (1, 1)


@pytest.mark.tools
def test_curl_asks_and_checks(rig: Rig, api: ApiProcess, examples: Path) -> None:
    email = address()
    ask, check = (
        each.replace("127.0.0.1:8081", f"127.0.0.1:{api.http_port}").replace("a@example.com", email)
        for block in fenced(EXAMPLES.parent / "README.md", "sh")
        for each in block.splitlines()
        if each.startswith("curl ")
    )
    ask, check = ask.replace("curl ", "curl -sS "), check.replace("curl ", "curl -sS ")
    assert_mailed(rig, email, shell(ask, examples))
    [mail] = rig.mails_to(email)
    assert len(code_in(mail)) == CODE_LENGTH
    for given, error in (("123456", 1004), (code_in(mail), 0), (code_in(mail), 1003)):
        assert json.loads(shell(check.replace("123456", given), examples)[1]) == {"email": email, "error": error}

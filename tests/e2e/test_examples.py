"""Every example asks a real worker, and a real mail comes of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from support.api_process import ApiProcess
from support.caller import address
from support.examples_run import BUILD_TIMEOUT, EXAMPLES, build, copied, fenced, lines_at_top, shell, where
from support.redis_server import RedisServer
from support.rig import CODE_LENGTH, Rig, code_in

TIMEOUT = 5.0  # seconds that each waits for its reply
README = EXAMPLES / "README.md"
LINES: Final = [line for block in fenced(README, "sh") for line in block.splitlines()]
UTF_8: Final = {"LC_ALL": "C.UTF-8"}  # for Java, whose arguments are bytes in the locale's encoding
NO_ADDRESSES: Final = ['no"address\\', "用户 \u2028@", "<>"]


def tools(*names: str) -> list[object]:
    """Parameters that need a program which pip does not install."""
    return [pytest.param(name, marks=[pytest.mark.tools, pytest.mark.timeout(2 * BUILD_TIMEOUT)]) for name in names]


def line_for(file: str) -> str:
    """The README's line that runs this example."""
    [found] = [line for line in LINES if re.search(rf"(^| ){re.escape(file)} ", line)]
    return found


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """With a password, as GateServer's Redis has one."""
    with RedisServer(password="p4ss word") as server, Rig(server=server) as rig:
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def doors(rig: Rig) -> Iterator[ApiProcess]:
    with ApiProcess(rig.settings) as doors:
        yield doors


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module", params=["ask.py", "ask_celery.py", *tools("ask.mjs", "ask.cpp")])
def line(request: pytest.FixtureRequest, examples: Path) -> str:
    """The README's line that asks over raw Redis; what must be built is."""
    found = line_for(request.param)
    if request.param != "ask.cpp":
        return found
    assert found in lines_at_top(examples / "ask.cpp")
    compiler, found = found.split(" && ")
    build(f"{compiler} -Wall -Wextra -Werror", examples)
    return found


@pytest.fixture(
    scope="module",
    params=[
        "ask_grpc.py",
        *tools("ask.sh", "ask_http.mjs", "Ask.java", "ask.go", "ask.php", "ask_grpc.mjs"),
    ],
)
def door_line(request: pytest.FixtureRequest, examples: Path) -> str:
    """The README's line that asks at a door; the packages that it needs are there."""
    found = line_for(request.param)
    if request.param == "ask_grpc.mjs":
        [install] = [line for line in LINES if line.startswith("npm ")]
        build(install, examples)
    return found


def at(doors: ApiProcess) -> Mapping[str, str]:
    """The environment that tells an example where the doors are."""
    http, grpc = f"http://127.0.0.1:{doors.http_port}", f"127.0.0.1:{doors.grpc_port}"
    return {"VERIFY_HTTP_DOOR": http, "VERIFY_GRPC_DOOR": grpc, **UTF_8}


def test_each_is_told_of_and_under_60_lines() -> None:
    files = [*EXAMPLES.glob("[Aa]sk*.*"), *EXAMPLES.glob("gateserver/*.cpp"), *EXAMPLES.glob("gateserver/*.h")]
    assert len(files) == 15
    assert {path.name: count for path in files if (count := len(path.read_text("utf-8").splitlines())) >= 60} == {}
    told = re.findall(r"(?m)^\| \[\S+\]\((\S+?)\)", README.read_text("utf-8"))
    assert {path.name for path in files if path.parent == EXAMPLES} | {"gateserver/README.md"} == set(told)
    for path in files:
        assert path.parent != EXAMPLES or line_for(path.name)


def test_it_asks_for_a_code_and_says_the_reply(rig: Rig, examples: Path, line: str) -> None:
    email = address()
    code, said, trouble = shell(line.replace("a@example.com", email), examples, where(rig.server))
    assert (code, trouble) == (0, "")
    assert json.loads(said) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert rig.codes.get(f"code_{email}") == code_in(mail).encode()


@pytest.mark.parametrize("email", NO_ADDRESSES)
def test_what_is_no_address_is_said_as_it_was_given(rig: Rig, examples: Path, line: str, email: str) -> None:
    code, said, trouble = shell(line.replace("a@example.com", f"'{email}'"), examples, where(rig.server))
    assert (code, trouble) == (1, "")
    assert json.loads(said) == {"email": email, "error": 3}


def test_without_a_worker_it_waits_no_longer_than_it_says(
    redis_server: RedisServer, redis: object, examples: Path, line: str
) -> None:
    del redis  # nothing is there
    start = time.monotonic()
    code, said, trouble = shell(line, examples, where(redis_server))
    assert (code, json.dumps(said + trouble).count("within 5 s")) == (1, 1)
    assert TIMEOUT - 0.5 < time.monotonic() - start < TIMEOUT + 5  # starting takes its time on a busy core
    with redis_server.client(1) as broker:
        assert broker.llen("verification") == 1


def test_without_redis_it_fails_at_once(
    new_redis_server: Callable[..., RedisServer], examples: Path, line: str
) -> None:
    server = new_redis_server()
    server.kill()
    start = time.monotonic()
    assert shell(line, examples, where(server))[0] == 1
    assert time.monotonic() - start < TIMEOUT


def test_at_a_door_it_asks_for_a_code_and_says_the_reply(
    rig: Rig, doors: ApiProcess, examples: Path, door_line: str
) -> None:
    email = address()
    code, said, trouble = shell(door_line.replace("a@example.com", email), examples, at(doors))
    assert (code, trouble) == (0, "")
    assert json.loads(said) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert rig.codes.get(f"code_{email}") == code_in(mail).encode()


@pytest.mark.parametrize("email", NO_ADDRESSES)
def test_at_a_door_what_is_no_address_is_said_as_it_was_given(
    doors: ApiProcess, examples: Path, door_line: str, email: str
) -> None:
    code, said, _ = shell(door_line.replace("a@example.com", f"'{email}'"), examples, at(doors))
    assert code == 1
    assert json.loads(said) == {"email": email, "error": 3}


def test_without_a_door_it_fails_and_says_so(examples: Path, door_line: str) -> None:
    nowhere = {"VERIFY_HTTP_DOOR": "http://127.0.0.1:9", "VERIFY_GRPC_DOOR": "127.0.0.1:9"}
    code, said, trouble = shell(door_line, examples, nowhere)
    assert code != 0
    assert said == ""
    assert trouble


@pytest.mark.parametrize("file", ["ask_client.py", "ask_asyncio.py"])
def test_with_a_client_it_asks_for_a_code_and_says_the_reply(rig: Rig, examples: Path, file: str) -> None:
    first, second = address(), address()
    line = line_for(file).replace("PYTHONPATH=..", f"PYTHONPATH={EXAMPLES.parent}")
    asked = line.replace("a@example.com", first).replace("b@example.com", second)
    code, said, trouble = shell(asked, examples, rig.settings)
    assert (code, trouble) == (0, "")
    emails = [first, second] if second in asked else [first]
    assert [json.loads(each) for each in said.splitlines()] == [{"email": each, "error": 0} for each in emails]
    assert [len(rig.mails_to(each)) for each in emails] == [1] * len(emails)

    code, said, _ = shell(line.replace("a@example.com", "'<>'"), examples, rig.settings)
    assert (code, json.loads(said.splitlines()[0])) == (1, {"email": "<>", "error": 3})
    nowhere = {**rig.settings, "VERIFY_REDIS_URL": "redis://127.0.0.1:1"}
    code, said, _ = shell(line, examples, nowhere)
    assert (code, json.loads(said.splitlines()[0])["error"]) == (1, 1)


@pytest.mark.tools
def test_over_http_with_curl(rig: Rig, doors: ApiProcess, examples: Path) -> None:
    email = address()
    ask, check = (
        each.replace("127.0.0.1:8081", f"127.0.0.1:{doors.http_port}").replace("a@example.com", email)
        for each in LINES
        if each.startswith("curl ")
    )
    code, said, trouble = shell(ask, examples)
    assert (code, trouble) == (0, "")
    assert json.loads(said) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert len(code_in(mail)) == CODE_LENGTH
    for given, error in (("123456", 1004), (code_in(mail), 0), (code_in(mail), 1003)):
        assert json.loads(shell(check.replace("123456", given), examples)[1]) == {"email": email, "error": error}

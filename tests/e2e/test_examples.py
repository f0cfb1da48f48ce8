"""Every example asks a real worker, and a real mail comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from caller import address
from doors_process import Doors
from examples_run import EXAMPLES, build, copied, fenced, lines_at_top, shell, where
from redis_server import RedisServer
from rig import CODE_LENGTH, Rig, code_in

PATIENCE = 5.0  # seconds that each waits for its reply
README = EXAMPLES / "README.md"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """With a password, as GateServer's Redis has one."""
    with RedisServer(password="p4ss word") as server, Rig(server=server) as rig:
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def doors(rig: Rig) -> Iterator[Doors]:
    with Doors(rig.settings) as doors:
        yield doors


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("examples"))


@pytest.fixture(
    scope="module",
    params=["python", pytest.param("node", marks=pytest.mark.tools), pytest.param("g++", marks=pytest.mark.tools)],
)
def line(request: pytest.FixtureRequest, examples: Path) -> str:
    """The README's line that asks over raw Redis; what must be built is."""
    [found] = [
        each for each in fenced(README, "sh")[0].splitlines() if each.startswith(request.param) and "grpc" not in each
    ]
    if request.param != "g++":
        return found
    assert found in lines_at_top(examples / "ask.cpp")
    compiler, found = found.split(" && ")
    build(f"{compiler} -Wall -Wextra -Werror", examples)
    return found


def test_each_is_under_60_lines() -> None:
    files = [*EXAMPLES.glob("ask*"), *EXAMPLES.glob("gateserver/*.cpp"), *EXAMPLES.glob("gateserver/*.h")]
    assert len(files) == 6
    assert {path.name: count for path in files if (count := len(path.read_text("utf-8").splitlines())) >= 60} == {}


def test_it_asks_for_a_code_and_says_the_reply(rig: Rig, examples: Path, line: str) -> None:
    email = address()
    code, said, trouble = shell(line.replace("a@example.com", email), examples, where(rig.server))
    assert (code, trouble) == (0, "")
    assert json.loads(said) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert rig.codes.get(f"code_{email}") == code_in(mail).encode()


@pytest.mark.parametrize("email", ['no"address\\', "用户 \u2028@", "<>"])
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
    assert PATIENCE - 0.5 < time.monotonic() - start < PATIENCE + 5  # starting takes its time on a busy core
    with redis_server.client(1) as broker:
        assert broker.llen("verification") == 1


def test_without_redis_it_fails_at_once(
    new_redis_server: Callable[..., RedisServer], examples: Path, line: str
) -> None:
    server = new_redis_server()
    server.kill()
    start = time.monotonic()
    assert shell(line, examples, where(server))[0] == 1
    assert time.monotonic() - start < PATIENCE


def test_over_grpc(rig: Rig, doors: Doors, examples: Path) -> None:
    [line] = [each for each in fenced(README, "sh")[0].splitlines() if "grpc" in each]
    email, door = address(), f"127.0.0.1:{doors.grpc_port}"
    code, said, trouble = shell(line.replace("a@example.com", email), examples, {"VERIFY_GRPC_DOOR": door})
    assert (code, json.loads(said)) == (0, {"email": email, "error": 0}), trouble
    assert len(rig.mails_to(email)) == 1
    assert shell(line, examples, {"VERIFY_GRPC_DOOR": "127.0.0.1:1"})[0] == 1


@pytest.mark.tools
def test_over_http_with_curl(rig: Rig, doors: Doors, examples: Path) -> None:
    email = address()
    ask, check = (
        each.replace("127.0.0.1:8081", f"127.0.0.1:{doors.http_port}").replace("a@example.com", email)
        for each in fenced(README, "sh")[1].splitlines()
    )
    code, said, trouble = shell(ask, examples)
    assert (code, trouble) == (0, "")
    assert json.loads(said) == {"email": email, "error": 0}
    [mail] = rig.mails_to(email)
    assert len(code_in(mail)) == CODE_LENGTH
    for given, error in (("123456", 1004), (code_in(mail), 0), (code_in(mail), 1003)):
        assert json.loads(shell(check.replace("123456", given), examples)[1]) == {"email": email, "error": error}

"""GateServer's part, in C++: a client made by the system's protoc and gRPC, and the two lines it could take over."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from support.api_process import ApiProcess
from support.caller import address
from support.examples_run import BUILD_TIMEOUT, EXAMPLES, build, copied, fenced, lines_at_top, shell
from support.process import HOST
from support.redis_server import RedisServer
from support.rig import Rig, code_in

pytestmark = [pytest.mark.tools, pytest.mark.timeout(2 * BUILD_TIMEOUT)]

# What is around the two lines in GateServer's LogicSystem.cpp.
AROUND = """
#include <memory>
#include "check.h"
namespace beast = boost::beast;
struct Connection {{ beast::http::response<beast::http::dynamic_body> _response; }};
bool handle(std::shared_ptr<Connection> connection, Json::Value src_root) {{
    Json::Value root;
    {lines}
    return true;
}}
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Redis and sender come from the old server's configuration file; only its mail account is replaced."""
    config = tmp_path_factory.mktemp("config") / "config.json"
    with RedisServer(password="p4ss") as server, Rig(server=server) as rig:
        told = {"host": HOST, "port": server.port, "passwd": server.password}
        config.write_text(json.dumps({"email": {"user": "chat@example.com", "pass": "x"}, "redis": told}))
        del rig.settings["VERIFY_REDIS_URL"]
        rig.settings["VERIFY_CONFIG"] = str(config)
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def doors(rig: Rig) -> Iterator[ApiProcess]:
    with ApiProcess(rig.settings) as doors:
        yield doors


@pytest.fixture(scope="module")
def gateserver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built by the lines at its top."""
    directory = copied(tmp_path_factory.mktemp("gateserver")) / "gateserver"
    for command in lines_at_top(directory / "client.cpp")[:3]:
        build(f"{command} -Wall -Wextra -Werror" if command.startswith("g++") else command, directory)
    return directory


def run(gateserver: Path, doors: ApiProcess, email: str, code: str = "") -> tuple[int, str]:
    """The last two of these lines: ask, or check."""
    ask, check = lines_at_top(gateserver / "client.cpp")[3:]
    line = check.replace("8081", str(doors.http_port)) if code else ask.replace("50051", str(doors.grpc_port))
    exit_code, said, trouble = shell(line.replace("a@example.com", email).replace("123456", code), gateserver)
    assert trouble == ""
    return exit_code, said


def test_it_asks_and_reads_the_code_where_it_looks_for_it(rig: Rig, doors: ApiProcess, gateserver: Path) -> None:
    email = address()
    assert run(gateserver, doors, email) == (0, f"0 {email}\n")
    [mail] = rig.mails_to(email)
    with redis.Redis(HOST, rig.server.port, password=rig.server.password) as as_gateserver:  # AUTH, no SELECT
        assert as_gateserver.get(f"code_{email}") == code_in(mail).encode()
    assert run(gateserver, doors, "nonsense") == (1, "3 nonsense\n")


def test_check_h_counts_and_consumes(rig: Rig, doors: ApiProcess, gateserver: Path) -> None:
    email = address()
    assert run(gateserver, doors, email, "123456") == (1, "1003\n")
    run(gateserver, doors, email)
    [mail] = rig.mails_to(email)
    assert run(gateserver, doors, email, "wrong") == (1, "1004\n")
    assert run(gateserver, doors, email, code_in(mail)) == (0, "0\n")
    assert run(gateserver, doors, email, code_in(mail)) == (1, "1003\n")


def test_the_fifth_wrong_code_drops_the_code(rig: Rig, doors: ApiProcess, gateserver: Path) -> None:
    email = address()
    run(gateserver, doors, email)
    [mail] = rig.mails_to(email)
    assert {run(gateserver, doors, email, "wrong") for _ in range(5)} == {(1, "1004\n")}
    assert run(gateserver, doors, email, code_in(mail)) == (1, "1003\n")


def test_without_a_door_it_says_what_gateserver_says(gateserver: Path) -> None:
    assert shell("./client 127.0.0.1 1 a@example.com", gateserver)[:2] == (1, "1002 \n")
    assert shell("./client 127.0.0.1 1 a@example.com 123456", gateserver)[:2] == (1, "1002\n")


def test_a_door_that_says_nothing_holds_the_check_up_for_4_seconds(rig: Rig, gateserver: Path) -> None:
    with ApiProcess(rig.settings) as frozen:
        frozen.signal(signal.SIGSTOP)
        thaw = threading.Timer(8, frozen.signal, [signal.SIGCONT])
        thaw.start()
        try:
            assert run(gateserver, frozen, "a@example.com", "123456") == (1, "1002\n")
            assert thaw.is_alive()
        finally:
            thaw.cancel()
            frozen.signal(signal.SIGCONT)


def test_the_two_lines_compile_where_they_belong(gateserver: Path) -> None:
    [lines] = fenced(EXAMPLES / "gateserver/README.md", "cpp")
    assert len(lines.splitlines()) == 2
    (gateserver / "lines.cpp").write_text(AROUND.format(lines=lines))
    build("g++ -std=c++17 -fsyntax-only lines.cpp $(pkg-config --cflags jsoncpp)", gateserver)

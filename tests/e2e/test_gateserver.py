"""GateServer's side in C++: a client built with the system's protoc and gRPC, and the two lines that call `check`."""

from __future__ import annotations

import json
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

# What surrounds the two lines in GateServer's LogicSystem.cpp.
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
    """Redis and sender come from the Node server's configuration file; only its mail account is replaced."""
    config = tmp_path_factory.mktemp("config") / "config.json"
    with RedisServer(password="p4ss") as server, Rig(server=server) as rig:
        access = {"host": HOST, "port": server.port, "passwd": server.password}
        config.write_text(json.dumps({"email": {"user": "chat@example.com", "pass": "x"}, "redis": access}))
        del rig.settings["VERIFY_REDIS_URL"]
        rig.settings["VERIFY_CONFIG"] = str(config)
        rig.add_worker()
        yield rig


@pytest.fixture(scope="module")
def api(rig: Rig) -> Iterator[ApiProcess]:
    with ApiProcess(rig.settings) as api:
        yield api


@pytest.fixture(scope="module")
def gateserver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built with the lines at its top."""
    directory = copied(tmp_path_factory.mktemp("gateserver")) / "gateserver"
    for command in lines_at_top(directory / "client.cpp")[:3]:
        build(f"{command} -Wall -Wextra -Werror" if command.startswith("g++") else command, directory)
    return directory


def run(gateserver: Path, api: ApiProcess, email: str, code: str = "") -> tuple[int, str]:
    """Run the last two of these lines: ask, or check with a code."""
    ask, check = lines_at_top(gateserver / "client.cpp")[3:]
    line = check.replace("8081", str(api.http_port)) if code else ask.replace("50051", str(api.grpc_port))
    status, output, errors = shell(line.replace("a@example.com", email).replace("123456", code), gateserver)
    assert errors == ""
    return status, output


def test_it_asks_and_finds_the_code_where_gateserver_looks(rig: Rig, api: ApiProcess, gateserver: Path) -> None:
    email = address()
    assert run(gateserver, api, email) == (0, f"0 {email}\n")
    [mail] = rig.mails_to(email)
    with redis.Redis(HOST, rig.server.port, password=rig.server.password) as as_gateserver:  # AUTH, no SELECT
        assert as_gateserver.get(f"code_{email}") == code_in(mail).encode()
    assert run(gateserver, api, "nonsense") == (1, "3 nonsense\n")


def test_check_h_counts_and_consumes(rig: Rig, api: ApiProcess, gateserver: Path) -> None:
    email = address()
    assert run(gateserver, api, email, "123456") == (1, "1003\n")
    run(gateserver, api, email)
    [mail] = rig.mails_to(email)
    assert run(gateserver, api, email, "wrong") == (1, "1004\n")
    assert run(gateserver, api, email, code_in(mail)) == (0, "0\n")
    assert run(gateserver, api, email, code_in(mail)) == (1, "1003\n")


def test_the_fifth_wrong_code_drops_the_code(rig: Rig, api: ApiProcess, gateserver: Path) -> None:
    email = address()
    run(gateserver, api, email)
    [mail] = rig.mails_to(email)
    assert {run(gateserver, api, email, "wrong") for _ in range(5)} == {(1, "1004\n")}
    assert run(gateserver, api, email, code_in(mail)) == (1, "1003\n")


def test_without_an_api_it_says_1002_as_gateserver_does(gateserver: Path) -> None:
    assert shell("./client 127.0.0.1 1 a@example.com", gateserver)[:2] == (1, "1002 \n")
    assert shell("./client 127.0.0.1 1 a@example.com 123456", gateserver)[:2] == (1, "1002\n")


def test_the_check_gives_up_on_an_api_that_does_not_answer(rig: Rig, gateserver: Path) -> None:
    with ApiProcess(rig.settings) as frozen:
        frozen.pause()
        assert run(gateserver, frozen, "a@example.com", "123456") == (1, "1002\n")
        frozen.resume()


def test_the_two_lines_compile_where_they_belong(gateserver: Path) -> None:
    [lines] = fenced(EXAMPLES / "gateserver/README.md", "cpp")
    assert len(lines.splitlines()) == 2
    (gateserver / "lines.cpp").write_text(AROUND.format(lines=lines))
    build("g++ -std=c++17 -fsyntax-only lines.cpp $(pkg-config --cflags jsoncpp)", gateserver)

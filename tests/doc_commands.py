"""How each command in the pages is run by a test. One that is not here fails `tests/e2e/test_docs_commands.py`.

`Here`: on the stage, to its end. `Stays`: on the stage, until the block it stands in is through. `Long`: on a stage of
its own, made shorter, among the tests marked `slow`. `Elsewhere`: by a test that is named, for a reason that is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class Here:
    """Ends with `status` and prints what matches `says`, once what it `needs` runs."""

    says: str = ""
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()  # variables of the stage that would hide what is shown
    status: int = 0


@dataclass(frozen=True)
class Stays:
    """Plays a role on the stage: it is ready once it `says` this, and then what it `gives` is to be had."""

    role: str
    says: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Long:
    """Runs with `words` after it and `variables` beside it, which make it shorter, and prints what matches `says`."""

    says: str
    words: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """Another test (`file::name`) or script runs it."""

    test: str
    because: str


Way = Here | Stays | Long | Elsewhere

# Programs that pip does not install.
TOOLS: Final = re.compile(
    r"(?:^|[\s(])(?:curl|node|npm|java|go|php|g\+\+|redis-cli|docker|kubectl|\./ask)\s|bench\b|make lock"
)

ASKED: Final = ("worker", "doors")
CONTAINERS: Final = "tests/e2e/test_containers.py"
NO_ENGINE: Final = "no container engine runs with the tests; the services' commands run as compose has them"
SUCCESS: Final = r'"error": ?0\b'
WORKER: Final = Stays("worker", gives=("code",))
DOORS: Final = Stays("doors", r"gRPC door is open", needs=("worker",))
COLLECTED: Final = {"PYTEST_ADDOPTS": "--collect-only -q"}
CONFIG: Final = "VERIFY_CONFIG=path/to/config.json"
REDIS: Final = ("VERIFY_REDIS_URL",)

WAYS: Final[dict[str, Way]] = {
    # the checkout
    "make setup": Here(),
    "make help": Here(r"demo +one code from request to mailbox"),
    "make demo": Stays("demo", "Mails appear here", without=("VERIFY_",), ends=frozenset({0, 2, 143})),
    "make demo ONCE=1": Here(r"the code in the mail is the one in", without=("VERIFY_",)),
    "make test": Long(r"\d+ tests collected|\d+/\d+ tests collected", variables=COLLECTED),
    "make test-all": Long(r"\d+ tests collected|\d+/\d+ tests collected", variables=COLLECTED),
    "make faults": Long(r"\d+ tests collected", variables=COLLECTED),
    "make soak MINUTES=10": Long(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make soak MINUTES=16 SEED=7": Long(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make lock": Long(""),
    # a worker
    "export VERIFY_REDIS_URL=redis://127.0.0.1:6379": Here(),
    "export VERIFY_RELAYS=smtp+starttls://user:password@smtp.example.com:587": Here(),
    "export VERIFY_MAIL_FROM='Chat <no-reply@example.com>'": Here(),
    "export VERIFY_CONFIG=/path/to/config.json": Here(),
    ".venv/bin/celery -A worker.app worker": WORKER,
    ".venv/bin/python -m worker dead --help": Here("replay"),
    # containers
    "cp .env.example .env": Here(),
    "docker compose up --build --wait --scale worker=2": Elsewhere(
        f"{CONTAINERS}::test_a_code_goes_from_the_door_to_the_mailbox_and_is_checked", NO_ENGINE
    ),
    "docker compose exec worker python -m producer settings": Elsewhere(
        f"{CONTAINERS}::test_it_tells_what_is_in_force", NO_ENGINE
    ),
    # asking
    ".venv/bin/python -m producer send a@example.com": Here(r"Success \(0\)", ("worker",)),
    ".venv/bin/python -m producer check a@example.com 123456": Here(r"Success \(0\)", ("code",)),
    ".venv/bin/python -m producer settings": Here(r"VERIFY_QUEUE=verification"),
    ".venv/bin/python -m producer serve": DOORS,
    """curl -d '{"email": "a@example.com"}' http://127.0.0.1:8081/get_varifycode""": Here(SUCCESS, ASKED),
    """curl http://127.0.0.1:8081/get_varifycode -d '{"email": "a@example.com"}'""": Here(SUCCESS, ASKED),
    """curl http://127.0.0.1:8081/check_varifycode -d '{"email": "a@example.com", "varifycode": "123456"}'""": Here(
        SUCCESS, ("doors", "code")
    ),
    """curl -sS -m 10 http://127.0.0.1:8081/get_varifycode -d '{"email": "a@example.com"}'""": Here(SUCCESS, ASKED),
    """curl -sS -m 10 http://127.0.0.1:8081/check_varifycode """
    """-d '{"email": "a@example.com", "varifycode": "123456"}'""": Here(SUCCESS, ("doors", "code")),
    # asking in each language
    """curl -sS -m 10 http://127.0.0.1:8081/get_varifycode -d '{"email": "a@example.com", "locale": "en"}'""": Here(
        SUCCESS, ASKED
    ),
    "sh examples/ask.sh a@example.com": Here(SUCCESS, ASKED),
    "node examples/ask_http.mjs a@example.com": Here(SUCCESS, ASKED),
    "java examples/Ask.java a@example.com": Here(SUCCESS, ASKED),
    "go run examples/ask.go a@example.com": Here(SUCCESS, ASKED),
    "php examples/ask.php a@example.com": Here(SUCCESS, ASKED),
    ".venv/bin/python examples/ask_grpc.py a@example.com": Here(SUCCESS, ASKED),
    "cd examples && npm install --no-save @grpc/grpc-js @grpc/proto-loader": Here(),
    ".venv/bin/python -m hatchling build -t wheel": Here(r"verifyserver-\S+\.whl"),
    "PYTHONPATH=. .venv/bin/python examples/ask_client.py a@example.com": Here(SUCCESS, ("worker",)),
    "PYTHONPATH=. .venv/bin/python examples/ask_asyncio.py a@example.com b@example.com": Here(SUCCESS, ("worker",)),
    ".venv/bin/python examples/ask_celery.py a@example.com": Here(SUCCESS, ("worker",)),
    ".venv/bin/python examples/ask.py a@example.com": Here(SUCCESS, ("worker",)),
    "node examples/ask.mjs a@example.com": Here(SUCCESS, ("worker",)),
    "cd examples && g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp)": Here(),
    "./ask a@example.com": Here(r'"error" : 0', ("worker",)),
    # watching
    ".venv/bin/celery -A worker.app flower": Stays("flower", r"Visit me at http://127\.0\.0\.1:\d+", needs=("worker",)),
    "curl http://127.0.0.1:9464/metrics": Here(r"(?m)^verify_worker_replies_total", ("worker",)),
    # the old server's configuration
    f"{CONFIG} .venv/bin/python -m producer settings": Here(r"VERIFY_MAIL_FROM=chat@example\.com", without=REDIS),
    f"{CONFIG} .venv/bin/celery -A worker.app worker": Stays("worker", gives=("code",), without=REDIS),
    f"{CONFIG} .venv/bin/python -m producer serve": Stays("doors", "gRPC door is open", without=REDIS),
    # the examples
    "sh ask.sh a@example.com": Here(SUCCESS, ASKED),
    "node ask_http.mjs a@example.com": Here(SUCCESS, ASKED),
    "java Ask.java a@example.com": Here(SUCCESS, ASKED),
    "go run ask.go a@example.com": Here(SUCCESS, ASKED),
    "php ask.php a@example.com": Here(SUCCESS, ASKED),
    "python ask_grpc.py a@example.com": Here(SUCCESS, ASKED),
    "npm install --no-save @grpc/grpc-js @grpc/proto-loader": Here(),
    "node ask_grpc.mjs a@example.com": Here(SUCCESS, ASKED),
    "PYTHONPATH=.. python ask_client.py a@example.com": Here(SUCCESS, ("worker",)),
    "PYTHONPATH=.. python ask_asyncio.py a@example.com b@example.com": Here(SUCCESS, ("worker",)),
    "python ask_celery.py a@example.com": Here(SUCCESS, ("worker",)),
    "python ask.py a@example.com": Here(SUCCESS, ("worker",)),
    "node ask.mjs a@example.com": Here(SUCCESS, ("worker",)),
    "g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp) && ./ask a@example.com": Here(
        r'"error" : 0', ("worker",)
    ),
    # measuring
    "make bench": Long(r"import of producer\.client", "QUICK=1 BARS=k"),
    "make bench QUICK=1": Long(r"import of producer\.client", "BARS=k"),
    'make bench BARS="a c f"': Long(r"one worker process", "QUICK=1 BARS=f"),
    "make bench BARS=g": Long(r"32 connections", "QUICK=1"),
    "python -m bench.capacity": Long(r"(?m)^ *20 +32 +1 ", "--runs 1 --latency 20 --count 300"),
    "python -m bench.footprint": Long("answered", "--count 1000"),
    "python -m bench.report RAW": Long(r"report\.md"),
    "uv pip compile bench/report/requirements.in --universal --python-version 3.11 --generate-hashes --no-header "
    "-o bench/report/requirements.txt": Long("matplotlib"),
    "PYTHONPATH=tests .venv/bin/python -m faults.compare": Long("SIGTERM under load", "--only SIGTERM"),
}

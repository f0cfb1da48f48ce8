"""How each command of the docs is run by a test. One that is missing here fails `tests/e2e/test_docs_commands.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class Run:
    """Run it as soon as everything in `needs` exists: it exits 0 and prints what matches `prints`."""

    prints: str = ""
    needs: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()  # beginnings of variables that would hide what is shown


@dataclass(frozen=True)
class Serve:
    """Run it until its block is done, in this `role`: ready once it has printed `prints` and the `url` answers."""

    role: str
    prints: str = ""
    url: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()  # what must be there afterwards
    unset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slow:
    """Run it among the tests marked `slow`, with `words` after it and `variables` that leave it less to do."""

    prints: str
    words: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TestedBy:
    """Another test (`file::name`) covers it: it runs elsewhere, or needs an engine or a cluster that tests lack."""

    test: str
    __test__ = False  # not a test itself


Way = Run | Serve | Slow | TestedBy

# Commands that need programs which pip does not install.
TOOLS: Final = re.compile(
    r"(?:^|[\s(])(?:curl|node|npm|java|go|php|g\+\+|redis-cli|docker|kubectl|\./ask)\s|bench\b|make lock"
)

# Commands that start what other tests start, too. Their blocks run among the tests marked `slow`.
REPEATED: Final = re.compile(
    r"examples/ask|app flower$|inspect ping$|hatchling|^VERIFY_CONFIG=\S+ \S+/(celery|python) .*(worker|serve)$"
    r"|^\.venv/bin/celery -A worker\.app worker$"
)

ASKED: Final = ("worker", "api")
SUCCESS: Final = r'"error"\s*: ?0\b'
COLLECTED: Final = {"PYTEST_ADDOPTS": "--collect-only -q"}
REDIS: Final = ("VERIFY_REDIS_URL",)
CONFIG: Final = "VERIFY_CONFIG=path/to/config.json"
API: Final = "curl -s http://127.0.0.1:8081"
CODES: Final = "redis-cli -u redis://127.0.0.1:6379/0"
METRICS: Final = "curl -s http://127.0.0.1:9464/metrics | grep"
ASK: Final = """-d '{"email": "a@example.com"}'"""
CHECK: Final = """-d '{"email": "a@example.com", "varifycode": "123456"}'"""
NAMES: Final = "tests/unit/test_far_commands.py"
MANIFESTS: Final = "tests/unit/test_kubernetes.py"
PODS: Final = "tests/e2e/test_pods.py"
TLS: Final = "tests/integration/test_api_tls.py"
WORKER_USER: Final = (
    "VERIFY_REDIS_URL=redis://worker@127.0.0.1:6379 VERIFY_REDIS_PASSWORD_FILE=redis-users/worker.password"
)
USERS: Final = "tests/integration/test_redis_users.py"
TLS_API: Final = "https://verify.example.com:8081"
ENGINE: Final = "tests/unit/test_compose_file.py::test_what_make_containers_imitates_is_what_compose_names"
IMAGE: Final = "tests/e2e/test_containers.py::test_the_image_has_no_development_packages"

# For commands with this beginning that WAYS does not list.
BEGINNINGS: Final = {
    "docker compose ": TestedBy(f"{NAMES}::test_a_compose_command_names_what_is_there"),
    "kubectl ": TestedBy(f"{NAMES}::test_a_kubectl_command_names_what_is_there"),
}

WAYS: Final[dict[str, Way]] = {
    # the checkout
    "make setup": Run(),
    "make help": Run(r"make demo +send one code"),
    "make docs": Run(),
    "make lint": TestedBy("tests/e2e/test_docs_commands.py::test_make_knows_its_targets"),
    "make demo": TestedBy("tests/e2e/test_demo.py::test_it_stays_up_until_ctrl_c_and_what_it_suggests_works"),
    "make demo ONCE=1": TestedBy("tests/e2e/test_demo.py::test_once_shows_every_step"),
    "make test": Slow(r"tests collected", variables=COLLECTED),
    "make test-all": Slow(r"tests collected", variables=COLLECTED),
    "make faults": Slow(r"tests collected", variables=COLLECTED),
    "make soak MINUTES=10": Slow(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make soak MINUTES=60 SEED=20261130": Slow(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make upgrade OLD=v0.1.0": TestedBy(
        "tests/faults/test_upgrade.py::test_two_releases_of_one_form_keep_every_promise"
    ),
    "make crash-map": Slow(r" 0 broken promises", "ONLY='--servers one --actors client --scenarios alone'"),
    ".venv/bin/python -m bench.crash_map run"
    " --servers one --actors worker --scenarios alone --steps content --faults frozen": Slow(r" 0 broken promises"),
    "make picture": Slow(r"Lost: 0\. Violations: 0\.", "SECONDS=50"),
    "make lock": Slow(""),
    **{
        f"python -m worker erase{words}": TestedBy(
            "tests/integration/test_erase.py::test_everything_about_an_address_goes_and_nothing_else"
        )
        for words in ("", " ADDRESS")
    },
    "make containers": TestedBy(ENGINE),
    "make containers FOLDER=…": TestedBy(ENGINE),
    "make audit": TestedBy(
        "tests/e2e/test_packages_audited.py::test_make_audit_lists_and_audits_what_runs_in_production"
    ),
    # a worker and the API
    "export VERIFY_REDIS_URL=redis://127.0.0.1:6379": Run(),
    "export VERIFY_RELAYS=smtp+starttls://user:password@smtp.example.com:587": Run(),
    "export VERIFY_MAIL_FROM='Chat <no-reply@example.com>'": Run(),
    "export VERIFY_CONFIG=/path/to/config.json": Run(),
    "export VERIFY_CODE_LENGTH=10": Run(),
    "export VERIFY_REDIS_URL=redis+sentinel://:password@host1:26379,host2:26379,host3:26379/verify": Run(),
    "export VERIFY_REDIS_URL=rediss://:password@redis.example.com:6380": Run(),
    ".venv/bin/celery -A worker.app worker": Serve("worker", gives=("code",)),
    ".venv/bin/celery -A worker.app worker -l INFO": Serve("worker", r" ready\.", gives=("code",)),
    "VERIFY_METRICS_BIND=127.0.0.1:9465 .venv/bin/celery -A worker.app worker -l INFO -n second@%h": Serve(
        "second worker", r" ready\.", gives=("code",)
    ),
    ".venv/bin/python -m producer serve": Serve("api", r"gRPC API listens on", needs=("worker",)),
    f"{CONFIG} .venv/bin/python -m producer settings": Run(r"VERIFY_MAIL_FROM=chat@example\.com", unset=REDIS),
    f"{CONFIG} .venv/bin/celery -A worker.app worker": Serve("worker", gives=("code",), unset=REDIS),
    f"{CONFIG} .venv/bin/python -m producer serve": Serve("api", r"gRPC API listens on", unset=REDIS),
    "cp .env.example .env": Run(),
    ".venv/bin/python -m hatchling build -t wheel": Run(r"verifyserver-\S+\.whl"),
    # containers and a cluster
    "docker build -t verifyserver:0.1.0 .": TestedBy(IMAGE),
    "docker compose build": TestedBy(IMAGE),
    "docker compose exec redis redis-cli CONFIG SET maxmemory 700mb": TestedBy(
        "tests/e2e/test_containers.py::test_redis_takes_more_memory_at_run_time"
    ),
    "kind load docker-image verifyserver:0.1.0": TestedBy(
        f"{MANIFESTS}::test_commands_images_and_limits_are_those_of_compose"
    ),
    "sh deploy/kubernetes/overlays/try/secret.sh | kubectl create -n verifyserver -f -": TestedBy(
        f"{MANIFESTS}::test_the_secret_fits_its_schema"
    ),
    """get() { kubectl -n verifyserver get secret verifyserver -o "jsonpath={.data.$1}" | base64 -d; }""": TestedBy(
        f"{NAMES}::test_a_secret_is_created_from_a_folder_and_read_again"
    ),
    f"""curl -H "Authorization: Bearer $(get metrics-key)" {ASK} http://127.0.0.1:8081/get_varifycode""": TestedBy(
        f"{PODS}::test_a_code_is_requested_mailed_and_checked"
    ),
    "sh deploy/redis-users.sh redis-users": TestedBy(
        f"{USERS}::test_passwords_are_random_and_only_their_owner_reads_them"
    ),
    f"{WORKER_USER} .venv/bin/celery -A worker.app worker": TestedBy(
        f"{USERS}::test_a_code_is_sent_and_checked_over_the_api"
    ),
    # asking
    f"""curl -sS -m 10 --cacert ca.pem -H "Authorization: Bearer $KEY" {TLS_API}/get_varifycode {ASK}""": TestedBy(
        f"{TLS}::test_with_keys_and_tls_both_serve_beyond_loopback_and_take_a_renewed_certificate"
    ),
    f"curl http://127.0.0.1:8081/get_varifycode {ASK}": Run(SUCCESS, ASKED),
    f"curl http://127.0.0.1:8081/check_varifycode {CHECK}": Run(SUCCESS, ("api", "code")),
    """curl -sS -m 10 http://127.0.0.1:8081/get_varifycode -d '{"email": "a@example.com", "locale": "en"}'""": Run(
        SUCCESS, ASKED
    ),
    f"curl -sS -m 10 http://127.0.0.1:8081/check_varifycode {CHECK}": Run(SUCCESS, ("api", "code")),
    ".venv/bin/python -m producer settings": Run(r"VERIFY_QUEUE=verification"),
    **{
        f"{program}{directory}{file} a@example.com": Run(SUCCESS, needs)
        for program, file, needs in (
            ("sh ", "ask.sh", ASKED),
            ("node ", "ask_http.mjs", ASKED),
            ("java ", "Ask.java", ASKED),
            ("go run ", "ask.go", ASKED),
            ("php ", "ask.php", ASKED),
        )
        for directory in ("examples/", "")
    },
    ".venv/bin/python examples/ask_grpc.py a@example.com": Run(SUCCESS, ASKED),
    "cd examples && npm install --no-save @grpc/grpc-js @grpc/proto-loader": Run(),
    "PYTHONPATH=. .venv/bin/python examples/ask_client.py a@example.com": Run(SUCCESS, ("worker",)),
    "PYTHONPATH=. .venv/bin/python examples/ask_asyncio.py a@example.com b@example.com": Run(SUCCESS, ("worker",)),
    ".venv/bin/python examples/ask_celery.py a@example.com": Run(SUCCESS, ("worker",)),
    ".venv/bin/python examples/ask.py a@example.com": Run(SUCCESS, ("worker",)),
    "node examples/ask.mjs a@example.com": Run(SUCCESS, ("worker",)),
    "cd examples && g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp)": Run(),
    "./ask a@example.com": Run(SUCCESS, ("worker",)),
    "python ask_grpc.py a@example.com": Run(SUCCESS, ASKED),
    "npm install --no-save @grpc/grpc-js @grpc/proto-loader": Run(),
    "node ask_grpc.mjs a@example.com": Run(SUCCESS, ASKED),
    "PYTHONPATH=.. python ask_client.py a@example.com": Run(SUCCESS, ("worker",)),
    "PYTHONPATH=.. python ask_asyncio.py a@example.com b@example.com": Run(SUCCESS, ("worker",)),
    "python ask_celery.py a@example.com": Run(SUCCESS, ("worker",)),
    "python ask.py a@example.com": Run(SUCCESS, ("worker",)),
    "node ask.mjs a@example.com": Run(SUCCESS, ("worker",)),
    "g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp) && ./ask a@example.com": Run(
        SUCCESS, ("worker",)
    ),
    # operations
    "systemctl start verify-api@8083 && systemctl stop verify-api@8082": TestedBy(
        "tests/integration/test_shared_port.py::test_the_unit_starts_what_the_docs_say"
    ),
    # Flower says that it is ready before its loop runs; a SIGTERM between the two can leave it hanging.
    ".venv/bin/celery -A worker.app flower": Serve(
        "flower", r"Visit me at http://127\.0\.0\.1:\d+", "http://127.0.0.1:5555/healthcheck", needs=("worker",)
    ),
    "OTEL_TRACES_EXPORTER=otlp": TestedBy(
        "tests/integration/test_traces_exported.py::test_one_trace_goes_through_both_processes"
    ),
    f"{CODES} GET suppressed:a@example.com": Run(),
    f"{CODES} DEL suppressed:a@example.com": Run(r"\d"),
    f"{CODES} --scan --pattern 'suppressed:*' | xargs -r -d '\\n' {CODES} DEL": Run(),
    f"{API}/readyz": Run(r'"ready": ?true', ASKED),
    f"{API}/metrics | grep '^verify_api_requests_total'": Run(r'error="0"', ("asked",)),
    f"{METRICS} -E '^verify_(workers|broker_up|queue_|dead_letters|worker_relay_unhealthy)'": Run(
        r"verify_workers 1\.0", ("worker",)
    ),
    f"{METRICS} -E '^verify_worker_(relay_unhealthy|sends_total|replies_total)'": Run(
        r'outcome="accepted"(?s:.*)|error="0"', ("code",)
    ),
    f"{METRICS} -E '^verify_(queue_suspect_requests|worker_redeliveries_total)'": Run(
        r"worker_redeliveries_total 0(?s:.*)queue_suspect_requests 0", ("worker",)
    ),
    f"{METRICS} -E '^verify_(queue_requests|queue_delayed_requests|worker_requests_held)'": Run(
        r"queue_requests 0(?s:.*)queue_delayed_requests 0", ("worker",)
    ),
    ".venv/bin/python -m producer settings | grep -E 'REDIS|BROKER|CODES|RESULTS'": Run(r"VERIFY_BROKER_URL=redis://"),
    ".venv/bin/celery -A worker.app inspect ping": Run(r"pong\s+1 node online", ("worker",)),
    ".venv/bin/python -m worker dead list": Run(),
    # measuring
    "make bench": Slow(r"import of producer\.client", "QUICK=1 BARS=k"),
    "make bench QUICK=1": Slow(r"import of producer\.client", "BARS=k"),
    'make bench BARS="l m n"': Slow(r"1 caller ", "QUICK=1 BARS=n"),
    "make bench BARS=g": Slow(r"32 connections", "QUICK=1"),
    ".venv/bin/python -m bench.restart": TestedBy(
        "tests/integration/test_shared_port.py::test_under_load_no_request_is_refused"
    ),
    ".venv/bin/python -m bench.capacity": Slow(r"(?m)^ *20 +32 +1 ", "--runs 1 --latency 20 --count 300"),
    ".venv/bin/python -m bench.footprint": Slow("answered", "--count 1000"),
    "python -m bench.report RAW": Slow(r"report\.md"),
    "uv pip compile bench/report/requirements.in --universal --python-version 3.11 --generate-hashes --no-header "
    "-o bench/report/requirements.txt": Slow("matplotlib"),
    ".venv/bin/python -m bench.fuzz http --seconds 300 --seed 1": Slow(r"inputs in .* 0 findings", "--count 500"),
    ".venv/bin/python -m bench.soak compare": Slow("SIGTERM under load", "--only SIGTERM"),
    ".venv/bin/python -m bench.soak failover killed --runs 10": Slow(r"'lost': 0", "--runs 1"),
}


def way(command: str) -> Way | None:
    """How the command is run."""
    return WAYS.get(command) or next((way for start, way in BEGINNINGS.items() if command.startswith(start)), None)

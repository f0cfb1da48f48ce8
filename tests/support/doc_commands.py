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
    """Plays a role on the stage: ready once it `says` this and `answers` here; then what it `gives` is to be had."""

    role: str
    says: str = ""
    answers: str = ""  # a URL
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
COMPOSE: Final = "tests/unit/test_compose_file.py"
NO_ENGINE: Final = "no container engine runs with the tests; the services' commands run as compose has them"
NO_CLUSTER: Final = "no cluster runs with the tests; what the command leads to is read, or run as the manifests have it"
NAMED: Final = "tests/unit/test_far_commands.py"
MANIFESTS: Final = "tests/unit/test_kubernetes.py"
PODS: Final = "tests/e2e/test_pods.py"
DEMO: Final = "tests/e2e/test_demo.py"
SUCCESS: Final = r'"error": ?0\b'
WORKER: Final = Stays("worker", gives=("code",))
DOORS: Final = Stays("doors", r"gRPC door is open", needs=("worker",))
COLLECTED: Final = {"PYTEST_ADDOPTS": "--collect-only -q"}
CONFIG: Final = "VERIFY_CONFIG=path/to/config.json"
REDIS: Final = ("VERIFY_REDIS_URL",)
DOOR: Final = "curl -s http://127.0.0.1:8081"
METRICS: Final = "curl -s http://127.0.0.1:9464/metrics | grep"

WAYS: Final[dict[str, Way]] = {
    # the checkout
    "make setup": Here(),
    "make help": Here(r"demo +one code from request to mailbox"),
    "make demo": Elsewhere(f"{DEMO}::test_it_stays_up_until_told_to_end", "it takes seconds, and is run there anyway"),
    "make demo ONCE=1": Elsewhere(f"{DEMO}::test_once_shows_every_step", "it takes seconds, and is run there anyway"),
    "make test": Long(r"\d+ tests collected|\d+/\d+ tests collected", variables=COLLECTED),
    "make test-all": Long(r"\d+ tests collected|\d+/\d+ tests collected", variables=COLLECTED),
    "make faults": Long(r"\d+ tests collected", variables=COLLECTED),
    "make soak MINUTES=10": Long(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make soak MINUTES=16 SEED=7": Long(r"Lost: 0\. Violations: 0\.", "MINUTES=0.3"),
    "make picture": Long(r"Lost: 0\. Violations: 0\.", "SECONDS=50"),
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
    "docker compose --profile observe up --build --wait": Elsewhere(
        "tests/integration/test_prometheus.py::test_the_containers_command_starts_it", NO_ENGINE
    ),
    "docker compose ps worker": Elsewhere(f"{NAMED}::test_what_is_told_to_compose_is_there", NO_ENGINE),
    "docker compose logs worker": Elsewhere(f"{NAMED}::test_what_is_told_to_compose_is_there", NO_ENGINE),
    "docker compose logs --since 10m worker": Elsewhere(f"{NAMED}::test_what_is_told_to_compose_is_there", NO_ENGINE),
    "docker compose stop worker": Elsewhere(
        f"{CONTAINERS}::test_a_check_fails_once_its_service_is_gone_and_each_ends_in_its_time", NO_ENGINE
    ),
    "docker compose up --wait --no-recreate --scale worker=3": Elsewhere(
        f"{COMPOSE}::test_a_worker_can_be_there_many_times", NO_ENGINE
    ),
    "docker compose exec redis redis-cli CONFIG SET maxmemory 700mb": Elsewhere(
        f"{CONTAINERS}::test_redis_is_given_more_memory_while_it_runs", NO_ENGINE
    ),
    "docker compose up --wait --force-recreate --no-deps --scale worker=2 worker": Elsewhere(
        f"{CONTAINERS}::test_a_check_fails_once_its_service_is_gone_and_each_ends_in_its_time", NO_ENGINE
    ),
    "docker compose build": Elsewhere(f"{CONTAINERS}::test_nothing_that_only_developers_need_is_there", NO_ENGINE),
    "docker compose up --wait --no-deps --scale worker=2 worker": Elsewhere(
        f"{COMPOSE}::test_a_worker_can_be_there_many_times", NO_ENGINE
    ),
    "docker compose up --wait --no-deps api": Elsewhere(
        f"{CONTAINERS}::test_a_code_goes_from_the_door_to_the_mailbox_and_is_checked", NO_ENGINE
    ),
    # a cluster
    "docker build -t verifyserver:0.1.0 .": Elsewhere(
        f"{CONTAINERS}::test_nothing_that_only_developers_need_is_there", NO_ENGINE
    ),
    "kind load docker-image verifyserver:0.1.0": Elsewhere(f"{MANIFESTS}::test_they_run_what_compose_runs", NO_CLUSTER),
    "kubectl create namespace verifyserver": Elsewhere(f"{NAMED}::test_a_namespace_is_made", NO_CLUSTER),
    "sh deploy/kubernetes/overlays/try/secret.sh | kubectl create -n verifyserver -f -": Elsewhere(
        f"{MANIFESTS}::test_the_secret_fits_its_schema", NO_CLUSTER
    ),
    "kubectl apply -k deploy/kubernetes/overlays/try": Elsewhere(
        f"{MANIFESTS}::test_each_object_fits_its_schema", NO_CLUSTER
    ),
    "kubectl -n verifyserver rollout status deployment/workers deployment/api": Elsewhere(
        f"{PODS}::test_every_probe_passes", NO_CLUSTER
    ),
    "kubectl -n verifyserver port-forward svc/api 8081 50051": Elsewhere(
        f"{NAMED}::test_what_is_told_to_kubectl_is_there", NO_CLUSTER
    ),
    "kubectl -n verifyserver port-forward svc/mailpit 8025": Elsewhere(
        f"{NAMED}::test_what_is_told_to_kubectl_is_there", NO_CLUSTER
    ),
    "kubectl -n verifyserver port-forward svc/flower 5555": Elsewhere(
        f"{PODS}::test_flower_asks_for_the_secrets_password", NO_CLUSTER
    ),
    """get() { kubectl -n verifyserver get secret verifyserver -o "jsonpath={.data.$1}" | base64 -d; }""": Elsewhere(
        f"{NAMED}::test_a_secret_is_made_of_a_folder_and_read_again", NO_CLUSTER
    ),
    """curl -H "Authorization: Bearer $(get metrics-key)" -d '{"email": "a@example.com"}' """
    "http://127.0.0.1:8081/get_varifycode": Elsewhere(
        f"{PODS}::test_a_code_goes_from_the_door_to_the_mailbox_and_is_checked", NO_CLUSTER
    ),
    "kubectl -n verifyserver create secret generic verifyserver --from-file=secrets/": Elsewhere(
        f"{NAMED}::test_a_secret_is_made_of_a_folder_and_read_again", NO_CLUSTER
    ),
    "kubectl -n verifyserver rollout restart deployment/workers deployment/api": Elsewhere(
        f"{NAMED}::test_what_is_told_to_kubectl_is_there", NO_CLUSTER
    ),
    "kubectl delete namespace verifyserver": Elsewhere(f"{NAMED}::test_all_goes_with_the_namespace", NO_CLUSTER),
    # sentinels
    "export VERIFY_REDIS_URL=redis+sentinel://:password@host1:26379,host2:26379,host3:26379/verify": Here(),
    "PYTHONPATH=.:tests .venv/bin/python -m bench.soak.failover killed --runs 10": Long(r"'lost': 0", "--runs 1"),
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
    # It says so before its loop runs, and a SIGTERM between the two can leave it hanging.
    ".venv/bin/celery -A worker.app flower": Stays(
        "flower", r"Visit me at http://127\.0\.0\.1:\d+", "http://127.0.0.1:5555/healthcheck", needs=("worker",)
    ),
    "curl http://127.0.0.1:9464/metrics": Here(r"(?m)^verify_worker_replies_total", ("worker",)),
    "OTEL_TRACES_EXPORTER=otlp": Elsewhere(
        "tests/integration/test_traces_exported.py::test_one_trace_goes_through_both_processes",
        "by itself the line does nothing; what it turns on needs a collector",
    ),
    f"{DOOR}/readyz": Here(r'"ready": ?true', ASKED),
    f"{DOOR}/healthz": Here("ok", ("doors",)),
    f"{DOOR}/metrics | grep '^verify_api_requests_total'": Here(r'error="0"', ("asked",)),
    f"{METRICS} -E '^verify_(workers|broker_up|queue_|dead_letters|worker_relay_sick)'": Here(
        r"verify_workers 1\.0", ("worker",)
    ),
    f"{METRICS} -E '^verify_worker_(relay_sick|sends_total)'": Here(r'outcome="accepted"', ("code",)),
    f"{METRICS} -E '^verify_(queue_suspect_requests|worker_redeliveries_total)'": Here(
        r"worker_redeliveries_total 0(?s:.*)queue_suspect_requests 0", ("worker",)
    ),
    f"{METRICS} '^verify_worker_replies_total'": Here(r'error="0"', ("code",)),
    f"{METRICS} -E '^verify_(queue_requests|queue_delayed_requests|worker_requests_held)'": Here(
        r"queue_requests 0(?s:.*)queue_delayed_requests 0", ("worker",)
    ),
    ".venv/bin/python -m producer settings | grep -E 'REDIS|BROKER|CODES|RESULTS'": Here(r"VERIFY_BROKER_URL=redis://"),
    ".venv/bin/celery -A worker.app inspect ping": Here(r"pong\s+1 node online", ("worker",)),
    ".venv/bin/python -m worker dead list": Here(),
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
    "python -m bench.capacity --latency 0": Long(r"(?m)^ *0 +32 +1 ", "--runs 1 --count 2000"),
    "python -m bench.footprint": Long("answered", "--count 1000"),
    "python -m bench.report RAW": Long(r"report\.md"),
    "uv pip compile bench/report/requirements.in --universal --python-version 3.11 --generate-hashes --no-header "
    "-o bench/report/requirements.txt": Long("matplotlib"),
    "PYTHONPATH=.:tests .venv/bin/python -m bench.soak.compare": Long("SIGTERM under load", "--only SIGTERM"),
}

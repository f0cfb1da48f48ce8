"""The house keeps its shape: which rooms may import which, and which change touches which files. Imports are read, not
run."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
OURS: Final = ("producer", "worker", "demo")
LONGEST_TEST_NAME: Final = 80

# What a caller installs who only asks for codes, by import name; see [project].dependencies.
BASE: Final = {"redis", "hiredis", "pydantic", "pydantic_settings", "dotenv", "email_validator", "structlog"}
COMMAND_LINE: Final = {"typer", "rich", "click"}  # the extra `cli`
API: Final = {  # the extra `api`
    *("fastapi", "fastapi_offline", "starlette", "uvicorn", "httptools", "uvloop", "prometheus_client"),
    *("grpc", "grpc_health", "grpc_reflection", "google", "hpack"),
}
CELERY: Final = {"celery", "kombu", "billiard", "vine"}
KNOW_CELERY: Final = ("worker.app", "worker.tasks", "worker.celery_side")
# Loaded only where something is traced.
KNOW_OPENTELEMETRY: Final = {"producer.tracing.spans", "producer.tracing.export"}
# They build commands and read answers; the caller does the I/O.
PURE: Final = {
    *("producer.contract", "producer.redis.scripts"),
    *("producer.store.codes", "producer.store.redis_codes", "producer.store.backlog"),
    *("worker.queue.commands", "worker.mail.render", "worker.mail.responses", "worker.job"),
}
DOES_IO: Final = {"asyncio", "hiredis", "redis", "socket", "ssl", "subprocess", "threading", "urllib.request"}
# The parts of the producer that only its callers and its API need.
NOT_FOR_WORKERS: Final = {f"producer.{name}" for name in ("core", "client", "aio", "cli", "api")}
# The use case speaks to ports: a code store and a mail channel.
NOT_FOR_THE_SERVICE: Final = {
    *("producer.redis", "producer.store.redis_codes", "worker.databases", "worker.queue.commands"),
    *(f"worker.mail.{name}" for name in ("smtp", "pool", "handshake", "responses", "failover")),
}
# Where numbers of error codes may stand: the table, and the demo page's words for them in each language.
ERROR_TABLE: Final = {Path("producer/contract.py"), Path("producer/api/demo/page")}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: Final = {name_of(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported at or below `node`, as dotted names; imports for the type checker only are left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for statement in node.orelse:
            yield from imported(statement)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def imported_at_the_top(path: Path) -> Iterator[str]:
    """What is imported when the module is."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If):
            yield from imported(node)


@cache
def imports(module: str) -> set[str]:
    """What one of our modules imports, anywhere in it."""
    return set(imported(ast.parse(MODULES[module].read_bytes())))


def tops(module: str) -> set[str]:
    """The top-level packages that `module` imports."""
    return {name.partition(".")[0] for name in imports(module)}


def below(*packages: str) -> list[str]:
    """The modules of these packages."""
    return [name for name in MODULES if is_in(name, packages)]


def is_in(name: str, packages: Collection[str]) -> bool:
    """Whether a dotted name is one of `packages` or below one."""
    return any(name == each or name.startswith(f"{each}.") for each in packages)


def test_the_modules_are_found() -> None:
    assert {"producer.contract", "worker.service", "worker.mail.render", "demo.__main__"} <= MODULES.keys()


@pytest.mark.parametrize("module", below("producer"))
def test_the_producer_imports_only_what_its_callers_install(module: str) -> None:
    allowed = BASE | {"producer"} | set(sys.stdlib_module_names)
    if module in {"producer.cli", "producer.__main__"}:
        allowed |= COMMAND_LINE
    if module == "producer.metrics":
        allowed |= {"prometheus_client"}
    if is_in(module, ("producer.api",)):
        allowed |= API
    if module in KNOW_OPENTELEMETRY:
        allowed |= {"opentelemetry"}
    assert tops(module) <= allowed


@pytest.mark.parametrize("module", below("worker"))
def test_the_worker_leans_only_on_the_producers_ground_floor(module: str) -> None:
    assert not {name for name in imports(module) if is_in(name, NOT_FOR_WORKERS)}
    assert not tops(module) & {"demo", "bench", "tests", *({"celeryconfig"} if module != "worker.app" else ())}


def test_the_contract_imports_only_the_standard_library() -> None:
    assert tops("producer.contract") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", sorted(name for name in below("worker") if not is_in(name, KNOW_CELERY)))
def test_only_celerys_side_knows_celery(module: str) -> None:
    assert not tops(module) & CELERY


def test_the_service_knows_neither_redis_nor_smtp() -> None:
    assert not {name for name in imports("worker.service") if is_in(name, NOT_FOR_THE_SERVICE)}
    assert not tops("worker.service") & {"redis", "hiredis", "smtplib", "ssl", "socket"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - KNOW_OPENTELEMETRY))
def test_opentelemetry_is_loaded_only_when_something_is_traced(module: str) -> None:
    assert "opentelemetry" not in tops(module)
    assert not {name for name in imported_at_the_top(MODULES[module]) if is_in(name, KNOW_OPENTELEMETRY)}


@pytest.mark.parametrize("module", sorted(PURE))
def test_a_pure_module_does_no_io(module: str) -> None:
    assert not imports(module) & DOES_IO
    assert not tops(module) & DOES_IO
    tree = ast.parse(MODULES[module].read_bytes())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Await)]


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {name: {used for used in imports(name) if used in MODULES and used != name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def test_an_error_code_is_one_row_of_one_table() -> None:
    number = re.compile(r"\b100[134]\b|\b(ErrorCode|answer)\(\d|\b(error|result)[\"']?\]? *(?:==|~=|!=) *[\"']?\d")
    product = [path for package in ("producer", "worker") for path in (ROOT / package).rglob("*.*")]
    sources = [path for path in product if path.suffix in {".py", ".lua", ".js", ".html"}]
    for path in sources:
        place = path.relative_to(ROOT)
        if not {place, *place.parents} & ERROR_TABLE:
            found = [line.strip() for line in path.read_text("utf-8").splitlines() if number.search(line)]
            assert found == [], f"{place} writes a code's number; take it from ErrorCode"


def test_no_name_of_a_test_is_too_long() -> None:
    names = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    assert [name for name in sorted(names) if len(name) > LONGEST_TEST_NAME] == []


def test_failover_does_not_know_smtp() -> None:
    assert not imports("worker.mail.failover") & {f"worker.mail.{name}" for name in ("pool", "smtp", "handshake")}

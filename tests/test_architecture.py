"""The house's arrows: who may import whom. The imports are read, not run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
OURS: Final = ("producer", "worker", "demo")


# What a caller installs who only asks for codes, by import name; see [project].dependencies.
BASE: Final = {"redis", "hiredis", "pydantic", "pydantic_settings", "dotenv", "email_validator", "structlog"}
COMMAND_LINE: Final = {"typer", "rich", "click"}  # the extra `cli`
API: Final = {  # the extra `api`
    *("fastapi", "fastapi_offline", "starlette", "uvicorn", "httptools", "uvloop", "prometheus_client"),
    *("grpc", "grpc_health", "grpc_reflection", "google"),
}
# Only these know Celery.
CELERYS: Final = {"worker.app", "worker.tasks"}
# Only these know OpenTelemetry. They are loaded where something is traced, and nowhere else.
TRACED: Final = {"producer.tracing.spans", "producer.tracing.export"}
# Modules that only build commands and read answers: the caller does the I/O.
PURE: Final = {
    *("producer.contract", "producer.store.codes", "producer.store.backlog", "producer.redis.scripts"),
    *("worker.queue.commands", "worker.mail.render", "worker.mail.responses"),
}
DOES_IO: Final = {"asyncio", "hiredis", "redis", "socket", "ssl", "subprocess", "threading", "urllib.request"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: Final = {name_of(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported at or below `node`, as dotted names; what only the type checker sees is left out."""
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
    """What is imported as soon as the module is."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If):
            yield from imported(node)


IMPORTS: Final = {name: set(imported(ast.parse(path.read_bytes()))) for name, path in MODULES.items()}


def tops(module: str) -> set[str]:
    """The top-level packages that `module` imports."""
    return {name.partition(".")[0] for name in IMPORTS[module]}


def below(*packages: str) -> list[str]:
    return [name for name in MODULES if name.partition(".")[0] in packages]


def test_the_modules_are_found() -> None:
    assert {"producer.contract", "worker.service", "worker.mail.render", "demo.__main__"} <= MODULES.keys()


@pytest.mark.parametrize("module", below("producer"))
def test_the_producer_needs_only_what_its_callers_install(module: str) -> None:
    allowed = BASE | {"producer"} | set(sys.stdlib_module_names)
    if module in {"producer.cli", "producer.__main__"}:
        allowed |= COMMAND_LINE
    if module == "producer.metrics":
        allowed |= {"prometheus_client"}
    if module.startswith("producer.api"):
        allowed |= API
    if module in TRACED:
        allowed |= {"opentelemetry"}
    assert tops(module) <= allowed


@pytest.mark.parametrize("module", below("worker"))
def test_the_worker_leans_on_the_producers_ground_floor(module: str) -> None:
    upstairs = {f"producer.{name}" for name in ("core", "client", "aio", "cli", "api")}
    assert not {name for name in IMPORTS[module] for floor in upstairs if name == floor or name.startswith(f"{floor}.")}
    assert not tops(module) & {"demo", "bench", "tests", *({"celeryconfig"} if module != "worker.app" else ())}


@pytest.mark.parametrize("module", ["producer.contract"])
def test_what_everything_leans_on_is_standard_library_only(module: str) -> None:
    assert tops(module) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "module",
    sorted(name for name in below("worker") if name not in CELERYS and not name.startswith("worker.celery_side")),
)
def test_only_celerys_side_knows_celery(module: str) -> None:
    assert not tops(module) & {"celery", "kombu", "billiard", "vine"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TRACED))
def test_what_is_not_traced_loads_nothing_for_it(module: str) -> None:
    assert "opentelemetry" not in tops(module)
    at_import = set(imported_at_the_top(MODULES[module]))
    assert not {name for name in at_import for each in TRACED if name == each or name.startswith(f"{each}.")}


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_only_builds_and_reads_does_no_io(module: str) -> None:
    assert not IMPORTS[module] & DOES_IO
    assert not tops(module) & DOES_IO
    tree = ast.parse(MODULES[module].read_bytes())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {name: {used for used in IMPORTS[name] if used in MODULES and used != name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))

"""Every command in README, ARCHITECTURE, docs/ and the README of each folder does what its page says."""

from __future__ import annotations

import ast
import json
import re
import shlex
import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support import doc_pages as pages
from support.caller import Caller
from support.doc_commands import TOOLS, WAYS, Elsewhere, Here, Long, Stays
from support.doc_pages import ROOT, Block
from support.doc_stage import A, Stage

from producer.settings import PREFIX, Settings, load

BLOCKS: Final = [block for page in pages.PAGES for block in pages.blocks(page)]
# Where a reader of these pages stands; everywhere else it is the checkout.
STANDS: Final = {"examples/README.md": "examples"}
# Blocks of the other languages: what holds them.
SHOWN: Final = {"js": "examples", "java": "examples", "go": "examples", "php": "examples", "cpp": "examples"}
DIAGRAMS: Final = {"", "mermaid"}
CONF: Final = "docs/high-availability.md"  # its blocks of configuration: tests/integration/test_docs_conf.py
TWO_LINES: Final = "tests/e2e/test_gateserver.py::test_the_two_lines_compile_where_they_belong"
LONG_TIMEOUT: Final = 600.0  # seconds


def scenes() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, page and commands of each block, and of each command that stands only in a sentence; each once."""
    played: set[tuple[str, tuple[str, ...]]] = set()
    for block in BLOCKS:
        where = STANDS.get(block.page, ".")
        if block.language == "sh" and (where, block.commands) not in played:
            played.add((where, block.commands))
            yield f"{block.page}:{block.line}", block.page, block.commands
    in_blocks = {command for _, commands in played for command in commands}
    for page in pages.PAGES:
        for command in map(plain, pages.typed_in_sentences(page)):
            if command not in in_blocks:
                in_blocks.add(command)
                yield f"{page}: {command}", page, (command,)


def plain(command: str) -> str:
    """Without the `&` that leaves a service behind."""
    return command.removesuffix("&").strip()


SCENES: Final = list(scenes())
COMMANDS: Final = {plain(command) for _, _, commands in SCENES for command in commands}


def played() -> Iterator[object]:
    """Each scene without what needs other programs, and, if it differs, with all.

    Those that take the place of the stage's own worker or doors come last: these are started once for all the others.
    """
    for name, page, commands in sorted(SCENES, key=lambda scene: displaces(scene[2])):
        here = [command for command in commands if not isinstance(WAYS.get(plain(command)), Long | Elsewhere | None)]
        bare = [command for command in here if not TOOLS.search(command)]
        if bare:
            yield pytest.param(page, bare, id=name)
        if here != bare:
            yield pytest.param(page, here, id=f"{name} with tools", marks=pytest.mark.tools)


def displaces(commands: tuple[str, ...]) -> int:
    """How much of what the stage has is gone after these commands."""
    ways = [WAYS.get(plain(command)) for command in commands]
    return max({"doors": 1, "worker": 2}.get(way.role, 0) if isinstance(way, Stays) else 0 for way in ways)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


def test_every_command_is_run_by_a_test() -> None:
    unknown = COMMANDS - WAYS.keys()
    assert unknown == set(), "say in tests/doc_commands.py how they are run"
    assert WAYS.keys() - COMMANDS == set(), "no page has them any more"


def test_a_block_without_a_language_has_no_command() -> None:
    silent = [block for block in BLOCKS if block.language in DIAGRAMS]
    assert [line for block in silent for line in block.text.splitlines() if pages.looks_typed(line)] == []


@pytest.mark.parametrize(
    ("command", "way"), [pytest.param(c, way, id=c) for c, way in WAYS.items() if isinstance(way, Elsewhere)]
)
def test_what_runs_elsewhere_is_run_there(command: str, way: Elsewhere) -> None:
    file, _, name = way.test.partition("::")
    text = (ROOT / file).read_text("utf-8")
    if name:
        assert name in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    else:
        assert command in text
    assert way.because


@pytest.mark.parametrize("command", sorted(command for command in COMMANDS if command.startswith("make ")))
def test_make_knows_its_targets(command: str, stage: Stage) -> None:
    with stage.scene():
        status, said = stage.run(f"make -n {command.removeprefix('make ')}")
    assert status == 0, said
    if command.startswith("make demo"):  # what tests/e2e/test_demo.py runs
        wanted = f"/python -m demo{' --once' if 'ONCE=1' in command else ' '}"
        assert any(line.endswith(wanted) for line in said.splitlines()), said


@pytest.mark.parametrize("command", sorted(command for command in COMMANDS if command.startswith("export ")))
def test_what_is_exported_is_a_setting_that_is_taken(command: str, stage: Stage) -> None:
    [(name, value)] = [word.split("=", 1) for word in shlex.split(stage.localized(command))[1:]]
    assert name in {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {"VERIFY_CONFIG"}
    load({name: value}, dotenv=None)  # raises


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("page", "commands"), list(played()))
def test_a_block_does_what_its_page_says(stage: Stage, page: str, commands: list[str]) -> None:
    where = STANDS.get(page, ".")
    services = []
    with stage.scene():
        for command in commands:
            way = WAYS[plain(command)]
            assert isinstance(way, Here | Stays)
            stage.needs(*way.needs)
            if isinstance(way, Stays):
                service = stage.serve(plain(command), way.role, where, without=way.without)
                services.append((command, way, service))
                service.wait_for(way.says, stage.localized(way.answers))
                stage.needs(*way.gives)
            else:
                status, said = stage.run(command, where, without=way.without)
                assert (status, bool(re.search(way.says, said))) == (way.status, True), said
        for command, way, service in reversed(services):
            assert service.end() in way.ends, (command, service.said[-3000:])


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.timeout(LONG_TIMEOUT + 60)
@pytest.mark.parametrize(
    ("command", "way"), [pytest.param(c, way, id=c) for c, way in WAYS.items() if isinstance(way, Long)]
)
def test_what_takes_long_runs_when_it_is_made_shorter(command: str, way: Long, tmp_path: Path) -> None:
    with Stage(tmp_path) as stage, stage.scene():
        told = f"{command} {way.words}".strip()
        status, said = stage.run(told, without=("VERIFY_",), timeout=LONG_TIMEOUT, **way.variables)
        assert status == 0, said[-5000:]
        assert re.search(way.says, said), said[-5000:]


def of(*languages: str) -> list[object]:
    """The blocks in these languages, each once: translated pages show the same code, with other words after a `#`."""
    words = re.compile(r"(print\(.*\)  # [^\s:;,]+).*|  # .*")  # all but what is printed
    found = {words.sub(r"\1", b.text): b for b in reversed(BLOCKS) if b.language in languages}
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in found.values()]


@pytest.mark.parametrize("block", of("python"))
def test_python_runs_and_prints_what_stands_beside_it(stage: Stage, block: Block) -> None:
    """`print(…)  # 0: why` prints `0`."""
    expected = re.findall(r"print\(.*\)  # ([^\s:;,]+)", block.text)
    assert expected
    with stage.scene():
        stage.needs("worker")
        script = stage.checkout / f"block-{uuid.uuid4().hex}.py"
        script.write_text(block.text)
        status, said = stage.run(f"python {script.name}")
        assert (status, said.split()) == (0, expected)


@pytest.mark.parametrize("block", of("json"))
def test_json_is_json_and_a_message_is_answered(stage: Stage, block: Block) -> None:
    data = json.loads(block.text)
    if "headers" not in data:
        return
    golden = json.loads((ROOT / "tests/contract/minimal.json").read_text("utf-8"))["push"]
    assert paths(data) == paths({**golden, "body": ""})
    body = data["body"].removeprefix("base64 of ")
    assert json.loads(body) == [[], {"email": A}, {}]
    request_id = data["headers"]["id"] = str(uuid.uuid4())
    data |= {"body": b64encode(body.encode()).decode()}
    data["properties"]["delivery_tag"] = str(uuid.uuid4())
    with stage.scene():
        stage.needs("worker")
        with Caller(stage.server.url(1), stage.server.url(2)) as caller:
            caller.push(data)
            assert caller.reply(request_id) == {"email": A, "error": 0}


def paths(data: object, above: str = "") -> set[str]:
    """The names in an object, with those above them."""
    if not isinstance(data, dict):
        return {above}
    return {path for name, value in data.items() for path in paths(value, f"{above}/{name}")}


@pytest.mark.parametrize("block", of(*SHOWN))
def test_code_that_is_shown_stands_in_an_example(block: Block) -> None:
    if block.page == "examples/gateserver/README.md":
        test_what_runs_elsewhere_is_run_there("", Elsewhere(TWO_LINES, "it compiles them where they belong"))
        return
    lines = [line.strip() for line in block.text.strip().splitlines()]
    sources = [
        path.read_text("utf-8").splitlines() for path in (ROOT / "examples").rglob("*.*") if path.suffix != ".md"
    ]
    assert any(
        [line.strip() for line in source[start : start + len(lines)]] == lines
        for source in sources
        for start in range(len(source))
    )


def test_every_block_is_of_a_kind_that_a_test_holds() -> None:
    held = {"sh", "python", "json", *SHOWN, *DIAGRAMS}
    assert {(block.page, block.language) for block in BLOCKS if block.language not in held} == {(CONF, "conf")}

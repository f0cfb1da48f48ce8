"""Every command and every block of code in the docs does what its page says."""

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
from support.doc_commands import REPEATED, TOOLS, WAYS, Run, Serve, Slow, TestedBy, way
from support.doc_harness import EMAIL, DocHarness
from support.doc_pages import ROOT, Block

from producer.settings import PREFIX, Settings, load

BLOCKS: Final = [block for page in pages.PAGES for block in pages.blocks(page)]
DIRECTORIES: Final = {"examples/README.md": "examples"}  # where a page's commands run, if not in the checkout
DIAGRAMS: Final = {"", "mermaid"}
CONF: Final = "docs/high-availability.md"  # its configuration: tests/integration/test_docs_conf.py
GATESERVER: Final = "examples/gateserver/README.md"  # its C++: tests/e2e/test_gateserver.py
SLOW_TIMEOUT: Final = 900.0  # seconds


def plain(command: str) -> str:
    """The command without the `&` that puts it in the background."""
    return command.removesuffix("&").strip()


def scripts() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, page and commands of each block, and of each command that stands only in a sentence; each once."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for block in BLOCKS:
        directory = DIRECTORIES.get(block.page, ".")
        if block.language == "sh" and (directory, block.commands) not in seen:
            seen.add((directory, block.commands))
            yield f"{block.page}:{block.line}", block.page, block.commands
    known = {command for _, commands in seen for command in commands}
    for page in pages.PAGES:
        for command in map(plain, pages.typed_in_sentences(page)):
            if command not in known:
                known.add(command)
                yield f"{page}: {command}", page, (command,)


SCRIPTS: Final = list(scripts())
COMMANDS: Final = sorted({plain(command) for _, _, commands in SCRIPTS for command in commands})


def runnable() -> Iterator[object]:
    """Each script, without the commands that other tests run."""
    for name, page, commands in SCRIPTS:
        here = [command for command in commands if isinstance(way(plain(command)), Run | Serve)]
        if here:
            marks = [pytest.mark.tools] if any(TOOLS.search(command) for command in here) else []
            marks += [pytest.mark.slow] if all(REPEATED.search(command) for command in here) else []
            yield pytest.param(page, here, id=name, marks=marks)


def of_kind(kind: type) -> list[object]:
    """Each command that is run in this way, with it."""
    return [pytest.param(command, way(command), id=command) for command in COMMANDS if isinstance(way(command), kind)]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DocHarness]:
    with DocHarness(tmp_path_factory.mktemp("docs")) as docs:
        yield docs


def test_every_command_has_a_way_to_be_run() -> None:
    assert [command for command in COMMANDS if way(command) is None] == [], "add it to tests/support/doc_commands.py"
    assert WAYS.keys() - set(COMMANDS) == set(), "no page has it any more"


def test_a_block_without_a_language_holds_no_command() -> None:
    lines = [line for block in BLOCKS if block.language in DIAGRAMS for line in block.text.splitlines()]
    assert [line for line in lines if pages.looks_typed(line)] == []


@pytest.mark.parametrize(("command", "tested"), of_kind(TestedBy))
def test_the_test_that_is_named_for_a_command_is_there(command: str, tested: TestedBy) -> None:
    del command
    file, _, name = tested.test.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_knows_its_targets(command: str, docs: DocHarness) -> None:
    with docs.fresh():
        status, output = docs.run(f"make -n {command.removeprefix('make ')}")
    assert status == 0, output
    if command.startswith("make demo"):  # what tests/e2e/test_demo.py runs
        expected = f"/python -m demo{' --once' if 'ONCE=1' in command else ' '}"
        assert any(line.endswith(expected) for line in output.splitlines()), output


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("export ")])
def test_an_exported_variable_is_a_setting_with_a_valid_value(command: str, docs: DocHarness) -> None:
    [(name, value)] = [word.split("=", 1) for word in shlex.split(docs.localized(command))[1:]]
    assert name in {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {"VERIFY_CONFIG"}
    load({name: value}, dotenv=None)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "commands"), list(runnable()))
def test_a_block_does_what_its_page_says(docs: DocHarness, page: str, commands: list[str]) -> None:
    directory = DIRECTORIES.get(page, ".")
    services = []
    with docs.fresh():
        for command in commands:
            how = way(plain(command))
            assert isinstance(how, Run | Serve)
            docs.require(*how.needs)
            if isinstance(how, Serve):
                service = docs.serve(plain(command), how.role, directory, unset=how.unset)
                services.append((command, service))
                service.wait_until(how.prints, docs.localized(how.url))
                docs.require(*how.gives)
            else:
                status, output = docs.run(command, directory, unset=how.unset)
                assert (status, bool(re.search(how.prints, output))) == (0, True), output
        for command, service in reversed(services):
            assert service.stop() == 0, (command, service.log[-3000:])


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.timeout(SLOW_TIMEOUT + 60)
@pytest.mark.parametrize(("command", "how"), of_kind(Slow))
def test_a_slow_command_runs_with_less_to_do(command: str, how: Slow, tmp_path: Path) -> None:
    with DocHarness(tmp_path) as docs, docs.fresh():
        line = f"{command} {how.words}".strip()
        status, output = docs.run(line, unset=("VERIFY_",), timeout=SLOW_TIMEOUT, **how.variables)
        assert status == 0, output[-5000:]
        assert re.search(how.prints, output), output[-5000:]


def of(*languages: str) -> list[object]:
    """The blocks in these languages, each once: translated pages show the same code with other comments."""
    comments = re.compile(r"(print\(.*\)  # [^\s:;,]+).*|  # .*")  # except for what is printed
    found = {comments.sub(r"\1", b.text): b for b in reversed(BLOCKS) if b.language in languages}
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in found.values()]


@pytest.mark.parametrize("block", of("python"))
def test_python_prints_what_stands_beside_it(docs: DocHarness, block: Block) -> None:
    """`print(…)  # 0: why` prints `0`."""
    expected = re.findall(r"print\(.*\)  # ([^\s:;,]+)", block.text)
    assert expected
    with docs.fresh():
        docs.require("worker")
        script = docs.checkout / f"block-{uuid.uuid4().hex}.py"
        script.write_text(docs.localized(block.text))
        status, output = docs.run(f"python {script.name}")
        assert (status, output.split()) == (0, expected)


@pytest.mark.parametrize("block", of("json"))
def test_json_parses_and_a_message_is_answered(docs: DocHarness, block: Block) -> None:
    data = json.loads(block.text)
    if "headers" not in data:
        return
    golden = json.loads((ROOT / "tests/contract/minimal.json").read_text("utf-8"))["push"]
    assert paths(data) == paths({**golden, "body": ""})
    body = data["body"].removeprefix("base64 of ")
    assert json.loads(body) == [[], {"email": EMAIL}, {}]
    request_id = data["headers"]["id"] = str(uuid.uuid4())
    data["body"] = b64encode(body.encode()).decode()
    data["properties"]["delivery_tag"] = str(uuid.uuid4())
    with docs.fresh():
        docs.require("worker")
        with Caller(docs.server.url(1), docs.server.url(2)) as caller:
            caller.push(data)
            assert caller.reply(request_id) == {"email": EMAIL, "error": 0}


def paths(data: object, above: str = "") -> set[str]:
    """The names in an object, with those above them."""
    if not isinstance(data, dict):
        return {above}
    return {path for name, value in data.items() for path in paths(value, f"{above}/{name}")}


def test_every_block_is_of_a_kind_that_a_test_covers() -> None:
    covered = {"sh", "python", "json", *DIAGRAMS}
    others = {(block.page, block.language) for block in BLOCKS if block.language not in covered}
    assert others == {(CONF, "conf"), (GATESERVER, "cpp")}

"""The program that runs two releases side by side takes any commit, leaves nothing behind, and finds what breaks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.process import ROOT
from support.rig import Rig

from bench.soak.ledger import Breach, Ledger
from bench.upgrade.__main__ import Upgrade, main
from bench.upgrade.load import Asker
from bench.upgrade.release import unpack, working_tree
from producer.contract import ErrorCode

STAGE = 6.0  # seconds


def test_a_commit_is_unpacked_and_run_by_the_python_that_has_its_packages(tmp_path: Path) -> None:
    release = unpack("HEAD", tmp_path)
    assert (release.root / "worker" / "app.py").is_file()
    assert (release.root / ".git").exists() is False
    assert release.environment({})["PYTHONPATH"] == str(tmp_path)
    if (tmp_path / "requirements.lock").read_bytes() == (ROOT / "requirements.lock").read_bytes():
        assert release.python == Path(sys.executable)


def test_what_is_no_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-release"]) == 2
    assert capsys.readouterr().err == "no-such-release: no commit or tag of this repository\n"


@pytest.mark.slow
def test_the_clients_of_a_release_ask_in_a_process_of_their_own(rig: Rig) -> None:
    rig.add_worker()
    ledger = Ledger(60)
    asker = Asker(working_tree(), rig.settings, ledger)
    known = ledger.asking("enqueue@soak.example", "enqueue", "an-id")
    others = [ledger.asking(f"{how}@soak.example", how) for how in ("request", "blocking")]
    for record in (known, *others):
        asker.ask(record.how, record)
    asker.close()
    assert [record.answer for record in others] == [ErrorCode.SUCCESS] * 2
    assert known.acknowledged
    assert rig.caller.reply("an-id")["error"] == ErrorCode.SUCCESS
    assert ledger.violations == []


@pytest.mark.slow
def test_two_releases_of_one_form_keep_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["HEAD", "--seed", "1", "--stage", str(STAGE)]) == 0
    assert "every promise held" in capsys.readouterr().out


@pytest.mark.slow
def test_a_record_that_changed_without_a_version_is_found(tmp_path: Path) -> None:
    old = unpack("HEAD", tmp_path)
    codes = old.root / "producer" / "store" / "codes.py"
    text = codes.read_text()
    assert text.count("digest_size=16") == 1
    codes.write_text(text.replace("digest_size=16", "digest_size=15"))
    with Upgrade(old, working_tree(), seed=1, stage=STAGE) as run:
        run.run()
    assert run.dead["id_conflict"] > 0
    assert run.ledger.breaches[Breach.LOST] > 0

"""`make audit`: the list of packages that run in production, and their known vulnerabilities."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from support.process import ROOT

pytestmark = pytest.mark.slow  # it fetches two programs


def test_make_audit_lists_and_audits_what_runs_in_production() -> None:
    done = subprocess.run(["make", "audit"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    listed = json.loads((ROOT / "build" / "sbom.cdx.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    pinned = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.prod.lock").read_text())
    assert {(each["name"], each["version"]) for each in listed["components"]} == set(pinned)
    if done.returncode == 0:
        assert "No known vulnerabilities found" in done.stdout
    else:  # as where only packages can be fetched
        assert "Not audited: the advisories of PyPI cannot be read from here." in done.stderr

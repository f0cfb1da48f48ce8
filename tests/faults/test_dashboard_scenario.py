"""The faults that `make picture` shows one after the other."""

from __future__ import annotations

from itertools import pairwise

from bench.soak.faults import KINDS, LONG_FAULTS_END, long_faults


def test_its_faults_exist_and_fit_their_targets() -> None:
    known = {kind.name: kind.where for kind in KINDS}
    for fault in long_faults():
        assert fault.where in known[fault.kind]


def test_faults_come_one_after_the_other_or_begin_together() -> None:
    planned = long_faults()
    for fault, after in pairwise(planned):
        assert fault.at + fault.seconds < after.at or fault.at == after.at
    assert planned[-1].at + planned[-1].seconds < LONG_FAULTS_END

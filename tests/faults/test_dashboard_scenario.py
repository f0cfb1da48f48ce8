"""The tour of `make picture`: faults that there are, one after the other."""

from __future__ import annotations

from itertools import pairwise

from support.faults import KINDS

from bench.soak.scenario import SECONDS, tour


def test_it_plays_faults_that_there_are_on_what_they_are_done_to() -> None:
    known = {kind.name: kind.where for kind in KINDS}
    for fault in tour():
        assert fault.where in known[fault.kind]


def test_each_fault_is_over_before_the_next_begins_or_is_part_of_the_same() -> None:
    planned = tour()
    for fault, after in pairwise(planned):
        assert fault.at + fault.seconds < after.at or fault.at == after.at
    assert planned[-1].at + planned[-1].seconds < SECONDS

"""What the fault tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.rig import VISIBILITY, Rig


@pytest.fixture
def new_rig() -> Iterator[Callable[..., Rig]]:
    """Makes rigs of the test's own; takes what `Rig` takes, and `workers`: how many to start.

    Nothing is checked at the end: a test calls `audit` with what its fault allows.
    """
    with ExitStack() as stack:

        def make(*, workers: int = 1, **options: object) -> Rig:
            rig = Rig(**({"visibility_timeout": VISIBILITY} | options))  # type: ignore[arg-type]  # passed on as given
            stack.callback(rig.close)
            rig.add_workers(workers)
            return rig

        yield make

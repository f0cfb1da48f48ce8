"""What the fault tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.harness import Stage


@pytest.fixture
def new_stage() -> Iterator[Callable[..., Stage]]:
    """Makes stages of the test's own; takes what `Stage` takes, and `workers`: how many to start."""
    with ExitStack() as stack:

        def make(*, workers: int = 1, **options: object) -> Stage:
            stage = stack.enter_context(Stage(**options))  # type: ignore[arg-type]  # passed on as given
            stage.add_workers(workers)
            return stage

        yield make

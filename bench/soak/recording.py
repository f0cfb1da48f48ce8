"""A soak as Prometheus saw it: what every panel of the dashboard asks for, with the faults, as one JSON file."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from support.api_process import ApiProcess
from support.monitoring import concrete, panels
from support.process import free_port
from support.prometheus_process import PrometheusProcess

from bench.soak.callers import Callers
from bench.soak.faults import WORKERS
from bench.soak.ledger import Ledger

STEP: Final = 2.0  # seconds between two points of a line
WINDOW: Final = "10s"  # of rates
A_SECOND: Final = 4.0  # requests at each door
TIMEOUT: Final = 20.0  # seconds for a door to answer


class Recording:
    """ApiProcess beside a soak's workers, someone who asks at them, and Prometheus, which scrapes all every second."""

    def __init__(self) -> None:
        self.binds = {f"worker {i}": f"127.0.0.1:{free_port()}" for i in range(WORKERS)}
        self._stack = ExitStack()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lead = 0.0  # of Unix time before the monotonic clock

    def open(self, settings: dict[str, str], callers: Callers) -> None:
        """Start all of it."""
        self._doors = self._stack.enter_context(ApiProcess(settings))
        targets = {
            "verify-worker": list(self.binds.values()),
            "verify-api": [f"127.0.0.1:{self._doors.http_port}"],
        }
        self._prometheus = self._stack.enter_context(PrometheusProcess(targets))
        self._lead = time.time() - time.monotonic()
        self._threads = [
            threading.Thread(target=self._ask, args=(callers, door), daemon=True) for door in (True, False)
        ]

    def roll(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more; who waits for an answer gets it first."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _ask(self, callers: Callers, by_http: bool) -> None:
        while not self._stopping.wait(1 / A_SECOND):
            record = callers.ledger.asking(callers.address("door"), "HTTP door" if by_http else "gRPC door")
            if by_http:
                error = self._doors.get_code(record.email)["error"]
            else:
                error = self._doors.call(record.email, timeout=TIMEOUT).error
            callers.told(record, error)

    def develop(self, path: Path, ledger: Ledger, seconds: float) -> None:
        """Write what there was in the first `seconds` of the soak."""
        start = ledger.began + self._lead
        found = [self._panel(panel, start, start + seconds) for panel in panels()]
        faults = [
            {
                "kind": window.kind,
                "where": window.where,
                "start": window.start - ledger.began,
                "end": min(window.end - ledger.began, seconds),
            }
            for window in ledger.windows
        ]
        version = self._prometheus.ask("status/buildinfo")["version"]
        film = {"seconds": seconds, "window": WINDOW, "prometheus": version, "faults": faults, "panels": found}
        path.write_text(json.dumps(film))

    def _panel(self, panel: dict[str, Any], start: float, end: float) -> dict[str, Any]:
        lines = []
        for target in panel["targets"]:
            for labels, points in self._prometheus.history(concrete(target["expr"], WINDOW), start, end, STEP):
                name = target["legendFormat"]
                for label, value in labels.items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                # JSON has no NaN; what is not known is a gap.
                moments = [(at - start, value if math.isfinite(value) else None) for at, value in points]
                lines.append({"name": name, "labels": labels, "points": moments})
        return {key: panel[key] for key in ("title", "type", "gridPos", "fieldConfig")} | {"lines": lines}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._stack.close()

"""Flower as an operator starts it: `celery -A worker.app flower`, a process of its own, and its pages."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from support.worker_process import LAUNCH, ROOT, eventually


class FlowerProcess:
    """`with FlowerProcess(environment) as flower:` starts it, waits until it serves, and ends it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: that of a worker."""
        self._directory = tempfile.TemporaryDirectory(prefix="flower-")
        self._log = Path(self._directory.name) / "flower.log"
        self._environment = {**environment, "PYTHONPATH": str(ROOT), "FLOWER_UNAUTHENTICATED_API": "true"}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, *, status: int = 200) -> str:
        """A page."""
        return self.ask("GET", path, status=status)

    def api(self, path: str) -> Any:
        """An answer of its API."""
        return json.loads(self.get(path))

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> str:
        """Any request; the answer's body."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status == status, (path, response.status)
            return text

    def __enter__(self) -> Self:
        flower = [sys.executable, "-m", "celery", "-A", "worker.app", "flower"]
        options = ["--port=0", "--address=127.0.0.1", "--debug=true", "--logging=debug"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *flower, *options],
                cwd=self._directory.name,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        where = re.compile(r"Visit me at http://127.0.0.1:(\d+)")
        try:
            eventually(lambda: self._ended() or where.search(self.log), 30)
            found = where.search(self.log)
            assert found, self.log
        except BaseException:
            self.__exit__()
            raise
        self.port = int(found[1])
        return self

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def __exit__(self, *_: object) -> None:
        if self._process is not None and not self._ended():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._directory.cleanup()

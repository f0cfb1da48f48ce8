"""`python -m producer`: the command line. It needs the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or name the package that it lacks."""
    try:
        from producer.cli import app  # noqa: PLC0415 - needs the extra `cli`
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"The command line needs {missing}: pip install 'verifyserver[cli]'\n")
        raise SystemExit(2) from None
    app(prog_name="python -m producer")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

"""`python -m worker`"""

try:
    from worker.cli import main
except ModuleNotFoundError as exc:
    if exc.name not in {"typer", "rich"}:
        raise
    raise SystemExit(f"the command line needs {exc.name}: pip install 'verifyserver[cli]'") from None
except KeyboardInterrupt:
    raise SystemExit(130) from None

main()

"""`python -m worker`"""

try:
    from worker.cli import main
except ModuleNotFoundError as exc:
    if exc.name not in {"typer", "rich"}:
        raise
    raise SystemExit(f"{exc.name} is not installed: the command line needs the extra `cli`") from None
except KeyboardInterrupt:
    raise SystemExit(130) from None

main()

"""The command line, `specdiff demo` and others: `main` has the list, a file holds each command.

Commands only wire modules.
"""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'{missing.name} is missing: the command line needs pip install "specdiff[demo]"'
    ) from None

"""Main: the list of commands, and the entry point of the `specdiff` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import specdiff
from specdiff.cli.benchmark import bench
from specdiff.cli.common import console, errors
from specdiff.cli.demo import demo
from specdiff.cli.evaluating import evaluate_methods, tune_plan
from specdiff.cli.explaining import explain
from specdiff.cli.serving import serve
from specdiff.cli.verifying import verify
from specdiff.errors import SpecdiffError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(specdiff.__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Run diffusion transformers on the tokens that matter."""


app.command("demo")(demo)
app.command("explain")(explain)
app.command("bench")(bench)
app.command("eval")(evaluate_methods)
app.command("tune")(tune_plan)
app.command("serve")(serve)
app.command("verify")(verify)


def main() -> None:
    """Entry point of the `specdiff` command: 0 when done, 2 on an error of the caller's."""
    try:
        app()
    except SpecdiffError as error:
        # Not markup: messages name extras in square brackets.
        errors.print(
            "error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)

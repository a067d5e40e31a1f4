"""The command `slimformer`: calibrate a plan, measure it, generate with it, show it.

Exit codes: 0 done, 1 an error with its reason on standard error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import rich
import typer
from typer.core import TyperGroup

from slimformer import __version__
from slimformer.cli.commands import (
    calibrate,
    demo,
    generate,
    measure,
    repair,
    show,
    train_predictor,
    train_router,
)
from slimformer.cli.output import note
from slimformer.errors import SlimformerError, SlimformerWarning


class _Commands(TyperGroup):
    """Turns errors made on purpose into one line and an exit code, and leaves all others their traceback."""

    def invoke(self, ctx: Any) -> Any:
        with _notices_on_standard_error():
            try:
                return super().invoke(ctx)
            except SlimformerError as error:
                note(f"error: {error}")
                raise typer.Exit(1) from error
            except KeyboardInterrupt as interruption:
                note("interrupted")
                raise typer.Exit(130) from interruption


class _Notes(logging.Handler):
    """Prints each line once, also where several steps of a command log it."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{'note' if record.levelno < logging.WARNING else 'warning'}: {record.getMessage()}"
        if text not in self.printed:
            self.printed.add(text)
            note(text)


@contextlib.contextmanager
def _notices_on_standard_error() -> Iterator[None]:
    """Log lines, warnings and progress bars go to standard error, so that standard output is the result alone."""
    handler, logger, console = _Notes(), logging.getLogger("slimformer"), rich.get_console()
    level, on_error = logger.level, console.stderr
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    console.stderr = True
    try:
        with warnings.catch_warnings():
            printed = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, SlimformerWarning):
                    note(f"warning: {message}")
                else:
                    printed(message, category, *where, **more)

            warnings.showwarning = show
            yield
    finally:
        console.stderr = on_error
        logger.setLevel(level)
        logger.removeHandler(handler)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _command in (
    calibrate.calibrate,
    train_predictor.train_predictor,
    train_router.train_router,
    repair.repair,
    measure.eval_plan,
    measure.bench,
    generate.generate,
    show.show,
    demo.demo,
):
    app.command(_command.__name__.removesuffix("_plan").replace("_", "-"))(_command)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make transformer models cheaper to run without retraining them."""


def main() -> None:
    """Run the command line."""
    app()

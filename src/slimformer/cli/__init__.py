"""The command `slimformer`: calibrate a plan, measure it, generate with it, show it.

Exit codes: 0 done, 1 an error with its reason on standard error, 2 wrong usage, 4 a training or an optimisation that
won nothing, 130 interrupted.
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
from slimformer.cli.commands.bench import bench
from slimformer.cli.commands.calibrate import calibrate
from slimformer.cli.commands.demo import demo
from slimformer.cli.commands.deprecated import train_predictor, train_router
from slimformer.cli.commands.embed import embed
from slimformer.cli.commands.eval import eval_plan
from slimformer.cli.commands.export import export
from slimformer.cli.commands.generate import generate
from slimformer.cli.commands.optimize import optimize
from slimformer.cli.commands.repair import repair
from slimformer.cli.commands.show import show
from slimformer.cli.options import help_of
from slimformer.cli.output import note
from slimformer.errors import SlimformerError, SlimformerWarning


class _Commands(TyperGroup):
    """Turns errors made on purpose into one line and an exit code, and leaves all others their traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        # Groups are listed behind commands, and this one is what others start from.
        return sorted(super().list_commands(ctx), key=lambda name: name != "calibrate")

    def invoke(self, ctx: Any) -> Any:
        with _notices_on_standard_error():
            try:
                return super().invoke(ctx)
            except typer.BadParameter as error:
                # typer says of a choice that it raised a ValueError, which is no news to whoever typed it.
                error.message = error.message.removeprefix("Value error, ")
                raise
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


# Which command serves which wish.
_WISHES = (
    ("any of these", "slimformer optimize MODEL --for generate --max-loss 2% -o plans/mine"),
    ("faster generation", "slimformer calibrate drop MODEL -o plans/mine --drop 4"),
    ("long prompts", "slimformer calibrate eliminate MODEL -o plans/mine --length 4096"),
    ("faster embeddings", "slimformer calibrate narrow MODEL -o plans/mine --data my-beir --max-loss 0.01"),
    ("less memory", "slimformer calibrate drop MODEL -o plans/mine --drop 8 --replace filter"),
    ("longer context", "in Python: slimformer.patch(model, slimformer.SelfExtend(...))"),
    ("undo, or share", 'in Python: slimformer.unpatch(model), plan.push_to_hub("me/my-plan")'),
)
_ALONE = """slimformer makes transformer models cheaper to run without retraining them.

Which command for which wish (MODEL is a folder or Hub id; its weights are never changed):

{wishes}

Then look at the plan and use it:

  slimformer eval MODEL --plan plans/mine        what it costs in quality
  slimformer bench MODEL --plan plans/mine       what it saves in time and memory
  slimformer repair MODEL --plan plans/mine -o plans/repaired        win quality back
  slimformer export MODEL --plan plans/mine --to vllm -o slim            a folder for other engines
  slimformer embed MODEL --plan plans/mine --input corpus.parquet -o vectors
  slimformer generate MODEL "A prompt" --plan plans/mine
  in Python: slimformer.patch(model, "plans/mine")

Unsure? slimformer demo shows it on a real model. slimformer --help lists all commands."""
app = typer.Typer(
    cls=_Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    epilog="Example: slimformer calibrate drop MODEL -o plans/mine --drop 4. Which command for which wish: slimformer "
    "alone says it.",
)
app.add_typer(calibrate, name="calibrate")
for _command, _name, _example in (
    (optimize, "optimize", "MODEL --for prefill --max-loss 2% -o plans/mine"),
    (repair, "repair", "MODEL --plan plans/mine -o plans/repaired --data text.jsonl"),
    (eval_plan, "eval", "MODEL --plan plans/mine --save"),
    (bench, "bench", "MODEL --plan plans/mine --prompt-tokens 2048"),
    (generate, "generate", 'MODEL "A prompt" --plan plans/mine'),
    (export, "export", "MODEL --plan plans/mine --to vllm -o slim"),
    (embed, "embed", "MODEL --input corpus.parquet -o vectors"),
    (show, "show", "plans/mine --html plan.html"),
    (demo, "demo", "MODEL -o demo-output"),
):
    app.command(_name, help=help_of(_command), epilog=f"Example: slimformer {_name} {_example}")(_command)
for _name, _old in (("train-router", train_router), ("train-predictor", train_predictor)):
    # Help is that of the command that does its work.
    app.command(
        _name,
        hidden=True,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )(_old)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make transformer models cheaper to run without retraining them."""
    if ctx.invoked_subcommand is None:
        typer.echo(_ALONE.format(wishes="\n".join(f"  {wish:<19}{command}" for wish, command in _WISHES)))


def main() -> None:
    """Run the command line."""
    app()

"""`slimformer train-router` and `slimformer train-predictor`, which are part of `slimformer calibrate` now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from slimformer.cli.commands.calibrate import calibrate
from slimformer.cli.output import note

# What `calibrate` has an option for; everything else that the old commands took goes through --set.
_KEPT = {"--output", "--data", "--length", "--steps", "--device", "--dtype", "--help"}
_FLAGS = {"--hold-out": ("hold_out", "true"), "--no-hold-out": ("hold_out", "false"),
          "--revivable": ("revivable", "true")}  # fmt: skip


def train_router(ctx: typer.Context) -> None:
    """Deprecated: slimformer calibrate route."""
    _hand_on(ctx, "route", (), {*_KEPT, "--keep", "--number", "--kinds", "--metric"})


def train_predictor(ctx: typer.Context) -> None:
    """Deprecated: slimformer calibrate eliminate --predictor."""
    _hand_on(ctx, "eliminate", ("--predictor",), {*_KEPT, "--schedule"})


def _hand_on(ctx: typer.Context, name: str, lead: Sequence[str], kept: set[str]) -> None:
    words = [*lead, *_translated(ctx.args, kept)]
    note(f"{ctx.info_name} is deprecated: slimformer calibrate {name} {' '.join(words)}")
    group: Any = typer.main.get_command(calibrate)
    command = group.get_command(ctx, name)
    with command.make_context(f"slimformer calibrate {name}", words, parent=ctx.parent) as inner:
        command.invoke(inner)


def _translated(given: Sequence[str], kept: set[str]) -> list[str]:
    """The words of an old command line in those of `calibrate`."""
    words, left = [], list(given)
    while left:
        word = left.pop(0)
        option, mark, value = word.partition("=")
        if option == "--json":
            raise typer.BadParameter("--json has moved: slimformer show PLAN --json prints the plan.")
        if option in _FLAGS:
            words += ["--set", "=".join(_FLAGS[option])]
        elif not option.startswith("--") or option in kept or option == "--force":
            words.append(word)
        else:
            if not mark and not left:
                raise typer.BadParameter(f"{option} takes a value.")
            words += ["--set", f"{option[2:]}={value if mark else left.pop(0)}"]
    return words

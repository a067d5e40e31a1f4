"""`slimformer calibrate`: choose what a model need not compute, or learn it, and write the plan."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from slimformer.cli.commands.calibrate.draft import draft
from slimformer.cli.commands.calibrate.drop import drop
from slimformer.cli.commands.calibrate.eliminate import eliminate
from slimformer.cli.commands.calibrate.exit import exit_early
from slimformer.cli.commands.calibrate.narrow import narrow
from slimformer.cli.commands.calibrate.route import route
from slimformer.cli.commands.calibrate.temperature import temperature
from slimformer.cli.options import help_of


class _Choices(TyperGroup):
    """Says what may be chosen where a model stands in its place."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            ctx.fail(
                f"Say first what is chosen, one of {', '.join(self.commands)}; got {args[0]!r}. "
                f"For example: slimformer calibrate drop MODEL -o plans/mine --drop 4"
            )
        return super().resolve_command(ctx, args)


calibrate = typer.Typer(
    cls=_Choices,
    no_args_is_help=True,
    help="Choose what MODEL need not compute, on your own text, and write the plan.",
    epilog="Example: slimformer calibrate drop HuggingFaceTB/SmolLM2-135M -o plans/mine --drop 4",
)
for _command, _name, _example in (
    (drop, "drop", "MODEL -o plans/mine --drop 4 --data text.jsonl"),
    (narrow, "narrow", "MODEL -o plans/mine --data my-beir --max-loss 0.01"),
    (exit_early, "exit", "MODEL -o plans/mine --data my-beir --layer 5"),
    (eliminate, "eliminate", "MODEL -o plans/mine --length 4096 --data text.jsonl"),
    (temperature, "temperature", "MODEL -o plans/mine --data my-beir"),
    (route, "route", "MODEL -o plans/mine --data text.jsonl --keep 0.5"),
    (draft, "draft", "MODEL -o plans/draft"),
):
    calibrate.command(
        _name, help=help_of(_command), epilog=f"Example: slimformer calibrate {_name} {_example}"
    )(_command)

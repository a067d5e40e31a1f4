"""Options that would be ignored are errors: what was typed is what is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from slimformer.cli.settings import Settings


def given(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, whatever its value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse(ctx: typer.Context, goes_with: Mapping[str, str]) -> None:
    """Refuse options that were typed and would do nothing.

    Args:
        ctx: The command's.
        goes_with: Names of parameters that do not apply, and what each does go with.

    Raises:
        typer.BadParameter: If one was typed; names all of them.
    """
    found = [f"{_option(ctx, name)} goes with {what}" for name, what in goes_with.items() if given(ctx, name)]
    if found:
        raise typer.BadParameter("; ".join(found) + ".")


def refuse_text_field(ctx: typer.Context, *sources: Any) -> None:
    """Refuse --text-field where no source of texts was given.

    Raises:
        typer.BadParameter: If it was typed.
    """
    if all(source is None for source in sources):
        refuse(ctx, {"text_field": "a source of texts, and none was given"})


def refuse_settings_without_data(settings: Settings, data: str | None) -> None:
    """Refuse `--set text_field=...` where no source of texts was given.

    Raises:
        typer.BadParameter: If it was typed.
    """
    if data is None and "text_field" in settings.left and "task" not in settings.left:
        raise typer.BadParameter("--set text_field=... goes with a source of texts, and none was given.")


def _option(ctx: typer.Context, name: str) -> str:
    parameter = next(p for p in ctx.command.params if p.name == name)
    # A flag has its opposite beside it, and either may have been typed.
    return "/".join(opt for opt in (*parameter.opts, *parameter.secondary_opts) if opt.startswith("--"))

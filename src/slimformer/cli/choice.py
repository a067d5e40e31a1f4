"""What all `slimformer calibrate ...` commands do: load, choose, save, print."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimformer.cli.applicable import refuse_settings_without_data
from slimformer.cli.output import check_output, leave_where_nothing_was_won, note, print_tables
from slimformer.cli.partial import partial_results
from slimformer.cli.settings import Settings

# Options of `slimformer.calibrate` that are the command line's own business.
_OWN = ("data", "checkpoint", "progress", "settings")


def choose(
    method: str,
    model: str,
    output: Path,
    *,
    data: str | None,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    more: Sequence[str] | None,
    embeddings: bool = False,
    device: str,
    dtype: str,
    force: bool,
    table: str,
) -> None:
    """Choose a method by `slimformer.calibrate`, and write its plan.

    Args:
        method: The name of its class.
        model: The checkpoint.
        output: Where the plan goes.
        data: What is read.
        fields: What the command fixes of the method; None leaves a field open.
        options: What it passes on; None leaves an option to its default.
        defaults: Fields that are not the method's own defaults, unless `--set` says otherwise.
        training: For what is trained, how, unless `--set` says otherwise.
        more: What `--set` was given.
        embeddings: Whether it takes an embedding pipeline, whatever the data are.
        device: Where the model goes.
        dtype: What its weights are held in.
        force: Whether a plan in the output folder is replaced.
        table: The function of `slimformer.report` that makes the table to print.

    Raises:
        typer.BadParameter: If `--set` names what does not apply, or a value of another type.
    """
    settings = Settings(more)
    refuse_settings_without_data(settings, data)
    check_output(output, force)

    import slimformer
    from slimformer import methods, report
    from slimformer.choosing import chosen_by, options_of
    from slimformer.cli.loading import load_embedder, load_model, load_tokenizer
    from slimformer.decisions.registry import field_names
    from slimformer.evaluation.embedding_tasks import is_labelled, read_task
    from slimformer.training.loop import TrainingSettings

    kind = getattr(methods, method)
    # What the command has an option for is said by that.
    named = {name for group in (fields, options, training or {}) for name in group}
    fixed = {name: value for name, value in fields.items() if value is not None}
    known = options_of(kind(**fixed) if fixed else kind)
    own = [name for name in field_names(kind) if name not in (*named, *known)]
    fixed |= {**(defaults or {}), **settings.take(kind, own)}
    given = kind(**fixed) if fixed else kind
    asked = {name: value for name, value in options.items() if value is not None}
    asked |= settings.take(chosen_by(given), [name for name in known if name not in (*named, *_OWN, *own)])
    if training is not None:
        names = [f.name for f in dataclasses.fields(TrainingSettings) if f.name not in (*named, *known)]
        default = {name: value for name, value in training.items() if value is not None}
        asked["settings"] = TrainingSettings(**{**default, **settings.take(TrainingSettings, names)})
    settings.check_none_left(method)
    read: Any = data
    text_field = asked.get("text_field", "text")
    # What embeddings are for is read before the model is.
    if embeddings or (data is not None and "task" in known and is_labelled(data)):
        read = read_task(data, text_field=text_field)
    if "task" in asked:
        asked["task"] = read_task(asked["task"], text_field=text_field)
    loaded: Any
    tokenizer: Any = None
    if read is not data or "task" in asked:
        loaded = load_embedder(model, device, dtype)
    else:
        tokenizer, loaded = load_tokenizer(model), load_model(model, device, dtype)
    if "checkpoint" in known:
        with partial_results(output) as partial:
            plan = slimformer.calibrate(
                loaded, tokenizer, given, data=read, checkpoint=partial, progress=True, **asked
            )
            plan.save_pretrained(output)
    else:
        plan = slimformer.calibrate(loaded, tokenizer, given, data=read, progress=True, **asked)
        plan.save_pretrained(output)
    note(f"The plan is in {output}. slimformer show {output} says more of it, slimformer eval what it costs.")
    found = getattr(report, table)(plan)
    print_tables(*([] if found is None else [found]))
    leave_where_nothing_was_won(plan.measured, "training")

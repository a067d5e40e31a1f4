"""`slimformer calibrate`: find out what a model need not compute, and write the plan."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.commands.embeddings import calibrate_exits, narrow_mlps, sweep_temperatures
from slimformer.cli.output import check_output, note, print_json, print_tables
from slimformer.cli.partial import partial_results


class Method(str, Enum):
    """What is calibrated."""

    drop = "drop"
    elastic = "elastic"
    elimination = "elimination"
    arank = "arank"
    temperature = "temperature"
    narrow = "narrow"


class Selection(str, Enum):
    """How sublayers are chosen."""

    greedy = "greedy"
    cosine = "cosine"


class Kinds(str, Enum):
    """What may be dropped."""

    attention = "attention"
    mlp = "mlp"
    joint = "attention,mlp"
    block = "block"


class Replace(str, Enum):
    """What stands in for a dropped sublayer."""

    nothing = "nothing"
    mean = "mean"
    filter = "filter"


class Budget(str, Enum):
    """How much time calibration may take."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


# Which methods an option does something for; those that are not here apply to all.
_APPLIES: dict[str, tuple[Method, ...]] = {
    "selection": (Method.drop,),
    "kinds": (Method.drop, Method.arank),
    "drop": (Method.drop, Method.arank),
    "max_divergence": (Method.drop, Method.elimination),
    "speedup": (Method.drop,),
    "replace": (Method.drop,),
    "taps": (Method.drop,),
    "layer": (Method.elastic,),
    "max_loss": (Method.elastic, Method.narrow),
    "keep": (Method.narrow,),
    "head": (Method.elastic,),
    "task": (Method.drop,),
    "prompt": (Method.elimination,),
    "budget": (Method.drop,),
    "seed": (Method.drop, Method.elimination, Method.arank),
}


def _check_applicable(
    ctx: typer.Context, method: Method, replace: Replace, data: str | None, task: str | None
) -> None:
    idle = {
        name: f"--method {' or '.join(m.value for m in methods)}, not {method.value}"
        for name, methods in _APPLIES.items()
        if method not in methods
    }
    if method is not Method.drop and task is not None:
        idle["task"] += f"; --method {method.value} takes such a source as --data"
    if method is Method.drop and replace is not Replace.filter:
        idle["taps"] = "--replace filter"
    refuse(ctx, idle)
    refuse_text_field(ctx, data, task)


def calibrate(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    method: Annotated[
        Method,
        typer.Option(
            help="drop: which sublayers can go. elimination: from which layer on which fraction of a long prompt's "
            "tokens can go, within --max-divergence. arank: which layers can be routed, --drop of them. elastic: for "
            "embedding models, the quality of every early exit at every width on --data, which may also be a folder in "
            "BEIR's layout or a .tsv file of pairs. temperature: for embedding models, which temperature is best on "
            "the same --data, or, for text without labels, keeps embeddings of long texts apart. narrow: for embedding "
            "models of BERT's structure, MLPs with as few hidden units as --data allows within --max-loss."
        ),
    ] = Method.drop,
    data: options.Data = None,
    text_field: options.TextField = "text",
    hold_out: Annotated[
        bool, typer.Option(help="Leave every fifth text unread, for `slimformer eval`.")
    ] = True,
    selection: Annotated[
        Selection,
        typer.Option(help="greedy: least divergence from dense; cosine: one pass, most similar first."),
    ] = Selection.greedy,
    kinds: Annotated[
        Kinds,
        typer.Option(help="What may be dropped; attention,mlp chooses among both, block drops whole layers."),
    ] = Kinds.attention,
    drop: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Stop after so many drops.")
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(min=0, show_default=False, help="Stop before the divergence from dense passes this."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(min=1, show_default=False, help="Stop once so many times as fast as dense."),
    ] = None,
    replace: Annotated[
        Replace,
        typer.Option(help="What stands in for a dropped sublayer: nothing, its mean, a fitted filter."),
    ] = Replace.nothing,
    taps: Annotated[int, typer.Option(min=1, help="How many tokens back a filter reads.")] = 4,
    layer: Annotated[
        int | None,
        typer.Option(min=0, show_default=False, help="elastic: the plan's exit, how many layers run."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=False,
            help="elastic, narrow: the lowest exit, or the narrowest MLPs, that lose at most this fraction.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, show_default=False, help="narrow: the fraction of hidden units that stays."
        ),
    ] = None,
    head: Annotated[
        bool, typer.Option(help="elastic: fit a linear head for every exit on the texts.")
    ] = True,
    task: options.Task = None,
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt, for elimination: as many as yours have.")
    ] = 2048,
    budget: Annotated[Budget, typer.Option(help="quick: a minute for a small model.")] = Budget.quick,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Choose what MODEL need not compute and write the plan to the output folder.

    Interrupted with Ctrl-C, it keeps what it has measured: the same command goes on from there
    (--method narrow and --method temperature start anew).
    """
    _check_applicable(ctx, method, replace, data, task)
    if method is Method.narrow:
        if (keep is None) == (max_loss is None):
            raise typer.BadParameter("--method narrow takes either --keep or --max-loss, and no other goal.")
        check_output(output, force)
        narrow_mlps(model, output, data, text_field, keep, max_loss, hold_out, device, dtype.value, as_json)
        return
    if method is Method.elastic:
        if (layer is None) == (max_loss is None):
            raise typer.BadParameter("Say where to exit: give either --layer or --max-loss.")
        check_output(output, force)
        calibrate_exits(
            model, output, data, text_field, layer, max_loss, head, hold_out, device, dtype.value, as_json
        )
        return
    if method is Method.temperature:
        check_output(output, force)
        sweep_temperatures(model, output, data, text_field, hold_out, device, dtype.value, as_json)
        return
    if method is Method.drop and drop is None and max_divergence is None and speedup is None:
        raise typer.BadParameter("Say when to stop: give --drop, --max-divergence or --speedup.")
    if method is Method.arank and "block" in kinds.value:
        raise typer.BadParameter(
            "--method arank takes --drop, the number of layers to route, and --kinds attention or mlp or both."
        )
    if method is Method.elimination and max_divergence is None:
        raise typer.BadParameter("--method elimination takes --max-divergence.")
    check_output(output, force)

    import slimformer
    from slimformer.calibration.elimination import calibrate_elimination
    from slimformer.cli.loading import load_embedder, load_model, load_tokenizer
    from slimformer.evaluation.embedding_tasks import read_task
    from slimformer.report import curve_table, plan_table, router_table
    from slimformer.training.arank import calibrate_arank

    units: Any = tuple(kinds.value.split(","))
    objective = None if task is None else read_task(task, text_field=text_field)
    loaded: Any
    if objective is None:
        tokenizer, loaded = load_tokenizer(model), load_model(model, device, dtype.value)
    else:
        loaded = load_embedder(model, device, dtype.value)
        tokenizer = loaded.tokenizer
    with partial_results(output) as partial:
        common: dict[str, Any] = {
            "data": data,
            "text_field": text_field,
            "hold_out": hold_out,
            "seed": seed,
            "checkpoint": partial,
            "progress": True,
        }
        if max_divergence is not None and method is Method.elimination:
            plan = calibrate_elimination(
                loaded, tokenizer, max_divergence=max_divergence, prompt=prompt, **common
            )
        elif method is Method.arank:
            plan = calibrate_arank(loaded, tokenizer, number=drop, kinds=units, **common)
        else:
            plan = slimformer.calibrate(
                loaded,
                tokenizer,
                selection=selection.value,
                kinds=units,
                drop=drop,
                max_divergence=max_divergence,
                speedup=speedup,
                replace=replace.value,
                taps=taps,
                objective=objective,
                budget=budget.value,
                **common,
            )
        plan.save_pretrained(output)
    note(f"The plan is in {output}.")
    if as_json:
        print_json(plan.to_dict())
    else:
        table = {Method.elimination: curve_table, Method.arank: router_table}.get(method, plan_table)
        print_tables(table(plan))

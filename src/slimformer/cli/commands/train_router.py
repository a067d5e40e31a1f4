"""`slimformer train-router`: learn which tokens may skip a sublayer, and write the plan that routes them."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Annotated, Any

import typer

from slimformer.cli import options, training_options
from slimformer.cli.applicable import refuse_text_field
from slimformer.cli.output import check_output, note, print_json, print_tables
from slimformer.cli.partial import partial_results


class Metric(str, Enum):
    """What layers are chosen by."""

    effective_rank = "effective_rank"
    rank = "rank"
    skip_cost = "skip_cost"


class Kinds(str, Enum):
    """What is routed."""

    attention = "attention"
    mlp = "mlp"
    both = "attention,mlp"


class Shared(str, Enum):
    """What shares a router."""

    sublayer = "sublayer"
    layer = "layer"
    all = "all"


class Routing(str, Enum):
    """How a router decides."""

    threshold = "threshold"
    top_k = "top_k"


class Per(str, Enum):
    """What goes one way."""

    token = "token"
    sequence = "sequence"


def train_router(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    keep: Annotated[float, typer.Option(help="The fraction of tokens computed in what is routed.")] = 0.5,
    number: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="How many layers; or half of those that may be."),
    ] = None,
    metric: Annotated[
        Metric,
        typer.Option(
            help="What layers are chosen by: what skipping them costs, or the rank of their attention maps (ARank)."
        ),
    ] = Metric.skip_cost,
    kinds: Annotated[Kinds, typer.Option(help="What is routed in them.")] = Kinds.attention,
    shared: Annotated[Shared, typer.Option(help="What shares a router.")] = Shared.sublayer,
    routing: Annotated[
        Routing, typer.Option(help="By a threshold, or the best tokens of every text (not for generation).")
    ] = Routing.threshold,
    per: Annotated[
        Per, typer.Option(help="Decide per token, or on whole texts (not for generation).")
    ] = Per.token,
    data: options.Data = None,
    text_field: options.TextField = "text",
    hold_out: training_options.HoldOut = True,
    length: training_options.Length = 1024,
    steps: training_options.Steps = 400,
    rows: training_options.Rows = 1,
    accumulate: training_options.Accumulate = 1,
    learning_rate: training_options.LearningRate = 5e-3,
    precision: training_options.PrecisionOption = training_options.Precision.no,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Choose layers of MODEL and train routers for them; its own weights stay as they are.

    Interrupted with Ctrl-C, it keeps a checkpoint: the same command goes on from there. Several GPUs: run it under
    `accelerate launch`.
    """
    refuse_text_field(ctx, data)
    check_output(output, force)

    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.methods.mixture_of_depths import MixtureOfDepths
    from slimformer.report import router_table
    from slimformer.training.arank import calibrate_arank
    from slimformer.training.routers import train_routers

    settings = training_options.training_settings(steps, rows, accumulate, learning_rate, precision, seed)
    chosen: Any = tuple(kinds.value.split(","))
    how: dict[str, Any] = {
        "keep": keep,
        "shared": shared.value,
        "routing": routing.value,
        "per": per.value,
    }
    # Refused before the model is loaded.
    MixtureOfDepths.keeping_everything(1, **how, mlp=[0])
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, device, dtype.value)
    common: dict[str, Any] = {"data": data, "text_field": text_field, "hold_out": hold_out, "length": length}
    with partial_results(output) as partial:
        ranked = calibrate_arank(
            loaded,
            tokenizer,
            number=number,
            kinds=chosen,
            metric=metric.value,
            keep=keep,
            seed=seed,
            checkpoint=partial,
            progress=True,
            **common,
        )
        layers = {kind: getattr(ranked.methods[0], kind) for kind in chosen}
        method = MixtureOfDepths.keeping_everything(
            loaded.config.get_text_config().hidden_size, **how, **layers
        )
        plan = train_routers(
            loaded, tokenizer, method=method, settings=settings, checkpoint=partial, progress=True, **common
        )
        chosen_by = {name: ranked.provenance[name] for name in ("arank", "layers_by")}
        plan = replace(plan, provenance={**plan.provenance, **chosen_by})
        plan.save_pretrained(output)
    note(f"The plan is in {output}.")
    if as_json:
        print_json(plan.to_dict())
    else:
        print_tables(router_table(plan))

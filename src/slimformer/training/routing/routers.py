"""Train routers beside the frozen model, to say what skipping would cost its predictions."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.mixture_of_depths import MixtureOfDepths
from slimformer.model.anatomy import transformer_of
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages
from slimformer.text.rows import examples, rows_of_examples, training_rows
from slimformer.text.sources import check_token_ids
from slimformer.training.attempts.attempts import Watched, attempted
from slimformer.training.loop import TrainingSettings, frozen, seeded
from slimformer.training.routing.arank import LayerOrder, calibrate_arank
from slimformer.training.routing.routed_model import Batch, Routed

_HELD_OUT_ROWS = 8
# What routers read is standardised, so that one rate suits every model.
_RATE = 5e-3
# Rows that tell whether anything was learnt, of those that are held out.
_JUDGED = 4

_logger = logging.getLogger("slimformer")


def learn_routing(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: MixtureOfDepths | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[str] | Sequence[Mapping[str, Tensor]] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    number: int | None = None,
    kinds: Sequence[Kind] = ("attention",),
    metric: LayerOrder = "skip_cost",
    texts: int = 16,
    length: int = 1024,
    train: bool = True,
    settings: TrainingSettings | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose the layers to route, unless the method names them, and train their routers.

    Args:
        model: An unpatched decoder or encoder; its weights stay as they are.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        method: How they route, such as `MixtureOfDepths(keep=0.5)`; None for its defaults. One that names layers, as
            `MixtureOfDepths.keeping_everything` makes it, gets routers for those.
        data: As for `learn_routers`.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Set thresholds and measure on every fifth text, which is not trained on; without, on the last rows.
        number: How many layers; None takes half of those that may be.
        kinds: What is routed in them.
        metric: What layers are chosen by, as for `calibrate_arank`.
        texts: How many texts they are chosen on.
        length: Tokens per text.
        train: Whether the routers are trained; without, they keep every token.
        settings: How long and how fast.
        seed: Instead of that of the settings.
        checkpoint: A folder for partial results. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan; `plan.provenance["arank"]` has what layers were chosen by.

    Raises:
        CalibrationError: If the method names layers and there is nothing to do, or for the reasons of
            `calibrate_arank` and `learn_routers`.
        DataError: If the text is too short.
        PlanError: If the method does not fit the model.
    """
    settings = seeded(settings or TrainingSettings(), seed)
    method = MixtureOfDepths() if method is None else method
    common: dict[str, Any] = {"data": data, "text_field": text_field, "hold_out": hold_out, "length": length,
                              "checkpoint": checkpoint, "progress": progress}  # fmt: skip
    if method.sublayers:
        if not train:
            raise CalibrationError(
                "The MixtureOfDepths names its layers, and train=False would leave its routers as they are. Patch it "
                "as it is, or name no layers."
            )
        return learn_routers(model, tokenizer, method, settings=settings, **common)
    # Read twice: to choose layers, and to train their routers.
    if isinstance(data, str) and data == "-":
        raise DataError(
            "Layers are chosen and routers are trained on the same text, and standard input can be read once. Give a "
            "file, a dataset or a list of strings."
        )
    again: dict[str, Any] = {}
    if isinstance(data, Iterator):
        common["data"], again["data"] = itertools.tee(data)
    ranked = calibrate_arank(
        model,
        tokenizer,
        number=number,
        kinds=kinds,
        keep=method.keep,
        metric=metric,
        texts=texts,
        seed=settings.seed,
        **common,
    )
    (found,) = ranked.methods
    layers = {kind: getattr(found, kind) for kind in KINDS}
    hidden = known_anatomy(model).stack.config.hidden_size
    given = {f.name: getattr(method, f.name) for f in fields(method) if f.name not in (*KINDS, "weights")}
    routed = MixtureOfDepths.keeping_everything(hidden, **given, **layers)
    if not train:
        return replace(ranked, methods=[routed])
    plan = learn_routers(model, tokenizer, routed, settings=settings, **{**common, **again})
    chosen_by = {name: ranked.provenance[name] for name in ("arank", "layers_by")}
    return replace(plan, provenance={**plan.provenance, **chosen_by})


def learn_routers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    method: MixtureOfDepths,
    *,
    data: str | os.PathLike[str] | Iterable[str] | Sequence[Mapping[str, Tensor]] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    length: int = 1024,
    settings: TrainingSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Train the routers of a method, and make the plan that routes by them.

    A router learns to say the logarithm of what skipping a sublayer costs at a token: its part of the divergence from
    the dense model, to second order, of which one backward pass through the dense model gives an unbiased estimate for
    all sublayers and tokens at once. (Straight-through gates, as in SkipGPT and Router-Tuning, follow the first
    derivative, in which the cost of skipping a token is not contained.) Costs compare across sublayers, so that one
    budget serves all of them: in the end one quantile of the scores on held-out text is the threshold.

    Args:
        model: An unpatched decoder or encoder; its weights stay as they are.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        method: What is routed and to which keep ratio, with any routers, such as `calibrate_arank` makes.
        data: As for `slimformer.calibrate`; its texts are read one behind the other. For a vision-language model, a
            list of what its processor makes of images with text: `input_ids`, `pixel_values` and so on, one or more
            texts in each.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Set thresholds and measure on every fifth text, which is not trained on; without, on the last rows.
        length: Tokens per row.
        settings: How long and how fast.
        checkpoint: A folder for checkpoints. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan. `plan.measured["routers"]` has the divergence and the keep ratio of every routed sublayer on held-out
        text; `plan.measured["training"]` says whether the routers learnt anything (`won`): where they did not, the
        learning rate was lowered three times.

    Raises:
        CalibrationError: If the model is patched, or training fails.
        DataError: If the text is too short.
        PlanError: If the method does not fit the model.
    """
    settings = settings or TrainingSettings()
    if settings.learning_rate == "auto":
        settings = replace(settings, learning_rate=_RATE)
    if status(model):
        raise CalibrationError(
            "The model is patched; routers learn from the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), known_anatomy(model)
    method.decisions(anatomy)
    batches = examples(data)
    if batches is not None:
        (read, held_out), source, tokens = rows_of_examples(batches), f"{len(batches)} batches", 0
    else:
        if method.tokens == "image":
            raise DataError(
                "Routers of image tokens learn from images with text: give data as a list of what the model's "
                "processor makes of them, with input_ids and pixel_values."
            )
        tokenizer = tokenizer or tokenizer_of(model)
        tokens = min(length, longest(anatomy, tokenizer))
        read, held_out, source = training_rows(
            tokenizer,
            data,
            text_field=text_field,
            hold_out=hold_out,
            tokens=tokens,
            count=settings.rows_read,
            seed=settings.seed,
            held_out=_HELD_OUT_ROWS,
        )
        check_token_ids(torch.cat([read, held_out]), anatomy.stack)

    def of(rows: Tensor) -> list[Batch]:
        return [{"input_ids": rows}] if batches is None else [batches[int(row)] for row in rows]

    with evaluating(inner), frozen(inner), Stages(progress) as stages:
        routed = Routed(inner, anatomy, method)
        torch.manual_seed(settings.seed)
        routers = routed.fresh_routers(of(read[:1])[0])

        def loss(module: nn.Module, rows: Tensor) -> Tensor:
            return routed.loss(module, of(rows))

        identity = {
            "data": source,
            "model": fingerprint(inner),
            "method": method.settings(),
            "text": [text_field, hold_out],
            "tokens": tokens,
            "settings": vars(settings),
        }
        kept = [batch for row in held_out.split(1) for batch in of(row)]

        def judged() -> float:
            # The same draws every time, and none that training would have had.
            with (
                torch.random.fork_rng([inner.device] if inner.device.type == "cuda" else []),
                torch.no_grad(),
            ):
                torch.manual_seed(settings.seed)
                return float(torch.stack([routed.loss(routers, [batch]) for batch in kept[:_JUDGED]]).mean())

        done = attempted(
            routers,
            loss,
            read,
            settings,
            Watched(judged, judged, every=settings.steps),
            identity=identity,
            folder=checkpoint,
            stages=stages,
        )
        if not done.won:
            _logger.warning("Training won nothing: the routers tell tokens apart no better than before it.")
        routed.meet_budget(routers, kept)
        measured = routed.measure(routers, stages.track(kept, "held-out text"))
    provenance = {
        **versions(anatomy),
        "arguments": {"length": tokens, "hold_out": hold_out, **vars(settings)},
        "data": source,
        "tokens": read.numel() if batches is None else sum(batch["input_ids"].numel() for batch in batches),
        "losses": done.history.losses,
        "learning_rate": done.learning_rate,
        **({"failed": done.failed} if done.failed else {}),
    }
    trained = replace(method, weights={name: tensor.cpu() for name, tensor in routers.tensors().items()})
    return Plan([trained], fingerprint(inner), provenance, {"routers": measured, "training": done.measured()})


def train_routers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: MixtureOfDepths,
    **options: Any,
) -> Plan:
    """Deprecated: `slimformer.calibrate` with a `MixtureOfDepths` that names its layers."""
    warnings.warn(
        "train_routers is deprecated. Call slimformer.calibrate(model, tokenizer, method, data=...).",
        DeprecationWarning,
        stacklevel=2,
    )
    return learn_routers(model, tokenizer, method, **options)

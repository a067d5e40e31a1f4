"""ARank: how much a layer's attention maps say; layers that say little can be routed (γ-MoD, arXiv 2410.13859)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.calibration.drops.replay import Call, executors, record_call, run_layer
from slimformer.errors import CalibrationError, DataError, UnsupportedModelError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest
from slimformer.examination.layers import examine_layers, row_sublayers
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.mixture_of_depths import MixtureOfDepths
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.rows.attention import RowAttention
from slimformer.rows.stream import Stream
from slimformer.text.held_out import split_texts
from slimformer.text.progress import Stages
from slimformer.text.rows import examples
from slimformer.text.sources import characters_for, check_token_ids, load_texts, token_blocks
from slimformer.training.loop import frozen
from slimformer.training.routing.routed_model import Routed

Metric = Literal["effective_rank", "rank"]
LayerOrder = Literal["effective_rank", "rank", "skip_cost"]
# The paper leaves these alone.
FIRST_LAYERS, LAST_LAYERS = 3, 1
QUERIES = 256


def attention_ranks(weights: Tensor, queries: Tensor, metric: Metric) -> Tensor:
    """The rank of every head's attention map, of which some rows are given.

    Args:
        weights: Softmax weights `[batch, heads, asking, tokens]`, float32.
        queries: Which token each row asks for `[asking]`; what a token pays to itself is left out, as in the paper.
        metric: `"effective_rank"`: the exponential of the entropy of the singular values, as parts of their sum.
            `"rank"`: how many are above float32's rounding, the published one; a causal map is of full rank but for
            rounding, so that it says how dominant the largest is.

    Returns:
        Float64 `[batch, heads]`.

    Example:
        >>> attention_ranks(torch.full((1, 1, 4, 8), 1 / 8), torch.arange(4, 8), "effective_rank") < 4
        tensor([[True]])
    """
    rows = weights.scatter(-1, queries[:, None].expand(*weights.shape[:2], -1, 1), 0.0).double()
    # Singular values from the small side: no map of all tokens by all tokens is decomposed.
    sigma = torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0.0).sqrt()
    if metric == "rank":
        least = max(weights.shape[-2:]) * torch.finfo(torch.float32).eps * sigma[..., -1:]
        return (sigma > least).sum(-1).double()
    part = sigma / sigma.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(part).sum(-1).exp()


def layer_ranks(
    anatomy: Anatomy,
    rows: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    model: PreTrainedModel | None = None,
    metric: Metric = "effective_rank",
    queries: int | None = QUERIES,
    layers: int | None = None,
) -> list[float]:
    """ARank of every layer: the mean over heads and texts.

    Args:
        anatomy: An unpatched model's.
        rows: Token ids `[texts, tokens]`, a batch at a time; or all inputs of a model that reads images too.
        model: What reads those; None for the stack that holds the layers.
        metric: As in `attention_ranks`.
        queries: How many rows of a map are read, spread over the later half of the text; None for all rows.
        layers: Only so many of the first layers; None for all.

    Raises:
        UnsupportedModelError: If a layer's queries and keys are not known.
    """
    attentions = _attentions(anatomy)[:layers]
    total, count = [0.0] * len(attentions), 0
    for batch in rows:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        call = record_call(anatomy, given, None if model is None else model.base_model)
        run, hidden = executors(anatomy, {}), call.hidden
        tokens = hidden.shape[1]
        first = 0 if queries is None else tokens // 2
        asking = torch.linspace(first, tokens - 1, min(queries or tokens, tokens - first)).round().long()
        count += len(hidden)
        for index, attention in enumerate(attentions):
            weights = _weights(anatomy, attention, index, call, hidden, asking.to(hidden.device))
            ranks = attention_ranks(weights, asking.to(hidden.device), metric)
            total[index] += float(ranks.mean(1).sum())
            hidden = run_layer(run[index], call, hidden, index)
    return [value / count for value in total]


def layer_costs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: Tensor | Mapping[str, Tensor],
    kinds: Sequence[Kind],
) -> list[float]:
    """What skipping these sublayers of a layer for all tokens would add to the divergence, in nats per token."""
    every = dict.fromkeys(kinds, range(len(anatomy.layers)))
    method = MixtureOfDepths.keeping_everything(anatomy.stack.config.hidden_size, **every)
    routed = Routed(model, anatomy, method)
    with frozen(model):
        lesson = routed.lesson(routed.call({"input_ids": batch} if isinstance(batch, Tensor) else batch))
    costs = [0.0] * len(anatomy.layers)
    for (_, layer), cost in zip(routed.names, lesson.costs, strict=True):
        # Lessons hold twice the divergence.
        costs[layer] += float(cost[lesson.free].mean()) / 2
    return costs


def lowest(ranks: Sequence[float], number: int) -> list[int]:
    """So many layers with the lowest ranks, sorted, without the first three and the last.

    Example:
        >>> lowest([1, 1, 1, 9, 4, 5, 6, 1], 2)
        [4, 5]
    """
    free = range(FIRST_LAYERS, len(ranks) - LAST_LAYERS)
    return sorted(sorted(free, key=lambda index: ranks[index])[:number])


def calibrate_arank(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    number: int | None = None,
    kinds: Sequence[Literal["attention", "mlp"]] = ("attention",),
    keep: float = 0.5,
    metric: LayerOrder = "effective_rank",
    data: str | os.PathLike[str] | Iterable[str] | Sequence[Mapping[str, Tensor]] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    length: int = 1024,
    texts: int = 16,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose the layers to route, and make a plan whose routers keep every token until they are trained.

    Args:
        model: An unpatched decoder or encoder; it is left as it was.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        number: How many layers; None takes half of those that may be.
        kinds: What is routed in them.
        keep: The fraction of tokens that routers are to be trained for.
        metric: `"effective_rank"`, or the published `"rank"`; or `"skip_cost"`, which reads no maps: the part of the
            divergence from dense that skipping all tokens would bring, to second order, as training routers estimates
            it.
        data: As for `slimformer.calibrate`; its texts are read one behind the other. For a vision-language model, a
            list of what its processor makes of images with text.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Leave every fifth text alone, so that `slimformer eval` can measure on it.
        length: Tokens of a text.
        texts: How many are read.
        seed: Which of the text is read.
        checkpoint: A folder for partial results. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan; `plan.provenance["arank"]` has the rank, or the cost, of every layer.

    Raises:
        CalibrationError: If the model is patched, or an argument is not one of those allowed.
        PlanError: If the keep ratio is not one of those allowed.
        DataError: If the text is too short.
        UnsupportedModelError: If a layer's queries and keys are not known.
    """
    # Refused before anything is computed.
    MixtureOfDepths.keeping_everything(1, keep=keep, attention=[0])
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), known_anatomy(model)
    most = len(anatomy.layers) - FIRST_LAYERS - LAST_LAYERS
    if most < 1:
        raise CalibrationError(
            f"The model has {len(anatomy.layers)} layers, of which the first {FIRST_LAYERS} and the last are never "
            "routed."
        )
    wanted = max(most // 2, 1) if number is None else number
    if not 1 <= wanted <= most:
        raise CalibrationError(f"number must be from 1 to {most}, got {number!r}.")
    if not kinds or set(kinds) - set(KINDS):
        raise CalibrationError(f"kinds must be some of {', '.join(KINDS)}, got {tuple(kinds)!r}.")
    if metric not in get_args(LayerOrder):
        raise CalibrationError(f"metric must be one of {', '.join(get_args(LayerOrder))}, got {metric!r}.")
    rows: Sequence[Tensor | Mapping[str, Tensor]] | None = examples(data)
    source, tokens = f"{len(rows or ())} batches", 0
    if rows is None:
        tokenizer = tokenizer or tokenizer_of(model)
        tokens = min(length, longest(anatomy, tokenizer))
        found, source = load_texts(
            os.fspath(data) if isinstance(data, os.PathLike) else data,  # type: ignore[arg-type]
            text_field=text_field,
            enough=characters_for(texts * tokens),
        )
        read = split_texts(found)[0] if hold_out else found
        blocks = token_blocks(read, tokenizer, sequence_length=tokens, count=texts, seed=seed)
        check_token_ids(blocks, inner)
        rows = blocks.split(1)
        if not len(blocks):
            raise DataError(
                f"ARank needs a text of {tokens} tokens, and {source} gives fewer. Give more text."
            )
    identity = {
        "data": source,
        "model": fingerprint(inner),
        "arank": [metric, list(kinds), tokens, texts, seed, text_field, hold_out],
    }
    partial = PartialResults(checkpoint, identity)
    with evaluating(inner), Stages(progress) as stages:
        done = list(partial.kept("ranks") or [])
        reads = inner if tokens == 0 else None
        for row in stages.track(list(rows[len(done) :]), "layers"):
            if metric == "skip_cost":
                # An estimate by chance, the same for a row whether the run was interrupted before it or not.
                torch.manual_seed(seed + len(done))
                done.append(layer_costs(inner, anatomy, row, kinds))
            else:
                done.append(layer_ranks(anatomy, [row], model=reads, metric=metric))
            partial.keep("ranks", done)
    ranks = [sum(column) / len(done) for column in zip(*done, strict=True)]
    chosen = lowest(ranks, wanted)
    method = MixtureOfDepths.keeping_everything(
        anatomy.stack.config.hidden_size, keep=keep, **dict.fromkeys(kinds, chosen)
    )
    provenance = {
        **versions(anatomy),
        "arguments": {"number": wanted, "kinds": list(kinds), "metric": metric, "length": tokens, "seed": seed,
                      "hold_out": hold_out},
        "data": source,
        "tokens": sum((row if isinstance(row, Tensor) else row["input_ids"]).numel() for row in rows),
        "arank": ranks,
        "layers_by": metric,
    }  # fmt: skip
    return Plan([method], fingerprint(inner), provenance)


def _attentions(anatomy: Anatomy) -> list[RowAttention]:
    known = examine_layers(anatomy)
    found = []
    for index, layer in enumerate(anatomy.layers):
        attention = row_sublayers(anatomy, index, known[index]).attention
        if attention is None:
            raise UnsupportedModelError(
                f"The attention of layer {index}, {type(layer).__name__}, has projections that are not known, so that "
                "its maps cannot be read."
            )
        found.append(attention)
    return found


def _weights(
    anatomy: Anatomy, attention: RowAttention, index: int, call: Call, hidden: Tensor, asking: Tensor
) -> Tensor:
    structure, layer = anatomy.structure, anatomy.layers[index]
    h = structure.heads_input(layer, hidden)
    stream = Stream.of(hidden, anatomy.causal, call.arguments[index])
    batch, tokens = hidden.shape[:2]
    real = call.real
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device)
    return attention.weights(h.flatten(0, 1), stream, asking.expand(batch, -1), real)

"""What else may go before sublayers are dropped: tokens of long prompts, hidden units of MLPs, the last layers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from slimformer.cache.slots import counting_slot
from slimformer.calibration.elimination import CUE, Trial
from slimformer.calibration.exit_heads import fit_exits
from slimformer.calibration.narrow_mlps import KEEPS, NarrowFit, units_of
from slimformer.errors import CalibrationError, UnsupportedModelError
from slimformer.evaluation.perplexity import evaluating
from slimformer.examination.tiers import Support
from slimformer.methods.elimination.token_elimination import TokenElimination
from slimformer.optimization.measuring.costs import Costs, Meter
from slimformer.optimization.measuring.losses import LONG_PROMPTS, Losses
from slimformer.optimization.units import Base, Unit
from slimformer.patching import patched

# Parts of the depth from which on tokens leave, and the parts of them that stay.
_FROM, _KEEP = (1 / 3, 1 / 2, 2 / 3, 5 / 6), (0.5, 0.2)
_ANSWER = 32
# Of shorter prompts no passage is asked from further up.
_SHORTEST = 6 * (_ANSWER + CUE)
# A schedule that loses more than this on long prompts, in nats, is not combined with anything, nor is a narrower one.
_FARTHEST = 1.0
_FEWEST_TEXTS = 16


class Option(NamedTuple):
    """What a base could be, before it is measured."""

    name: str
    methods: tuple[Any, ...]
    touched: tuple[Unit, ...]
    whole: frozenset[Unit]


def plain(costs: Costs) -> Base:
    """The whole model."""
    return Base("", (), costs.plain)


def elimination_options(support: Support, units: Sequence[Unit], prompt: int) -> list[Option]:
    """Schedules of one step, where the prompt is long enough for tokens to leave."""
    if support.tier != "rows" or prompt < max(TokenElimination().least, _SHORTEST):
        return []
    count, types = len(support.anatomy.layers), support.anatomy.layer_types
    # Positions are counted at one attention, which has to stay, and to see every token.
    counting = support.slots([]).index(counting_slot(types))
    whole = frozenset(unit for unit in units if unit[0] != "mlp" and unit[1] == counting)
    layers = sorted({max(round(count * part), counting + 1) for part in _FROM})
    found = []
    for layer in (layer for layer in layers if layer < count):
        touched = tuple(unit for unit in units if unit[1] >= layer)
        for keep in _KEEP:
            method = TokenElimination({layer: keep})
            found.append(Option(f"{keep:.0%} of the tokens from layer {layer}", (method,), touched, whole))
    return found


def measured_eliminations(
    options: Sequence[Option], losses: Losses, meter: Meter, costs: Costs, rows: Tensor, allowance: float
) -> Iterator[Base]:
    """Each option with its loss on answers behind long prompts; of those that lose too much no stronger one is tried.

    Args:
        options: From `elimination_options`, the gentler one of a layer first.
        losses: Of the mixture.
        meter: Measures costs.
        costs: Of the whole model.
        rows: Prompts with their answers `[rows, tokens]`; every other answer is asked from further up.
        allowance: Seconds for the timing of each.
    """
    model: PreTrainedModel = losses.model
    if not options:
        return
    with evaluating(model):
        trials = [Trial.of(model, row, _ANSWER, number % 2 == 1) for number, row in enumerate(rows)]
        too_far: set[tuple[Unit, ...]] = set()
        for option in options:
            if option.touched in too_far:
                continue
            with patched(model, *option.methods):
                lost = sum(trial.divergence(model) for trial in trials) / len(trials)
            if lost > _FARTHEST:
                too_far.add(option.touched)
                continue
            base = meter.base(costs, option.name, option.methods, option.touched, allowance, option.whole)
            yield dataclasses.replace(base, losses={LONG_PROMPTS: lost})


def answer_tokens() -> int:
    """Tokens of an answer behind a long prompt."""
    return _ANSWER


def encoder_options(
    model: Any,
    support: Support,
    units: Sequence[Unit],
    texts: Sequence[str],
    queries: Sequence[str],
    most: int,
) -> Iterator[Option]:
    """Narrow MLPs of every width of `KEEPS`, and exits before the last layers, where the model takes them.

    Args:
        model: A SentenceTransformer, or an encoder without pooling, to which only exits without a head apply.
        support: What is known of its layers.
        units: What may be dropped.
        texts: What is fitted on.
        queries: Texts that are asked with.
        most: How many texts are read at most.
    """
    if support.tier != "rows":
        return
    pipeline = hasattr(model, "encode") and importlib.util.find_spec("sentence_transformers") is not None
    count = len(support.anatomy.layers)
    exits = [layer for layer in sorted({count - 1, count - 2, round(count * 2 / 3), count // 2}) if layer > 0]
    heads: Mapping[int, Any] = {}
    if pipeline:
        # A pooling that no head passes through has none.
        with contextlib.suppress(CalibrationError):
            heads = fit_exits(model, list(texts[:most]), exits)
    for layer, method in sorted(heads.items(), reverse=True):
        above = frozenset(unit for unit in units if unit[1] >= layer)
        yield Option(f"exit at layer {layer}", (method,), (), above)
    if not pipeline:
        return
    mlps = tuple(unit for unit in units if unit[0] == "mlp")
    try:
        # Every width is fitted in turn, so that each has a part of the text.
        part = max(most // len(KEEPS), _FEWEST_TEXTS)
        fitting = NarrowFit(model, list(texts[:part]), list(queries[:part]))
        for keep in KEEPS:
            yield Option(
                f"{keep:.0%} of the hidden units",
                (fitting.fit(units_of(model, keep)),),
                mlps,
                frozenset(mlps),
            )
    except (CalibrationError, UnsupportedModelError):
        # Not BERT's MLPs, or a pooling that no head passes through.
        return

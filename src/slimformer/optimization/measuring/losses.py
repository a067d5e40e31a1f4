"""How far a model is from dense without some of its parts, on every source of a mixture of text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drops.budgets import Budget
from slimformer.calibration.drops.calibration_text import CalibrationText, read_mixture, read_text
from slimformer.calibration.drops.fitting import fit_together
from slimformer.calibration.drops.replay import saved_weights
from slimformer.calibration.drops.search import sublayers_of
from slimformer.calibration.mixture.sources import COPYING
from slimformer.decisions.replacements import Replace
from slimformer.errors import CalibrationError
from slimformer.evaluation.divergence import DenseReference
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import predicts_tokens
from slimformer.evaluation.similarity_task import masked_mean
from slimformer.examination.tiers import Support
from slimformer.methods.layer_drop import LayerDrop
from slimformer.optimization.units import Unit, drop_of
from slimformer.patching import patched
from slimformer.text.progress import Stages

LONG_PROMPTS = "long prompts"
# The part of the mean over sources that long prompts have, where they are read.
_LONG_SHARE = 0.25
# The part of the minutes in which all units are judged once, and multiplications per second in it, well below what
# such devices do. Sizes are computed and not measured, so that the same call reads the same text.
_SHARE, _PER_SECOND = 0.25, {"cuda": 2.0e13, "cpu": 2.0e10}
# A machine that is so much slower than that, since others use it too, reads less text: the minutes are kept.
_PATIENCE = 1.5
_LENGTHS = {"cuda": 512, "cpu": 128}
_ROWS, _SHORTEST = (2, 16), 64
# Rows that replacements are fitted on.
_FITTED = {"cuda": 48, "cpu": 16}


def sizes_for(
    model: Any, units: int, sources: int, minutes: float, longest: int, fitting: bool = False
) -> Budget:
    """How much text every unit is judged on, from what there is time for.

    Args:
        model: The model.
        units: How many there are.
        sources: How many sources.
        minutes: In all.
        longest: Most tokens that the model reads.
        fitting: Whether replacements are fitted, on more of it.
    """
    device = model.device.type if model.device.type in _PER_SECOND else "cpu"
    weights = sum(parameter.numel() for parameter in model.parameters())
    # Half of the layers run again for a unit, on average, and all of the head.
    tokens = _SHARE * 60 * minutes * _PER_SECOND[device] / (0.6 * weights * max(units, 1))
    length = min(max(int(tokens / sources / _ROWS[0]), _SHORTEST), _LENGTHS[device], longest)
    rows = min(max(int(tokens / length / sources), _ROWS[0]), _ROWS[1])
    # Of one source, a quarter of the rows is judged by.
    fitted = _FITTED[device] if fitting else 0
    final = 3 * rows + sources * fitted if fitting else 3 * rows
    return Budget(length, similarity=0, judged=rows if sources == 1 else 2 * rows, fitted=fitted, final=final,
                  pool=None)  # fmt: skip


@dataclass
class Losses:
    """The dense model on some rows, and what others make of them.

    Attributes:
        model: The model, unpatched.
        support: What is known of its layers.
        text: What is read.
        shares: How much each source counts in the mean, 1 in all.
    """

    model: PreTrainedModel
    support: Support
    text: CalibrationText
    shares: dict[str, float]
    _batches: list[dict[str, Tensor]] = field(default_factory=list, init=False)
    _dense: Any = field(default=None, init=False)
    _took: float = field(default=0.0, init=False)

    @classmethod
    def read(
        cls,
        model: PreTrainedModel,
        support: Support,
        tokenizer: PreTrainedTokenizerBase,
        data: Any,
        *,
        sizes: Budget,
        text_field: str,
        hold_out: bool,
        seed: int,
        cache: str | os.PathLike[str] | None,
        long_prompts: bool,
        stages: Stages,
    ) -> Losses:
        """Read the text and run the dense model over it.

        Raises:
            DataError: If the text cannot be read, or is too short.
            CalibrationError: If the model writes nothing, or computes NaN.
        """
        if predicts_tokens(model, support.anatomy):
            text = read_mixture(
                model, support.anatomy, tokenizer, data, text_field, hold_out, sizes, seed, fitting=sizes.fitted > 0,
                cache=cache, stages=stages,
            )  # fmt: skip
            shares = dict(text.shares)
        else:
            text = read_text(model, support.anatomy, tokenizer, data, text_field, hold_out, sizes, seed)
            shares = {"": 1.0}
        if long_prompts:
            shares = {name: (1 - _LONG_SHARE) * share for name, share in shares.items()}
            shares[LONG_PROMPTS] = _LONG_SHARE
        return cls.recorded(model, support, text, shares)

    @classmethod
    def recorded(
        cls, model: PreTrainedModel, support: Support, text: CalibrationText, shares: dict[str, float]
    ) -> Losses:
        """Run the dense model over text that was read."""
        found = cls(model, support, text, shares)
        found._record()
        return found

    @property
    def name(self) -> str:
        """What is measured."""
        if isinstance(self._dense, DenseReference):
            return "KL to dense, nats per token"
        return "1 - cosine to the dense embedding"

    @property
    def rows_each(self) -> int:
        """How many rows of every source are judged by, of that which has fewest; 0 where text has no sources."""
        rows = list(self.text.sources)
        return min((rows.count(source) for source in set(rows)), default=0)

    def fit_into(self, units: int, minutes: float) -> None:
        """Read less where judging every unit would take far longer than it should, by what the dense model took.

        Args:
            units: How many there are.
            minutes: In all.
        """
        each = self.rows_each
        allowed, expected = _PATIENCE * _SHARE * 60 * minutes, 0.6 * units * self._took
        if each >= 2 and expected > allowed:
            self.keep_rows(max(int(each * allowed / expected), 1))

    def keep_rows(self, each: int) -> None:
        """Judge by so many rows of every source at most."""
        rows = self.text.sources
        places = [place for place, source in enumerate(rows) if list(rows[:place]).count(source) < each]
        self.text = dataclasses.replace(
            self.text,
            # What replacements are fitted on lies behind.
            rows={
                name: torch.cat([tensor[places], tensor[len(rows) :]])
                for name, tensor in self.text.rows.items()
            },
            sources=[rows[place] for place in places],
        )
        self._record()

    def alone(
        self,
        units: Sequence[Unit],
        known: Mapping[Unit, Mapping[str, float]],
        advance: Callable[[int], None],
        replace: Replace = "nothing",
        taps: int = 1,
    ) -> dict[Unit, Mapping[str, float]]:
        """What each unit costs when it alone goes; those of the first tier are run from their layer on.

        Args:
            units: All of them.
            known: What an earlier call has measured.
            advance: Called after each, with their number; what it raises ends the measuring.
            replace: What each leaves behind, in models of the first tier.
            taps: How many inputs the filter of an attention reads.
        """
        found = dict(known)
        left = [unit for unit in units if unit not in known]
        if not left:
            return found
        if self.support.tier == "rows":
            search = self.text.search(replace, taps, advance)
            search.judge_alone(left)
            return found | search.singles
        for unit in left:
            found[unit] = self.of((drop_of([unit]),))
            advance(len(left))
        return found

    def fitted(self, units: Sequence[Unit], replace: Replace, taps: int) -> LayerDrop:
        """The method that drops units, with what they leave behind fitted together."""
        dropped = [sublayer for unit in units for sublayer in sublayers_of(*unit)]
        with evaluating(self.model):
            found = fit_together(self.support.anatomy, self.text.fitting_calls(), dropped, replace, taps)
        return drop_of(units, replace, taps if replace == "filter" else 1, saved_weights(found))

    def of(self, methods: tuple[Any, ...]) -> dict[str, float]:
        """What methods cost together, patched as they will be."""
        with patched(self.model, *methods) if methods else contextlib.nullcontext(), evaluating(self.model):
            found = self._predictions() if isinstance(self._dense, DenseReference) else self._embeddings()
        for value in found.values():
            if not math.isfinite(value):
                raise CalibrationError(
                    "The divergence is not a number: the model computes NaN on this text. Check the checkpoint, or "
                    "load it in bfloat16 or float32 instead of float16."
                )
        return {name: found.get(name, 0.0) for name in self.shares}

    def scalar(self, losses: Mapping[str, float]) -> float:
        """What is minimised: half of the mean over the sources, and half of the worst."""
        mean = sum(share * losses.get(name, 0.0) for name, share in self.shares.items())
        return (mean + max(losses.values(), default=0.0)) / 2

    def vector(self, losses: Mapping[str, float]) -> Tensor:
        """The same of every source, in order `[sources]`."""
        return torch.tensor([losses.get(name, 0.0) for name in self.shares], dtype=torch.float64)

    def _record(self) -> None:
        rows = {name: tensor[: self.text.judged] for name, tensor in self.text.rows.items()}
        count = max(2048 // rows["input_ids"].shape[1], 1)
        parts = zip(*(tensor.split(count) for tensor in rows.values()), strict=True)
        device = self.support.anatomy.stack.device
        self._batches = [
            {name: tensor.to(device) for name, tensor in zip(rows, part, strict=True)} for part in parts
        ]
        begun = time.monotonic()
        with evaluating(self.model):
            if predicts_tokens(self.model, self.support.anatomy):
                self._dense = DenseReference.record(self.model, rows["input_ids"], device=device)
            else:
                self._dense = self._embedded()
        self._took = time.monotonic() - begun

    def _predictions(self) -> dict[str, float]:
        found: dict[str, list[Tensor]] = {}
        row = 0
        for batch in self._batches:
            for logits in self.model(**batch, use_cache=False).logits:
                source = self.text.sources[row]
                each = self._dense.divergences(logits, row)
                # The first run of a sequence that repeats is noise to any model.
                each = each[len(each) // 2 :] if source == COPYING else each
                found.setdefault(source, []).append(each.mean())
                row += 1
        return {source: float(torch.stack(of).mean()) for source, of in found.items()}

    def _embeddings(self) -> dict[str, float]:
        cosine = F.cosine_similarity(self._dense, self._embedded(), dim=-1)
        return {"": 1.0 - float(cosine.mean())}

    def _embedded(self) -> Tensor:
        found = []
        for batch in self._batches:
            output = self.support.anatomy.stack(**batch).last_hidden_state
            found.append(masked_mean(output, batch["attention_mask"]).float())
        return torch.cat(found)

"""Fit narrow MLPs in closed form: which hidden units stay, and least squares for what stands around them.

Units go as in ZipLM (arXiv 2302.04089): the next to go is the one whose loss costs least once all weights behind it are
solved anew, which the inverse of one Gram matrix says for every unit. What is left is solved as in Kwon et al. (arXiv
2204.09656), from the bottom up, each MLP on what it will read once those below it are narrow.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.calibration.drops.drop import versions
from slimformer.calibration.drops.fitting import RIDGE, RidgeSums
from slimformer.calibration.drops.replay import Call, record_call
from slimformer.calibration.exit_heads import RIDGE as HEAD_RIDGE
from slimformer.calibration.exit_heads import check_texts, pooling_of
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask, task_of
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.retrieval import RetrievalTask
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.narrow_mlp import HEAD, PARTS, NarrowMlp, check_narrows
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.runtime.layer import LayerExecutor
from slimformer.text.progress import Stages

# The fractions of hidden units that are tried, one after the other.
KEEPS = (1 / 2, 1 / 3, 1 / 4, 1 / 6)
# Several times as many as the units and the residual have together.
_TOKENS = 50_000
# Units that go at once.
_AT_ONCE = 32
# Sentences of each whole text.
_SENTENCES = 4
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def choose_narrow(
    model: Any,
    *,
    data: EmbeddingTask | str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    keep: float | None = None,
    max_loss: float | None = None,
    fit_on: Iterable[str] | None = None,
    hold_out: bool = True,
    batch_size: int = 32,
    progress: bool = False,
) -> Plan:
    """Make the plan of an embedding model with narrow MLPs, as narrow as your own data allows.

    The last layer's MLP becomes linear, since a head behind it takes back what that loses.

    Args:
        model: An unpatched SentenceTransformer of BERT's structure; it is left as it was.
        data: A folder in BEIR's layout, a `.tsv` file of pairs, text without labels, or a task made from one of them.
        text_field: The field with the text, for text without labels.
        keep: The fraction of every other layer's hidden units that stays.
        max_loss: Instead of `keep`: the smallest of `KEEPS` that loses at most this fraction of the dense figure, 0.01
            for 1%. A smaller one is only tried where the one before was good enough.
        fit_on: Texts to fit on; None for the texts of the data, and of the queries those that it is chosen by.
        hold_out: Choose by a part of the data, and leave the rest for `slimformer eval --task`.
        batch_size: Texts per forward.
        progress: Show a progress bar.

    Returns:
        A plan with one `NarrowMlp`; what was measured in `plan.provenance["narrow"]`.

    Raises:
        CalibrationError: If not exactly one of `keep` and `max_loss` is given or one is no fraction, nothing loses so
            little, the model is patched or is no SentenceTransformer with a pooling that a head passes through.
        DataError: If the data cannot be read.
        UnsupportedModelError: If the model's MLPs are not BERT's.

    Example:
        >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
        >>> model = SentenceTransformer("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> plan = slimformer.calibrate(model, None, NarrowMlp, data="cranfield", max_loss=0.01)  # doctest: +SKIP
        >>> slimformer.patch(model, plan)  # doctest: +SKIP
    """
    if (keep is None) == (max_loss is None):
        raise CalibrationError(
            f"Say how narrow: give either keep or max_loss, got {'neither' if keep is None else 'both'}."
        )
    for name, value in (("keep", keep), ("max_loss", max_loss)):
        if value is not None and not 0 <= value < 1:
            raise CalibrationError(f"{name} must be a fraction from 0 to below 1, got {value!r}.")
    anatomy, inner = _checked(model), transformer_of(model)
    task = task_of(data, text_field)
    if hold_out:
        task = task.split()[0]
    judged, texts = task.apart() if fit_on is None else (task, list(fit_on))
    with evaluating(inner), Stages(progress) as stages:
        judged = judged.recorded(model)
        (dense,) = judged.scores(model)
        if dense <= 0:
            raise CalibrationError(
                f"The dense {judged.name} is {dense:.4g}, and of that no fraction can be lost. Check the data."
            )
        queries = (
            list(judged.queries.values()) if isinstance(judged, RetrievalTask) and fit_on is None else []
        )
        fitting = NarrowFit(model, texts, queries, batch_size)
        chosen, curve = None, []
        for part in stages.track(KEEPS if keep is None else (keep,), "widths measured"):
            method = fitting.fit(units_of(model, part))
            with patched(model, method):
                (score,) = judged.scores(model)
            curve.append({"keep": part, "score": score})
            if keep is None and score < (1 - (max_loss or 0.0)) * dense:
                break
            chosen = method
    if chosen is None:
        raise CalibrationError(
            f"No width loses at most {max_loss} of the dense {judged.name}, {dense:.4g}: with {KEEPS[0]:.0%} of the "
            f"units it is {curve[0]['score']:.4g}. Allow more, or fit on more text like your own (fit_on)."
        )
    provenance = {
        **versions(anatomy),
        "arguments": {"keep": keep, "max_loss": max_loss, "hold_out": hold_out},
        "data": task.source,
        "fitted_on": f"{len(texts)} texts and {len(queries)} queries",
        "narrow": {"name": judged.name, "dense": dense, "curve": curve},
    }
    return Plan([chosen], fingerprint(inner), provenance)


def fit_narrow(
    model: Any,
    texts: Sequence[str],
    units: Mapping[int, int],
    *,
    queries: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 0,
) -> NarrowMlp:
    """Choose the hidden units that stay, fit the weights around them, and a head where the last layer is among them.

    Args:
        model: An unpatched SentenceTransformer of BERT's structure; it is left as it was.
        texts: Texts like those that will be embedded. Some of them and sentences of theirs are what the MLPs are
            fitted on; the head is fitted on all.
        units: Layer to how many hidden units stay.
        queries: Texts that are asked with, all of which are read.
        batch_size: Texts per forward.
        seed: Which texts and sentences are read.

    Raises:
        CalibrationError: If the model is patched or no such pipeline, or a layer does not exist or has fewer units.
        DataError: If there are fewer than two texts, or they are not strings.
        UnsupportedModelError: If the model's MLPs are not BERT's.

    Example:
        >>> method = fit_narrow(SentenceTransformer("all-MiniLM-L6-v2"), texts, {5: 384})  # doctest: +SKIP
    """
    return NarrowFit(model, texts, queries, batch_size, seed).fit(units)


class NarrowFit:
    """What fits of several widths on the same texts share; arguments and errors are those of `fit_narrow`."""

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        texts: Sequence[str],
        queries: Sequence[str] = (),
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        check_texts(texts)
        self.model, self.texts, self.batch_size = model, [*texts, *queries], batch_size
        self.anatomy = _checked(model)
        self.calls: list[Call] = []
        self.dense: Tensor | None = None
        chosen, read, tokens = random.Random(seed), list(texts), 0
        chosen.shuffle(read)
        for start in range(0, len(queries), batch_size):
            self._read(queries[start : start + batch_size])
        for start in range(0, len(read), batch_size):
            batch = read[start : start + batch_size]
            tokens += self._read(batch)
            # Short texts stand for queries.
            tokens += self._read([_sentence(text, chosen) for text in batch for _ in range(_SENTENCES)])
            if tokens >= _TOKENS:
                break

    def _read(self, texts: Sequence[str]) -> int:
        """Record what the first layer reads of a batch; returns how many tokens that are."""
        model = self.model
        features = (
            model.preprocess(list(texts)) if hasattr(model, "preprocess") else model.tokenize(list(texts))
        )
        inputs = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        self.calls.append(record_call(self.anatomy, inputs))
        return int(inputs["attention_mask"].sum())

    @torch.no_grad()
    def fit(self, units: Mapping[int, int]) -> NarrowMlp:
        """The method with so many units in each of some layers."""
        _checked(self.model)
        layers: list[Any] = list(self.anatomy.layers)
        count = len(layers)
        for index, number in units.items():
            width = layers[index].intermediate.dense.out_features if index in range(count) else 0
            if not 0 <= number < width:
                raise CalibrationError(
                    f"Layer {index} cannot keep {number} hidden units: layers are 0 to {count - 1}"
                    + (f", and it has {width}, of which fewer are to stay." if width else ".")
                )
        with evaluating(transformer_of(self.model)):
            weights = _fit(self.anatomy, self.calls, units)
            if count - 1 in units:
                weights.update(self._head(NarrowMlp(units, weights)))
        if any(bool(tensor.isnan().any()) for tensor in weights.values()):
            raise CalibrationError(
                "The fitted weights are not numbers: the model computes NaN on these texts. Check the checkpoint, or "
                "load it in bfloat16 or float32 instead of float16."
            )
        return NarrowMlp(dict(units), weights)

    def _head(self, method: NarrowMlp) -> dict[str, Tensor]:
        """The ridge regression from the narrow model's pooled output to the dense one's."""
        if self.dense is None:
            self.dense = self._pooled()
        with patched(self.model, method):
            slim = self._pooled()
        sums = RidgeSums(slim.shape[1], 1, slim.device)
        sums.add(slim[None], (self.dense - slim)[None], None)
        head = sums.solve(False, slim, HEAD_RIDGE)
        if head.weight is None:
            return {}
        return dict(zip(HEAD, (head.weight.cpu(), head.bias.cpu()), strict=True))

    def _pooled(self) -> Tensor:
        """What the pooling makes of the texts, in the order in which the pipeline reads them."""
        found: list[Tensor] = []
        pooling, _ = pooling_of(self.model)
        handle = pooling.register_forward_hook(
            lambda _, given, output: found.append(output["sentence_embedding"])
        )
        try:
            self.model.encode(self.texts, batch_size=self.batch_size, show_progress_bar=False)
        finally:
            handle.remove()
        return torch.cat(found)


@dataclass
class _Sums:
    """Gram matrices of what an MLP's output is solved from: its hidden units, the residual, and one."""

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, size: int, hidden: int) -> _Sums:
        return cls(
            torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, hidden, dtype=torch.float64)
        )

    def add(self, units: Tensor, residual: Tensor, target: Tensor) -> None:
        """Add tokens: `[tokens, units]`, and two of `[tokens, hidden]`."""
        features = torch.cat([units, residual, torch.ones_like(residual[:, :1])], 1).float()
        self.inputs += (features.T @ features).cpu()
        self.targets += (features.T @ target.float()).cpu()

    def solve(self, units: int, keep: int) -> tuple[Tensor, Tensor]:
        """Which of the units stay, and the weights `[kept + hidden + 1, hidden]`."""
        gram = self.inputs.clone()
        gram.diagonal()[:-1] += RIDGE * gram.diagonal()[:-1].mean()  # the bias is free
        if keep == 0:
            return torch.empty(0, dtype=torch.int64), torch.linalg.solve(
                gram[units:, units:], self.targets[units:]
            )
        inverse = torch.linalg.inv(gram)
        weights = inverse @ self.targets
        alive = torch.arange(units)
        while len(alive) > keep:
            # What the sum of squares grows by if one goes and the others are solved anew.
            cost = weights[: len(alive)].square().sum(1) / inverse.diagonal()[: len(alive)]
            gone = cost.argsort()[: min(_AT_ONCE, len(alive) - keep)]
            stays = torch.ones(len(inverse), dtype=torch.bool).index_fill(0, gone, False)
            # The inverse and the solution without them, from those with them.
            factor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
            weights = weights[stays] - factor.T @ weights[gone]
            inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ factor
            alive = alive[stays[: len(alive)]]
        return alive, weights


def _fit(anatomy: Anatomy, calls: Sequence[Call], units: Mapping[int, int]) -> dict[str, Tensor]:
    fitted: dict[str, Tensor] = {}
    dense = slim = [call.hidden for call in calls]
    layers: list[Any] = list(anatomy.layers)
    for index, layer in enumerate(layers):
        executor = LayerExecutor(layer, anatomy.structure)

        def attended(
            states: list[Tensor], executor: LayerExecutor = executor, index: int = index
        ) -> list[Tensor]:
            pairs = zip(calls, states, strict=True)
            return [x + executor.difference("attention", x, call.arguments[index]) for call, x in pairs]

        same = slim is dense
        dense = attended(dense)
        slim = dense if same else attended(slim)
        if index not in units:
            dense, slim = (
                [layer.output(layer.intermediate(x), x) for x in states] for states in (dense, slim)
            )
            continue
        up, hidden = layer.intermediate.dense, dense[0].shape[-1]
        sums = _Sums.of(up.out_features + hidden + 1, hidden)
        for call, before, now in zip(calls, dense, slim, strict=True):
            real = (
                torch.ones(now.shape[:2], dtype=torch.bool, device=now.device)
                if call.real is None
                else call.real
            )
            target = before + layer.output.dense(layer.intermediate(before)) - now
            sums.add(layer.intermediate(now[real]), now[real], target[real])
        alive, weights = sums.solve(up.out_features, units[index])
        down, linear, bias = weights.split([len(alive), hidden, 1])
        # The norm reads the residual too.
        found = (up.weight[alive], up.bias[alive], down.T, linear.T + torch.eye(hidden), bias[0])
        own = {part: tensor.detach().to("cpu", up.weight.dtype).contiguous()
               for part, tensor in zip(PARTS, found, strict=True)}  # fmt: skip
        fitted.update({f"{index}.{part}": tensor for part, tensor in own.items()})
        dense = [layer.output(layer.intermediate(x), x) for x in dense]
        slim = [_narrowed(layer, own, x) for x in slim]
    return fitted


def _narrowed(layer: Any, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    w = {part: tensor.to(x.device) for part, tensor in weights.items()}
    y = nn.functional.linear(x, w["linear.weight"], w["linear.bias"])
    h = layer.intermediate.intermediate_act_fn(nn.functional.linear(x, w["up.weight"], w["up.bias"]))
    normed: Tensor = layer.output.LayerNorm(y + nn.functional.linear(h, w["down.weight"]))
    return normed


def _checked(model: Any) -> Anatomy:
    pooling_of(model)
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    anatomy = known_anatomy(model)
    check_narrows(anatomy)
    return anatomy


def units_of(model: Any, keep: float) -> dict[int, int]:
    """How many hidden units stay in every layer of a model, if this fraction does and the last MLP becomes linear."""
    anatomy = known_anatomy(model)
    layers: list[Any] = list(anatomy.layers)
    narrow = {index: int(keep * layer.intermediate.dense.out_features) for index, layer in enumerate(layers)}
    return {**narrow, len(layers) - 1: 0}


def _sentence(text: str, chosen: random.Random) -> str:
    return chosen.choice([part for part in _SENTENCE_ENDS.split(text) if part.strip()] or [text])

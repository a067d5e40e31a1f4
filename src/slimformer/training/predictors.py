"""Train the predictors of token elimination beside the frozen model (LeMo, arXiv 2501.09767)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.drops.replay import executors, record_call, run_layer
from slimformer.decisions.registry import field_names
from slimformer.errors import CalibrationError, UnsupportedModelError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest
from slimformer.examination.layers import examine_layers, row_sublayers
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.elimination.block_predictor import BLOCK, BlockPredictor
from slimformer.methods.elimination.token_elimination import TokenElimination
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.patching import status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.rows.stream import Stream
from slimformer.runtime.sublayers import RowSublayers
from slimformer.text.progress import Stages
from slimformer.text.rows import training_rows
from slimformer.text.sources import check_token_ids
from slimformer.training.attempts.attempts import Watched, attempted
from slimformer.training.loop import TrainingSettings, seeded
from slimformer_kernels import pooled_scores

_HELD_OUT_ROWS = 16
# What predictors are to say is in units of its own mean, so that one rate suits every model.
_RATE = 1e-3
# Rows that tell whether anything was learnt, of those that are held out.
_JUDGED = 4
# When neurons retire, as parts of the training: seldom enough that the others can make up for them.
_RETIRE_AT = (0.25, 0.5, 0.75)

_logger = logging.getLogger("slimformer")


def learn_predictors(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: TokenElimination | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    schedule: Mapping[int, float],
    length: int = 4096,
    size: int = 256,
    rank: int = 64,
    settings: TrainingSettings | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Train one predictor per layer of a schedule, and make the plan that eliminates tokens by them.

    Args:
        model: An unpatched decoder or encoder; its weights stay as they are.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        method: Its other fields, such as `TokenElimination(scorer="predictor", window=128)`; None for its defaults.
        schedule: As `TokenElimination`'s.
        data: As for `slimformer.calibrate`. Its texts are read one behind the other.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Measure on every fifth text, which is not trained on; without, on the last rows of what there is.
        length: Tokens per row: about as many as the prompts will have.
        size: Neurons of a predictor's towers; those that are seldom used are taken out during training.
        rank: Width of the vectors whose products are the scores.
        settings: How long and how fast.
        seed: Instead of that of the settings.
        checkpoint: A folder for checkpoints. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan. `plan.measured["predictors"]` has, per layer and on text not trained on, the loss, the final sizes and
        the recall: the share of the blocks with the highest true scores that are among those predicted highest, by
        column sums (`"all"`, LeMo's) and by what the last blocks attend to (`"last"`); `plan.measured["training"]`
        says whether they learnt anything (`won`): where they did not, the learning rate was lowered three times.

    Raises:
        CalibrationError: If the method has a schedule, the model is patched, an argument is not one of those allowed,
            or training fails.
        DataError: If the text is too short.
        PlanError: If the schedule does not fit the model.
        UnsupportedModelError: If the model's attention is one whose queries and keys are not known.
    """
    settings = seeded(settings or TrainingSettings(), seed)
    method = TokenElimination(scorer="predictor") if method is None else method
    if method.schedule or method.weights:
        raise CalibrationError(
            "The TokenElimination has predictors already, and they are to be trained. Patch it as it is, or give "
            "schedule=... beside TokenElimination(scorer='predictor')."
        )
    if settings.learning_rate == "auto":
        settings = replace(settings, learning_rate=_RATE)
    if status(model):
        raise CalibrationError(
            "The model is patched; predictors learn from the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), known_anatomy(model)
    # Refuses what cannot be patched before anything is trained.
    replace(method, schedule=schedule, scorer="attention").decisions(anatomy)
    tokens = min(length, longest(anatomy, tokenizer or tokenizer_of(model)))
    read, held_out, source = training_rows(
        tokenizer or tokenizer_of(model),
        data,
        text_field=text_field,
        hold_out=hold_out,
        tokens=tokens,
        count=settings.rows_read,
        seed=settings.seed,
        held_out=_HELD_OUT_ROWS,
    )
    check_token_ids(torch.cat([read, held_out]), anatomy.stack)
    torch.manual_seed(settings.seed)
    hidden = anatomy.stack.config.hidden_size
    device = anatomy.stack.device
    trained = _Predictors({layer: BlockPredictor(hidden, size, rank) for layer in schedule}).to(device)
    with evaluating(inner), Stages(progress) as stages:
        teacher = _Teacher.of(anatomy, tuple(schedule))
        identity = {
            "data": source,
            "model": fingerprint(inner),
            "schedule": {str(layer): keep for layer, keep in schedule.items()},
            "sizes": [tokens, size, rank],
            "text": [text_field, hold_out],
            "settings": vars(settings),
        }

        def loss(module: nn.Module, batch: Tensor) -> Tensor:
            inputs, targets = teacher.lesson(batch)
            return _loss(module(inputs), targets, anatomy.causal)

        def after(step: int) -> None:
            if step in {round(part * settings.steps) for part in _RETIRE_AT}:
                for predictor in trained.by_layer().values():
                    predictor.retire()

        def frozen_predictors() -> dict[int, BlockPredictor]:
            weights = {
                name: tensor
                for layer, predictor in trained.by_layer().items()
                for name, tensor in predictor.tensors(layer).items()
            }
            return {layer: BlockPredictor.from_tensors(weights, layer).to(device) for layer in schedule}

        @torch.no_grad()
        def judged() -> float:
            found = frozen_predictors()
            losses = []
            for row in held_out[:_JUDGED].split(1):
                inputs, targets = teacher.lesson(row.to(device))
                predicted = {layer: found[layer](h, *_whole(h)) for layer, h in inputs.items()}
                losses.append(_loss(predicted, targets, anatomy.causal))
            return float(torch.stack(losses).mean())

        done = attempted(
            trained,
            loss,
            read,
            settings,
            Watched(judged, judged, every=settings.steps),
            identity=identity,
            folder=checkpoint,
            stages=stages,
            after_step=after,
        )
        if not done.won:
            _logger.warning("Training won nothing: the predictors know scores no better than before it.")
        found = frozen_predictors()
        weights = {
            name: tensor.cpu()
            for layer, predictor in trained.by_layer().items()
            for name, tensor in predictor.tensors(layer).items()
        }
        measured = _measure(teacher, found, schedule, stages.track(held_out.split(1), "held-out text"))
    trained_method = replace(method, schedule=schedule, scorer="predictor", weights=weights)
    provenance = {
        **versions(anatomy),
        "arguments": {"length": tokens, "size": size, "rank": rank, "hold_out": hold_out, **vars(settings)},
        "data": source,
        "tokens": read.numel(),
        "losses": done.history.losses,
        "learning_rate": done.learning_rate,
        **({"failed": done.failed} if done.failed else {}),
    }
    measurements = {"predictors": measured, "training": done.measured()}
    return Plan([trained_method], fingerprint(inner), provenance, measurements)


def train_predictors(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    schedule: Mapping[int, float],
    **options: Any,
) -> Plan:
    """Deprecated: `slimformer.calibrate` with `TokenElimination(scorer="predictor")`."""
    warnings.warn(
        "train_predictors is deprecated. Call slimformer.calibrate(model, tokenizer, "
        "TokenElimination(scorer='predictor'), schedule=..., data=...).",
        DeprecationWarning,
        stacklevel=2,
    )
    own = {name: options.pop(name) for name in field_names(TokenElimination) if name in options}
    return learn_predictors(
        model, tokenizer, TokenElimination(**{**own, "scorer": "predictor"}), schedule=schedule, **options
    )


class _Predictors(nn.Module):
    """The predictors of all layers, as one module."""

    def __init__(self, predictors: Mapping[int, BlockPredictor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): predictor for layer, predictor in predictors.items()})

    def by_layer(self) -> dict[int, BlockPredictor]:
        return {int(layer): cast(BlockPredictor, predictor) for layer, predictor in self.layers.items()}

    def forward(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: self.layers[str(layer)](h, *_whole(h)) for layer, h in inputs.items()}


def _whole(h: Tensor) -> tuple[Tensor, Tensor]:
    """That every token of `h` `[batch, tokens, hidden]` is text, and its place."""
    batch, tokens, _ = h.shape
    text = torch.ones(batch, tokens, dtype=torch.bool, device=h.device)
    return text, torch.arange(tokens, device=h.device).expand(batch, tokens)


@dataclass
class _Teacher:
    """The dense model, up to the last layer of the schedule.

    Attributes:
        anatomy: The model's.
        layers: Those that are predicted for.
        sublayers: What is known about their modules.
    """

    anatomy: Anatomy
    layers: tuple[int, ...]
    sublayers: dict[int, RowSublayers]

    @classmethod
    def of(cls, anatomy: Anatomy, layers: tuple[int, ...]) -> _Teacher:
        known = examine_layers(anatomy)
        found = {index: row_sublayers(anatomy, index, known[index]) for index in layers}
        for index, sublayers in found.items():
            if sublayers.attention is None:
                raise UnsupportedModelError(
                    f"The attention of layer {index}, {type(anatomy.layers[index]).__name__}, has projections that are "
                    "not known, so that its scores cannot be learned."
                )
            if sublayers.attention.projections.bias is not None:
                raise UnsupportedModelError(
                    f"The attention of layer {index}, {type(anatomy.layers[index]).__name__}, adds a bias to its "
                    "scores, which predictors do not learn. Use TokenElimination with scorer='attention' or 'norm'."
                )
        return cls(anatomy, layers, found)

    @torch.no_grad()
    def lesson(self, batch: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What each layer's attention reads `[batch, tokens, hidden]`, and true scores `[batch, blocks, blocks]`."""
        call = record_call(self.anatomy, {"input_ids": batch})
        layers, hidden = executors(self.anatomy, {}), call.hidden
        inputs, targets = {}, {}
        for index in range(max(self.layers) + 1):
            if index in self.sublayers:
                sublayers = self.sublayers[index]
                h = sublayers.structure.heads_input(sublayers.layer, hidden)
                inputs[index] = h
                stream = Stream.of(hidden, self.anatomy.causal, call.arguments[index])
                if sublayers.attention is not None:
                    q, k = sublayers.attention.queries_and_keys(h.flatten(0, 1), stream)
                    scores = pooled_scores(q, k, causal=self.anatomy.causal, block=BLOCK)
                    targets[index] = scores.matrix
            if index < max(self.layers):
                hidden = run_layer(layers[index], call, hidden, index)
        return inputs, targets


def _loss(predicted: Mapping[int, Tensor], targets: Mapping[int, Tensor], causal: bool) -> Tensor:
    """SmoothL1 between predicted and true block scores, each layer's in units of its own mean."""
    losses = []
    for layer, target in targets.items():
        seen = torch.ones_like(target, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        mean = target[seen].mean().clamp_min(1e-6)
        losses.append(F.smooth_l1_loss(predicted[layer].float()[seen], target[seen] / mean))
    return torch.stack(losses).mean()


@torch.no_grad()
def _measure(
    teacher: _Teacher,
    predictors: Mapping[int, BlockPredictor],
    schedule: Mapping[int, float],
    rows: Iterable[Tensor],
) -> dict[str, Any]:
    """Loss, recall and size of every layer's predictor, as means over rows that were not trained on."""
    causal, sums = teacher.anatomy.causal, {layer: [0.0, 0.0, 0.0] for layer in predictors}
    count = 0
    for row in rows:
        inputs, targets = teacher.lesson(row.to(teacher.anatomy.stack.device))
        count += 1
        for layer, predictor in predictors.items():
            h, target = inputs[layer], targets[layer]
            scores = predictor(h, *_whole(h)).float()
            sums[layer][0] += float(_loss({layer: scores}, {layer: target}, causal))
            scores = scores.relu().tril() if causal else scores.relu()
            keep = schedule[layer] if schedule[layer] <= 1 else 0.5
            for which, part in ((1, slice(None)), (2, slice(-2, None))):
                sums[layer][which] += recall(scores[:, part].sum(1), target[:, part].sum(1), keep)
    return {
        str(layer): {
            "loss": sums[layer][0] / count,
            "recall_all": sums[layer][1] / count,
            "recall_last": sums[layer][2] / count,
            "sizes": list(predictors[layer].sizes),
        }
        for layer in predictors
    }


def recall(scores: Tensor, target: Tensor, keep: float) -> float:
    """The share of the blocks with the highest `target` `[batch, blocks]` that are among the highest `scores`.

    Example:
        >>> recall(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[9.0, 1.0, 5.0, 0.0]]), keep=0.5)
        0.5
    """
    count = max(round(keep * target.shape[1]), 1)
    best, true = scores.topk(count, dim=1).indices, target.topk(count, dim=1).indices
    found = (best[:, :, None] == true[:, None, :]).any(1)
    return float(found.float().mean())

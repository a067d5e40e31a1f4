"""The dense model teaches its slimmed self: one model in memory, the patch switched off for the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from slimformer.changes.recomputation import recomputed
from slimformer.errors import CalibrationError
from slimformer.evaluation.readable import predicts_tokens
from slimformer.evaluation.similarity_task import masked_mean
from slimformer.methods.elimination.token_elimination import TokenElimination
from slimformer.model.anatomy import Anatomy, find_anatomy, transformer_of
from slimformer.patching import switched_off
from slimformer.plans.plan import Plan
from slimformer.rows.stream import tokens_leave_under_gradients
from slimformer.training.trained_weights import TrainedWeights
from slimformer_kernels import chunked_kl


class Passed(NamedTuple):
    """What one pass gives.

    Attributes:
        output: The last hidden states `[rows, tokens, hidden]` of a decoder; embeddings `[rows, hidden]` of an encoder.
        hidden: The residual behind chosen layers, each `[rows, tokens, hidden]`.
    """

    output: Tensor
    hidden: list[Tensor]


def is_decoder(model: Any) -> bool:
    """Whether a model's predictions are compared; of others, and of decoders that a SentenceTransformer embeds with,
    the embeddings are."""
    inner = transformer_of(model)
    return predicts_tokens(inner, find_anatomy(inner)) and not isinstance(model, nn.Sequential)


@dataclass
class Distillation:
    """A patched model and what of it is trained.

    Attributes:
        model: The model, patched with `plan`; a SentenceTransformer embeds with its own pooling, another encoder with
            the mean.
        plan: The plan.
        weights: What is trained; None only measures.
        hidden: How much the residual behind `layers` counts beside the outputs.
        layers: Behind which layers.
        expected: The dense model's outputs on batches that are not trained on, by their numbers, once they are known.
        recompute: Compute every layer again in the backward pass, so that only what is between layers is kept.
    """

    model: Any
    plan: Plan
    weights: TrainedWeights | None = None
    hidden: float = 0.0
    layers: Sequence[int] = ()
    expected: dict[int, Tensor] = field(default_factory=dict)
    recompute: bool = False
    anatomy: Anatomy = field(init=False)
    decoder: bool = field(init=False)

    def __post_init__(self) -> None:
        inner = transformer_of(self.model)
        self.anatomy = find_anatomy(inner)
        self.decoder = is_decoder(self.model)
        leaving = [m for m in self.plan.methods if isinstance(m, TokenElimination) and not m.revivable]
        # Only of the last tokens is it certain that they are computed to the end.
        self.last = min((m.window for m in leaving), default=None) if self.decoder else None
        if self.hidden and leaving:
            raise CalibrationError(
                "hidden=... compares the residuals of all tokens, and the plan lets tokens leave. Use hidden=0."
            )
        if self.recompute and leaving:
            raise CalibrationError(
                "gradient_checkpointing=True computes layers again, and the plan lets tokens leave between them. Use "
                "gradient_checkpointing=False, and fewer or shorter rows."
            )

    def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
        """How far the slim model is from the dense one on a batch, of ids `[rows, tokens]` or ids with their mask
        `[rows, 2, tokens]`."""
        ids, mask = _cropped(batch)
        dense = self.teacher(ids, mask)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            slim = self.student(tensors, ids, mask)
            value = self._outputs_apart(slim.output, dense.output, in_batch=True)
            if self.hidden:
                apart = [_relative(s, d, mask) for s, d in zip(slim.hidden, dense.hidden, strict=True)]
                value = value + self.hidden * torch.stack(apart).mean()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # Every parameter gets a gradient in every process, also of a sublayer that no token went through.
                value = value + 0.0 * torch.stack([p.sum() for p in module.parameters()]).sum()
            return value

        found: Tensor = module(run)
        return found

    def divergence(self, batches: Sequence[Tensor], some: Sequence[int] | None = None) -> float:
        """The mean distance from dense on batches that are not trained on, or on some of them."""
        found = self.divergences(batches, some)
        return sum(found) / len(found)

    @torch.no_grad()
    def divergences(self, batches: Sequence[Tensor], some: Sequence[int] | None = None) -> list[float]:
        """The distance from dense on each of these batches."""
        values = []
        for number in range(len(batches)) if some is None else some:
            ids, mask = _cropped(batches[number].to(self.anatomy.stack.device))
            if number not in self.expected:
                self.expected[number] = self.teacher(ids, mask).output
            slim = self.student({} if self.weights is None else self.weights.tensors(), ids, mask)
            values.append(self._outputs_apart(slim.output, self.expected[number], in_batch=False))
        return [float(value) for value in values]

    @torch.no_grad()
    def teacher(self, ids: Tensor, mask: Tensor | None) -> Passed:
        """The dense model: the same modules, tensors and forwards as of the unpatched one."""
        adapters = None if self.weights is None else self.weights.adapters
        with switched_off(self.model), contextlib.nullcontext() if adapters is None else adapters.away():
            return self._pass(self.anatomy.stack, ids, mask)

    def student(self, tensors: dict[str, Tensor], ids: Tensor, mask: Tensor | None) -> Passed:
        """The slim model with the trained tensors."""

        def stack(**inputs: Any) -> Any:
            return functional_call(self.anatomy.stack, tensors, (), inputs)

        again = self.recompute and torch.is_grad_enabled()
        adapters = None if self.weights is None else self.weights.adapters
        autocast = torch.is_autocast_enabled(ids.device.type)
        with (
            tokens_leave_under_gradients(),
            contextlib.nullcontext() if adapters is None else adapters.without_casts(autocast),
            recomputed(self.anatomy, tensors) if again else contextlib.nullcontext(),
        ):
            return self._pass(stack, ids, mask)

    def _pass(self, stack: Callable[..., Any], ids: Tensor, mask: Tensor | None) -> Passed:
        inputs: dict[str, Any] = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
        if self.anatomy.causal:
            inputs["use_cache"] = False
        wanted = self.layers if self.hidden else ()
        with _behind(self.anatomy.layers, wanted) as hidden:
            last = stack(**inputs).last_hidden_state
        if self.decoder:
            return Passed(last if self.last is None else last[:, -self.last :], hidden)
        real = torch.ones_like(ids) if mask is None else mask
        if not isinstance(self.model, nn.Sequential):
            return Passed(masked_mean(last, real), hidden)
        features = {"input_ids": ids, "token_embeddings": last, "attention_mask": real}
        for module in list(self.model)[1:]:
            features = module(features)
        return Passed(features["sentence_embedding"], hidden)

    def _outputs_apart(self, slim: Tensor, dense: Tensor, in_batch: bool) -> Tensor:
        if not self.decoder:
            slim, dense = (F.normalize(t.float(), dim=-1) for t in (slim, dense))
            apart = (1.0 - (slim * dense).sum(-1)).mean()
            if in_batch and len(slim) > 1:
                apart = apart + (slim @ slim.T - dense @ dense.T).square().sum(-1).mean()
            return apart
        head: Any = transformer_of(self.model).get_output_embeddings()
        kind = slim.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        softcap = getattr(self.anatomy.stack.config, "final_logit_softcapping", None)
        bias = getattr(head, "bias", None)
        # Cast here, since its backward pass computes logits again, where autocast is over.
        with torch.autocast(kind, enabled=False):
            return chunked_kl(
                slim.to(dtype),
                head.weight.detach().to(dtype),
                teacher_hidden=dense.to(dtype),
                bias=None if bias is None else bias.detach().to(dtype),
                softcap=softcap,
            )


@contextlib.contextmanager
def _behind(layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that the outputs of some layers are put in, while the block runs."""
    found: list[Tensor] = []

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[index].register_forward_hook(record) for index in wanted]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cropped(batch: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids and mask without columns that are padding in all rows; no mask where nothing is padding."""
    if batch.dim() == 2:
        return batch, None
    ids, mask = batch.unbind(1)
    columns = mask.any(0)
    mask = mask[:, columns]
    return ids[:, columns], None if bool(mask.all()) else mask


def _relative(slim: Tensor, dense: Tensor, mask: Tensor | None) -> Tensor:
    """The squared distance of residuals `[rows, tokens, hidden]` in parts of the dense one's, over real tokens."""
    apart = (slim.float() - dense.float()).square().sum(-1) / dense.float().square().sum(-1).clamp_min(1e-12)
    return apart.mean() if mask is None else apart[mask.bool()].mean()

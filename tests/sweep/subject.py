"""One tiny model and every way it is run: whole texts of three layouts, and steps with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from slow_rows import positions
from sweep.classes import CACHES, Family

TOKENS, STEPS = 24, 3
# Where the text of every row begins, and its length; longer than the sliding windows of the tiny models.
LAYOUTS = {
    "none": [(0, TOKENS)] * 3,
    "left": [(5, 19), (0, TOKENS), (21, 3)],
    "right": [(0, 19), (0, TOKENS), (0, 3)],
}


def batch(layout: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts, as a tokenizer gives them."""
    ids = torch.randint(10, 99, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, (begin, length) in zip(mask, LAYOUTS[layout], strict=True):
        row[begin : begin + length] = 1
    return ids * mask, mask


def real(layout: str) -> Tensor:
    """Which tokens are text."""
    return batch(layout)[1].bool()


def next_ids() -> Tensor:
    """The tokens that follow every text, step by step."""
    return torch.randint(10, 99, (3, STEPS), generator=torch.Generator().manual_seed(2))


def given(family: Family, model: nn.Module, layout: str) -> dict[str, Tensor]:
    """The arguments for one pass over whole texts, as `generate` and embedding pipelines hand them over."""
    ids, mask = batch(layout)
    return _arguments(family, model, ids, mask)


def _arguments(family: Family, model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    arguments = {"input_ids": ids, "attention_mask": mask}
    takes = inspect.signature(model.forward).parameters
    if "position_ids" in takes and (family.use == "decoder" or family.name.endswith(":bidirectional")):
        arguments["position_ids"] = positions(mask)
    return arguments


def outputs(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Logits or last hidden states `[batch, tokens, ...]`, in float32."""
    _forget_longer_texts(model)
    with torch.no_grad():
        return _of(model(**arguments))


def _forget_longer_texts(model: nn.Module) -> None:
    """Undo what dynamic RoPE keeps of the longest text so far, by which it turns later ones."""
    for module in model.modules():
        original = getattr(module, "original_max_seq_len", None)
        if isinstance(getattr(module, "max_seq_len_cached", None), Tensor) and original is not None:
            module.max_seq_len_cached = original
            module.inv_freq = module.original_inv_freq.clone()


def _of(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).float()
    return out[0].float()


def continued(family: Family, model: nn.Module) -> Tensor:
    """The last outputs of a left-padded batch with `STEPS` tokens more, in one pass without a cache."""
    ids, mask = batch("left")
    ids = torch.cat([ids, next_ids()], 1)
    mask = torch.cat([mask, torch.ones_like(next_ids())], 1)
    arguments: dict[str, Any] = dict(_arguments(family, model, ids, mask))
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return outputs(model, arguments)[:, -STEPS - 1 :]


class _Forced(LogitsProcessor):
    """Makes `generate` write the tokens it is told."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.ids[:, min(self.step, self.ids.shape[1] - 1)]
        self.step += 1
        return torch.full_like(scores, -1e4).scatter_(1, token[:, None], 0.0)


def steps(family: Family, model: PreTrainedModel) -> Tensor:
    """The same outputs from the prompt and then one token at a time, by the model's own `generate` where it has one."""
    ids, mask = batch("left")
    _forget_longer_texts(model)
    with torch.no_grad():
        if model.can_generate():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=STEPS + 1, do_sample=False, output_logits=True,
                return_dict_in_generate=True, logits_processor=[_Forced(next_ids())], eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            return torch.stack([logits.float() for logits in out.logits], 1)
        name = next(n for n in CACHES if n in inspect.signature(model.forward).parameters)
        cache = DynamicCache(config=model.config)
        found = []
        for step in range(STEPS + 1):
            arguments = _arguments(family, model, ids, mask)
            new = ids.shape[1] if step == 0 else 1
            arguments = {k: v if k == "attention_mask" else v[:, -new:] for k, v in arguments.items()}
            out = model(**arguments, **{name: cache}, use_cache=True)
            found.append(_of(out)[:, -1])
            if step < STEPS:
                ids = torch.cat([ids, next_ids()[:, step : step + 1]], 1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return torch.stack(found, 1)


def error(actual: Tensor, expected: Tensor, text: Tensor | None = None) -> float:
    """The largest error of a token, relative to the norm of what is expected there. NaN where anything is NaN."""
    if text is not None and actual.shape[:2] == text.shape:
        actual, expected = actual[text], expected[text]
    gap = (actual.float() - expected.float()).flatten(0, -2).norm(dim=-1)
    return float((gap / expected.float().flatten(0, -2).norm(dim=-1).clamp_min(1e-6)).max())


def typical_error(actual: Tensor, expected: Tensor, text: Tensor | None = None) -> float:
    """The error of the median token, of the text where it is largest.

    In half precision a router's choice between two experts can fall otherwise for a single token.
    """
    gap = (actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-6)
    if text is None or gap.shape[:2] != text.shape:
        return float(gap.flatten(1).median(-1).values.max())
    return max(float(row[kept].median()) for row, kept in zip(gap, text, strict=True))

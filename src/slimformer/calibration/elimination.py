"""Find from which layer on, and how far, tokens can be eliminated within a budget of quality."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.calls.layer_calls import cache_argument
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest, predicts_tokens
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.elimination.token_elimination import TokenElimination
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.held_out import split_texts
from slimformer.text.progress import Stages
from slimformer.text.sources import characters_for, check_token_ids, load_texts, token_blocks

# Tokens of a passage that stand before the answer when it is to be recalled.
CUE = 32


@dataclass(frozen=True)
class Point:
    """One setting that was tried.

    Attributes:
        layer: From which layer on tokens are eliminated.
        keep: Which fraction stays.
        flops: Of the dense prefill's multiplications.
        divergence: Mean KL(dense || slim) over answer tokens, in nats.
        continued: The same where the answer continues the text.
        recalled: The same where it repeats a passage from further up; None if none did.
        chosen: Whether the plan has this setting.
    """

    layer: int
    keep: float
    flops: float
    divergence: float
    continued: float
    recalled: float | None
    chosen: bool = False


def choose_elimination(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: TokenElimination | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    max_loss: float = 0.05,
    length: int = 2048,
    answer: int = 64,
    texts: int = 8,
    recall: bool = True,
    layers: Sequence[int] | None = None,
    keep: float | Sequence[float] = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1),
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose the layer and the fraction of tokens that save most of the prefill within a budget.

    Quality is the KL divergence from the dense model on the tokens of an answer, which is read behind the prompt's
    cache. Every other answer repeats a passage from further up in its prompt: what merely continues a text needs few of
    its tokens, and would let every choice look good.

    Args:
        model: An unpatched decoder; it is left as it was.
        tokenizer: Its tokenizer; a Pipeline brings its own.
        method: What is not chosen, such as `TokenElimination(scorer="norm", window=128)`; None for its defaults.
        max_loss: The budget, in nats per answer token.
        data: As for `slimformer.calibrate`; its texts are read one behind the other.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Leave every fifth text alone, so that `slimformer eval` can measure on it.
        length: Tokens of a prompt: as many as yours have.
        answer: Tokens of an answer.
        texts: How many prompts are tried.
        recall: Whether every other answer is to be recalled from further up.
        layers: Candidates; None takes five, spread over the model.
        keep: Candidate fractions, or the only one.
        seed: Which of the text is read.
        checkpoint: A folder for partial results. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan; `plan.provenance["curve"]` has every setting tried.

    Raises:
        CalibrationError: If the method has a schedule, the model is patched or no decoder, an argument is not one of
            those allowed, or no setting stays within the budget.
        DataError: If the text is too short.

    Example:
        >>> plan = slimformer.calibrate(model, tokenizer, TokenElimination, max_loss=0.02)  # doctest: +SKIP
    """
    settings = TokenElimination() if method is None else method
    if settings.schedule:
        raise CalibrationError(
            "TokenElimination(schedule=...) says already from which layers on how many tokens stay, and calibration "
            "chooses that. Patch it as it is, or leave the schedule out."
        )
    if settings.threshold or settings.revivable:
        raise CalibrationError(
            "Calibration chooses fractions of tokens that leave for good: threshold and revivable are not for it. "
            "Choose such a TokenElimination by hand."
        )
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), known_anatomy(model)
    if not isinstance(inner, PreTrainedModel) or not predicts_tokens(inner, anatomy):
        raise CalibrationError(
            f"{type(inner).__name__} predicts no tokens, and the budget is one of predictions. For encoders choose a "
            "TokenElimination by hand, and measure it on your own task."
        )
    tokenizer = tokenizer or tokenizer_of(model)
    count = len(anatomy.layers)
    spread = sorted({round(count * part / 6) for part in range(1, 6)} - {0})
    candidates = spread if layers is None else list(layers)
    fractions = sorted([keep] if isinstance(keep, (int, float)) else keep, reverse=True)
    _check(max_loss, length, answer, texts, fractions, candidates, count, longest(anatomy, tokenizer))
    least = settings.least
    if not answer < least <= length:
        raise CalibrationError(
            f"Tokens leave texts of {least} tokens and more: a prompt of {length} must be as long, and an answer of "
            f"{answer} shorter."
        )
    rows, source = _rows(tokenizer, data, text_field, hold_out, length + answer, texts, seed)
    check_token_ids(rows, inner)
    identity = {
        "data": source,
        "model": fingerprint(inner),
        "arguments": [length, answer, texts, recall, seed, max_loss, candidates, fractions],
        "text": [text_field, hold_out],
        "method": settings.settings(),
    }
    partial = PartialResults(checkpoint, identity)
    with evaluating(inner), Stages(progress) as stages:
        trials = [Trial.of(inner, row, answer, recall and number % 2 == 1) for number, row in enumerate(rows)]
        curve = [Point(**point) for point in partial.kept("curve") or []]
        for layer in stages.track(candidates, "layers"):
            for part in fractions:
                if any(p.layer == layer and (p.keep == part or p.divergence > max_loss) for p in curve):
                    # Measured before, or already too far with more tokens.
                    continue
                tried = replace(settings, schedule={layer: part})
                curve.append(_measure(inner, anatomy, tried, layer, part, trials))
                partial.keep("curve", [asdict(point) for point in curve])
    within = [point for point in curve if point.divergence <= max_loss]
    if not within:
        nearest = min(curve, key=lambda point: point.divergence)
        raise CalibrationError(
            f"No setting stays within {max_loss} nats per answer token; the nearest, {nearest.keep} of the "
            f"tokens from layer {nearest.layer} on, is {nearest.divergence:.4f} away. Allow more, or later layers."
        )
    best = min(within, key=lambda point: point.flops)
    provenance = {
        **versions(anatomy),
        "arguments": {"length": length, "answer": answer, "texts": texts, "recall": recall, "seed": seed,
                      "max_loss": max_loss, "hold_out": hold_out},
        "data": source,
        "tokens": rows.numel(),
        "curve": [{**asdict(point), "chosen": point == best} for point in curve],
    }  # fmt: skip
    return Plan([replace(settings, schedule={best.layer: best.keep})], fingerprint(inner), provenance)


def prefill_flops(anatomy: Anatomy, tokens: int, layer: int, keep: float) -> float:
    """The multiplications of a prefill whose tokens leave before `layer`, as a part of the dense one's.

    Linear layers, and attention's scores and their use; the head, of which generation computes one row, is left out.
    """
    config = anatomy.stack.config
    weights = sum(p.numel() for p in anatomy.layers[0].parameters() if p.dim() == 2)
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )

    def cost(count: float) -> float:
        return weights * count + width * count * count

    layers = len(anatomy.layers)
    return (layer * cost(tokens) + (layers - layer) * cost(keep * tokens)) / (layers * cost(tokens))


@dataclass
class Trial:
    """One prompt, the answer behind it, and what the dense model makes of that.

    Attributes:
        prompt: `[1, tokens]`.
        answer: `[1, answer]`.
        recalled: Whether the answer stands further up.
        expected: The dense model's log-probabilities at the answer `[answer, vocabulary]`.
    """

    prompt: Tensor
    answer: Tensor
    recalled: bool
    expected: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, row: Tensor, answer: int, recalled: bool) -> Trial:
        """A row `[tokens]` cut into prompt and answer, or made one that asks for what stands further up."""
        row = row[None].to(model.device)
        prompt, wanted = row[:, :-answer], row[:, -answer:]
        if recalled:
            # A passage from the first third, whose first words stand at the end again.
            start = prompt.shape[1] // 6
            passage = prompt[:, start : start + CUE + answer]
            prompt = torch.cat([prompt[:, : prompt.shape[1] - CUE], passage[:, :CUE]], dim=1)
            wanted = passage[:, CUE:]
        return cls(prompt, wanted, recalled, _answer(model, prompt, wanted))

    def divergence(self, model: PreTrainedModel) -> float:
        """Mean KL(dense || model) over the answer, in nats."""
        actual = _answer(model, self.prompt, self.answer)
        return float(F.kl_div(actual, self.expected, log_target=True, reduction="sum")) / len(actual)


def _answer(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Log-probabilities at every answer token, float32 `[answer, vocabulary]`, read behind the prompt's cache."""
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache, "use_cache": True}
    first = model(input_ids=prompt, logits_to_keep=1, **given).logits
    rest = model(input_ids=answer[:, :-1], **given).logits
    return torch.cat([first, rest], dim=1)[0].float().log_softmax(-1)


def _measure(
    model: PreTrainedModel,
    anatomy: Anatomy,
    method: TokenElimination,
    layer: int,
    keep: float,
    trials: Sequence[Trial],
) -> Point:
    with patched(model, method):
        found = [trial.divergence(model) for trial in trials]
    far = [value for value, trial in zip(found, trials, strict=True) if trial.recalled]
    near = [value for value, trial in zip(found, trials, strict=True) if not trial.recalled]
    tokens = trials[0].prompt.shape[1]
    return Point(
        layer,
        keep,
        prefill_flops(anatomy, tokens, layer, keep),
        sum(found) / len(found),
        sum(near) / len(near),
        sum(far) / len(far) if far else None,
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    text_field: str,
    hold_out: bool,
    tokens: int,
    count: int,
    seed: int,
) -> tuple[Tensor, str]:
    found, source = load_texts(
        os.fspath(data) if isinstance(data, os.PathLike) else data,
        text_field=text_field,
        enough=characters_for(count * tokens),
    )
    if hold_out:
        found = split_texts(found)[0]
    rows = token_blocks(found, tokenizer, sequence_length=tokens, count=count, seed=seed)
    if not len(rows):
        raise DataError(
            f"A prompt and its answer have {tokens} tokens, and {source} gives fewer. Give more text, or a shorter "
            "prompt."
        )
    return rows, source


def _check(
    max_loss: float,
    length: int,
    answer: int,
    texts: int,
    keep: Sequence[float],
    layers: Sequence[int],
    count: int,
    most: int,
) -> None:
    if not max_loss > 0:
        raise CalibrationError(f"max_loss must be above 0, got {max_loss!r}.")
    for name, value, least in (
        ("answer", answer, 2),
        ("texts", texts, 1),
        ("length", length, 6 * (answer + CUE)),
    ):
        if value < least:
            raise CalibrationError(f"{name} must be at least {least}, got {value!r}.")
    if length + answer > most:
        raise CalibrationError(
            f"A prompt of {length} tokens and an answer of {answer} are longer than the {most} that the model reads. "
            "Ask for shorter ones."
        )
    if not keep or not all(0 < part < 1 for part in keep):
        raise CalibrationError(f"keep must be fractions between 0 and 1, got {list(keep)!r}.")
    wrong = [layer for layer in layers if not 1 <= layer < count]
    if wrong or not layers:
        raise CalibrationError(f"layers must be from 1 to {count - 1}, got {list(layers)!r}.")

"""`slimformer.patch(model)` without a plan beside the unpatched model, and Liger-Kernel where it is installed."""

# ruff: noqa: PLC0415

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import slimformer
from benchmarks import tables
from benchmarks.compare import Case, compare, relative_error
from benchmarks.llamas import llama_8b, logits_in_float32, rewinder, with_shared_weights
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort, Regime

DENSE, LOSSLESS, LIGER = "unpatched", "slimformer.patch(model)", "Liger-Kernel"
PROMPT = 2048
# Once what a user waits, once the GPU's part: eager launches take longer than what they launch where the CPU is slow.
_REGIMES: tuple[Regime, ...] = ("queued", "wall")
# Tokens of the lines of WikiText-2's test split that are no headings, by all-MiniLM-L6-v2's tokenizer, cut at 512:
# the 0th, 5th, … 100th percentile of 2183 lines.
WIKITEXT_LINES = (
    3,
    7,
    11,
    21,
    40,
    58,
    71,
    83,
    94,
    104,
    113,
    125,
    135,
    147,
    160,
    178,
    195,
    217,
    243,
    288,
    512,
)
TEXTS = 64


@benchmark(
    "lossless",
    needs="cuda",
    description="the patch without a plan: prefill and decode of an 8B shape, and padded texts in a BERT-base shape",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """The decoder, then the encoder."""
    yield from _decoder(settings)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    yield from _encoder(settings)


def _decoder(settings: Settings) -> Iterator[Measurement]:
    dense = llama_8b(settings)
    models = {DENSE: dense, LOSSLESS: slimformer.patch(with_shared_weights(dense))}
    rotation = {DENSE: modeling_llama.apply_rotary_pos_emb}
    if importlib.util.find_spec("liger_kernel") is not None and settings.device.type == "cuda":
        models[LIGER] = with_shared_weights(dense)
        rotation[LIGER] = _apply_liger(models[LIGER])
    try:
        for tokens in settings.pick((4096, 16384), (24,)):
            yield from _prefill(settings, models, rotation, tokens)
        yield from _new_lengths(settings, models, rotation, settings.pick(2048, 24))
        for batch in (1, 16):
            yield from _decode(settings, models, rotation, batch, settings.pick(PROMPT, 24))
    finally:
        modeling_llama.apply_rotary_pos_emb = rotation[DENSE]


def _apply_liger(model: LlamaForCausalLM) -> Callable[..., Any]:
    """Patch a model with Liger-Kernel; returns the rotation that it puts into transformers for all models."""
    # It patches transformers when imported, so not before it is asked for.
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    own, mlp, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm
    forward = modeling_llama.LlamaForCausalLM.forward
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=model)
    found: Callable[..., Any] = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm = own, mlp, norm
    modeling_llama.LlamaForCausalLM.forward = forward
    return found


def _prefill(
    settings: Settings,
    models: dict[str, LlamaForCausalLM],
    rotation: dict[str, Callable[..., Any]],
    tokens: int,
) -> Iterator[Measurement]:
    dense = models[DENSE]
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)

    def call(model: LlamaForCausalLM) -> Tensor:
        cache = DynamicCache(config=dense.config)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    for model in models.values():
        # So often that every attention backend is the one that stays.
        for _ in range(settings.pick(max(4, 65536 // tokens), 1)):
            with torch.no_grad():
                call(model)
    parameters: Parameters = {"model": "8B", "phase": "prefill", "batch": 1, "tokens": tokens}
    modeling_llama.apply_rotary_pos_emb = rotation[DENSE]
    expected = logits_in_float32(dense, ids)
    cases = {
        name: _case(settings, partial(call, model), expected, name, rotation)
        for name, model in models.items()
    }
    effort = Effort(milliseconds=5_000.0, least=6, most=24)
    for regime in _REGIMES:
        yield from compare(settings, parameters, cases, regime=regime, baseline=DENSE, effort=effort)


def _new_lengths(
    settings: Settings,
    models: dict[str, LlamaForCausalLM],
    rotation: dict[str, Callable[..., Any]],
    tokens: int,
) -> Iterator[Measurement]:
    """Prompts as they come: no two of one length."""
    dense = models[DENSE]
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)
    lengths = itertools.cycle(range(1, tokens // 2))

    def call(model: LlamaForCausalLM, shorter: int) -> Tensor:
        logits: Tensor = model(input_ids=ids[:, shorter:], use_cache=False, logits_to_keep=1).logits
        return logits

    parameters: Parameters = {"model": "8B", "phase": "prefill, new lengths", "batch": 1, "tokens": tokens}
    expected = logits_in_float32(dense, ids)
    cases = {}
    for name, model in models.items():
        case = _case(settings, partial(call, model, 0), expected, name, rotation)
        cases[name] = dataclasses.replace(case, run=partial(_one_shorter, call, model, lengths))
    yield from compare(settings, parameters, cases, regime="wall", baseline=DENSE)


def _one_shorter(call: Callable[..., Tensor], model: LlamaForCausalLM, lengths: Iterator[int]) -> Tensor:
    with torch.no_grad():
        return call(model, next(lengths))


def _decode(
    settings: Settings,
    models: dict[str, LlamaForCausalLM],
    rotation: dict[str, Callable[..., Any]],
    batch: int,
    prompt: int,
) -> Iterator[Measurement]:
    dense = models[DENSE]
    ids = torch.randint(dense.config.vocab_size, (batch, prompt + 1), device=settings.device)
    cache = DynamicCache(config=dense.config)
    with torch.no_grad():
        dense(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(model: LlamaForCausalLM) -> Tensor:
        logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        return logits

    rewind = rewinder(cache)
    parameters: Parameters = {"model": "8B", "phase": "decode", "batch": batch, "tokens": prompt}
    modeling_llama.apply_rotary_pos_emb = rotation[DENSE]
    # One sequence stands for the batch: float32 is slow.
    expected = logits_in_float32(dense, ids[:1])
    cases = {
        name: _case(settings, partial(step, model), expected, name, rotation, rewind)
        for name, model in models.items()
    }
    effort = Effort(milliseconds=4_000.0, least=20, most=40)
    for regime in _REGIMES:
        yield from compare(settings, parameters, cases, regime=regime, baseline=DENSE, effort=effort)


def _case(
    settings: Settings,
    call: Callable[[], Tensor],
    expected: Tensor,
    name: str,
    rotation: dict[str, Callable[..., Any]],
    rewind: Callable[[], None] | None = None,
) -> Case:
    """A model's call, with the rotation it would find in transformers, checked on the first sequence."""

    def prepare() -> None:
        modeling_llama.apply_rotary_pos_emb = rotation.get(name, rotation[DENSE])
        if rewind is not None:
            rewind()

    def timed() -> Tensor:
        with torch.no_grad():
            return call()

    def check() -> float:
        prepare()
        return relative_error(timed()[:1], expected)

    if name == DENSE:
        return Case(timed, check, math.inf, prepare)
    return Case(timed, check, settings.tolerance, prepare, DENSE)


def _encoder(settings: Settings) -> Iterator[Measurement]:
    tiny = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with settings.device:
        dense = BertModel._from_config(
            BertConfig(**settings.pick({}, tiny)), dtype=settings.dtype, attn_implementation="sdpa"
        )
    dense.eval().requires_grad_(False)
    slim = slimformer.patch(with_shared_weights(dense))
    lengths = text_lengths(TEXTS) if not settings.smoke else torch.tensor([3, 9, 24])
    ids, mask = padded(lengths, dense.config.vocab_size, settings.device)

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            state: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return state

    expected = call(copy.deepcopy(dense).float())[mask.bool()]

    def check(model: nn.Module) -> float:
        return relative_error(call(model)[mask.bool()], expected)

    parameters: Parameters = {
        "model": "BERT-base",
        "phase": "encode",
        "batch": len(lengths),
        "tokens": int(lengths.max()),
        "padding": round(1 - float(lengths.float().mean() / lengths.max()), 3),
    }
    cases = {
        DENSE: Case(partial(call, dense), partial(check, dense), math.inf),
        LOSSLESS: Case(partial(call, slim), partial(check, slim), settings.tolerance, None, DENSE),
    }
    for regime in _REGIMES:
        yield from compare(settings, parameters, cases, regime=regime, baseline=DENSE)


def text_lengths(texts: int) -> Tensor:
    """Lengths of `texts` texts that spread as the lines of WikiText-2 do."""
    quantiles = torch.tensor(WIKITEXT_LINES, dtype=torch.float64)
    at = torch.linspace(0, len(WIKITEXT_LINES) - 1, texts, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(WIKITEXT_LINES) - 2)
    return (quantiles[low] + (at - low) * (quantiles[low + 1] - quantiles[low])).round().long()


def padded(lengths: Tensor, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and attention mask `[batch, longest]`, in an order that has nothing to do with the lengths."""
    lengths = lengths[torch.randperm(len(lengths))].to(device)
    position = torch.arange(int(lengths.max()), device=device)
    mask = (position < lengths[:, None]).long()
    return torch.randint(1, vocabulary, mask.shape, device=device) * mask, mask


@table("lossless", source="lossless")
def gains(content: dict[str, Any]) -> str:
    """Times of the unpatched model, Liger-Kernel's and the patched one's, and the gain."""
    names = ("model", "phase", "batch", "tokens", "regime")
    rows = []
    for point in tables.points(content, *names, where=lambda _: True):
        at = dict(zip(names, point, strict=True))
        dense, slim, liger = (tables.find(content, name, **at) for name in (DENSE, LOSSLESS, LIGER))
        gpu_only = ", GPU only" if at["regime"] == "queued" else ""
        rows.append(
            [
                f"{at['model']}, {at['phase']}, {at['batch']} × {at['tokens']} tokens{gpu_only}",
                tables.milliseconds(dense),
                tables.milliseconds(liger),
                tables.milliseconds(slim),
                *("–" if found is None else f"{1 / found['baseline_ratio']:.2f}×" for found in (liger, slim)),
            ]
        )
    head = ["Random weights, bfloat16", "unpatched, ms", "Liger, ms", "patched, ms", "Liger", "patched"]
    return tables.markdown(head, rows)

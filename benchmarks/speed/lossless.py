"""`slimformer.patch(model)` without a plan beside the unpatched model, and Liger-Kernel where it is installed."""

# ruff: noqa: PLC0415

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, against, compare, release
from benchmarks.frame.inputs import LOSSLESS, UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort, Regime
from benchmarks.speed.llamas import llama_8b, logits_in_float32, rewinder, with_shared_weights
from benchmarks.speed.prefills import prefill

LIGER = "Liger-Kernel"
PROMPT = 2048
# Once what a user waits, once the GPU's part: eager launches take longer than what they launch where the CPU is slow.
_REGIMES: tuple[Regime, ...] = ("queued", "wall")
# Tokens of the lines of WikiText-2's test split that are no headings, by all-MiniLM-L6-v2's tokenizer, cut at 512:
# the 0th, 5th, … 100th percentile of 2183 lines.
# fmt: off
WIKITEXT_LINES = (
    3, 7, 11, 21, 40, 58, 71, 83, 94, 104, 113, 125, 135, 147, 160, 178, 195, 217, 243, 288, 512,
)
# fmt: on
TEXTS = 64
Rotation = Callable[..., Any]


@benchmark(
    "lossless",
    "the patch without a plan: prefill and decode of an 8B shape, and padded texts in a BERT-base shape",
    on="GPU",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """The decoder, then the encoder."""
    decoders = Decoders(settings)
    try:
        for tokens in settings.pick((4096, 16384), (24,)):
            yield from decoders.prefill(tokens)
        yield from decoders.new_lengths(settings.pick(2048, 24))
        for batch in (1, 16):
            yield from decoders.decode(batch, settings.pick(PROMPT, 24))
    finally:
        modeling_llama.apply_rotary_pos_emb = decoders.rotation[UNPATCHED]
    del decoders
    release()
    yield from _encoder(settings)


class Decoders:
    """The 8B shape unpatched, patched, and with Liger-Kernel where it is installed, on the same weights.

    Attributes:
        models: By name.
        rotation: What each finds in transformers to turn queries and keys.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.dense = settings, llama_8b(settings)
        self.models = {UNPATCHED: self.dense, LOSSLESS: slimformer.patch(with_shared_weights(self.dense))}
        self.rotation: dict[str, Rotation] = dict.fromkeys(self.models, modeling_llama.apply_rotary_pos_emb)
        if importlib.util.find_spec("liger_kernel") is not None and settings.on_gpu:
            self.models[LIGER] = with_shared_weights(self.dense)
            self.rotation[LIGER] = _apply_liger(self.models[LIGER])

    def prefill(self, tokens: int) -> Iterator[Measurement]:
        """One prompt, again and again."""
        ids = self._ids(1, tokens)
        for model in self.models.values():
            # So often that every attention backend is the one that stays.
            for _ in range(self.settings.pick(max(4, 65536 // tokens), 1)):
                prefill(model, ids)
        calls = {name: partial(prefill, model, ids) for name, model in self.models.items()}
        effort = Effort(milliseconds=5_000.0, least=6, most=24)
        yield from self._compared("prefill", ids, tokens, self._cases(calls, ids), _REGIMES, effort)

    def new_lengths(self, tokens: int) -> Iterator[Measurement]:
        """Prompts as they come: no two of one length."""
        ids, lengths = self._ids(1, tokens), itertools.cycle(range(1, tokens // 2))

        def call(model: LlamaForCausalLM) -> Tensor:
            return prefill(model, ids[:, next(lengths) :], cached=False)

        whole = {name: partial(prefill, model, ids, cached=False) for name, model in self.models.items()}
        cases = {
            name: dataclasses.replace(case, run=partial(call, self.models[name]))
            for name, case in self._cases(whole, ids).items()
        }
        yield from self._compared("prefill, new lengths", ids, tokens, cases, ("wall",), Effort())

    def decode(self, batch: int, prompt: int) -> Iterator[Measurement]:
        """The same step on a filled cache."""
        ids, cache = self._ids(batch, prompt + 1), DynamicCache(config=self.dense.config)
        self.dense(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step(model: LlamaForCausalLM) -> Tensor:
            logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
            return logits

        calls = {name: partial(step, model) for name, model in self.models.items()}
        effort = Effort(milliseconds=4_000.0, least=20, most=40)
        cases = self._cases(calls, ids, rewinder(cache))
        yield from self._compared("decode", ids, prompt, cases, _REGIMES, effort)

    def _ids(self, *shape: int) -> Tensor:
        return torch.randint(self.dense.config.vocab_size, shape, device=self.settings.device)

    def _cases(
        self,
        calls: Mapping[str, Callable[[], Tensor]],
        ids: Tensor,
        rewind: Callable[[], None] = lambda: None,
    ) -> dict[str, Case]:
        """Every model's call, with the rotation that it would find in transformers, checked on the first sequence."""
        modeling_llama.apply_rotary_pos_emb = self.rotation[UNPATCHED]
        # One sequence stands for the batch: float32 is slow.
        expected = logits_in_float32(self.dense, ids[:1])

        def prepare(name: str) -> None:
            modeling_llama.apply_rotary_pos_emb = self.rotation[name]
            rewind()

        return {
            name: against(
                expected,
                call,
                math.inf if name == UNPATCHED else self.settings.tolerance,
                prepare=partial(prepare, name),
                yardstick=None if name == UNPATCHED else UNPATCHED,
                part=lambda logits: logits[:1],
            )
            for name, call in calls.items()
        }

    def _compared(
        self,
        phase: str,
        ids: Tensor,
        tokens: int,
        cases: Mapping[str, Case],
        regimes: Sequence[Regime],
        effort: Effort,
    ) -> Iterator[Measurement]:
        at: Parameters = {"model": "8B", "phase": phase, "batch": len(ids), "tokens": tokens}
        yield from compare(self.settings, at, cases, regime=regimes, baseline=UNPATCHED, effort=effort)


def _apply_liger(model: LlamaForCausalLM) -> Rotation:
    """Patch a model with Liger-Kernel; returns the rotation that it puts into transformers for all models."""
    # It patches transformers when imported, so not before it is asked for.
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    own, mlp, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm
    forward = modeling_llama.LlamaForCausalLM.forward
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=model)
    found: Rotation = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm = own, mlp, norm
    modeling_llama.LlamaForCausalLM.forward = forward
    return found


def _encoder(settings: Settings) -> Iterator[Measurement]:
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(**settings.pick({}, {**tiny, "num_hidden_layers": 2, "num_attention_heads": 2}))
    with settings.device:
        dense = BertModel._from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    dense.eval().requires_grad_(False)
    lengths = settings.pick(text_lengths(TEXTS), torch.tensor([3, 9, 24]))
    ids, mask = padded(lengths, config.vocab_size, settings.device)

    def states(model: Any) -> Tensor:
        state: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return state

    def real(state: Tensor) -> Tensor:
        return state[mask.bool()]

    expected = real(states(copy.deepcopy(dense).float()))

    at: Parameters = {
        "model": "BERT-base",
        "phase": "encode",
        "batch": len(lengths),
        "tokens": int(lengths.max()),
        "padding": round(1 - float(lengths.float().mean() / lengths.max()), 3),
    }
    slim = slimformer.patch(with_shared_weights(dense))
    cases = {
        UNPATCHED: against(expected, partial(states, dense), part=real),
        LOSSLESS: against(
            expected, partial(states, slim), settings.tolerance, yardstick=UNPATCHED, part=real
        ),
    }
    yield from compare(settings, at, cases, regime=_REGIMES, baseline=UNPATCHED)


def text_lengths(texts: int) -> Tensor:
    """Lengths of `texts` texts that spread as the lines of WikiText-2 do."""
    last = len(WIKITEXT_LINES) - 1
    at = numpy.linspace(0, last, texts)
    return torch.from_numpy(numpy.interp(at, range(last + 1), WIKITEXT_LINES)).round().long()


def padded(lengths: Tensor, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and attention mask `[batch, longest]`, in an order that has nothing to do with the lengths."""
    lengths = lengths[torch.randperm(len(lengths))].to(device)
    position = torch.arange(int(lengths.max()), device=device)
    mask = (position < lengths[:, None]).long()
    return torch.randint(1, vocabulary, mask.shape, device=device) * mask, mask


@table("lossless")
def gains(content: dict[str, Any]) -> str:
    """Times of the unpatched model, Liger-Kernel's and the patched one's, and the gain."""
    rows = []
    for at in tables.points(content, "model", "phase", "batch", "tokens", "regime"):
        gpu_only = ", GPU only" if at["regime"] == "queued" else ""
        rows.append((f"{at['model']}, {at['phase']}, {at['batch']} × {at['tokens']} tokens{gpu_only}", at))
    unpatched, liger, patched = ({"candidate": name} for name in (UNPATCHED, LIGER, LOSSLESS))
    columns = [
        ("unpatched, ms", unpatched, tables.milliseconds),
        ("Liger, ms", liger, tables.milliseconds),
        ("patched, ms", patched, tables.milliseconds),
        ("Liger", liger, tables.gain),
        ("patched", patched, tables.gain),
    ]
    return tables.grid(content, "Random weights, bfloat16", rows, columns)

"""What a decoder makes of contexts longer than it was trained for, by every method: text that goes on, and passkeys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import BOOKS, DENSE, QMSUM, decoder
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters, reason
from benchmarks.long_context.far_tokens import answers, is_right
from benchmarks.long_context.long_prompts import LongTexts
from slimformer import SelfExtend
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale
from slimformer.model.anatomy import find_anatomy
from slimformer.transforms.transform import trained_length

# Tokens that are predicted, at the end of every context; and the room of a key.
_PREDICTED, _KEY = 512, 16
_WINDOWS, _PASSKEYS = 12, 20
# LongEmbed's λ for so many times the trained length.
_LAMBDAS = {2: 3.0, 4: 5.0, 8: 10.0}
SELF_EXTEND, PUBLISHED = "SelfExtend", "as published"


def methods(times: int, trained: int) -> dict[tuple[str, str], Sequence[Any]]:
    """For contexts of so many times the trained length: method and settings, and what the model is patched with."""
    factor = float(times)
    published = SelfExtend(times + 1, trained // times)
    found: dict[tuple[str, str], Sequence[Any]] = {
        (SELF_EXTEND, PUBLISHED): [published],
        ("NTK", "LongEmbed's λ"): [RopeScaling("ntk", factor, theta_factor=_LAMBDAS[times])],
        ("YaRN", "s"): [RopeScaling("yarn", factor)],
    }
    # Groups larger than capacity asks for keep distances away from the end of what was trained.
    for group, share in ((8, 8), (8, 4), (16, 8), (16, 4)):
        found[SELF_EXTEND, f"G = {group}, w = L0 / {share}"] = [SelfExtend(group, trained // share)]
    found |= {
        ("YaRN", "2 s"): [RopeScaling("yarn", 2 * factor)],
        ("NTK", "twice LongEmbed's λ"): [RopeScaling("ntk", factor, theta_factor=2 * _LAMBDAS[times])],
        ("NTK", "closed form"): [RopeScaling("ntk", factor)],
        ("dynamic NTK", ""): [RopeScaling("dynamic", factor)],
        ("position interpolation", ""): [RopeScaling("linear", factor)],
        ("SelfExtend, log n", PUBLISHED): [published, LogNScale(trained)],
        ("SelfExtend, log n", "G = 8, w = L0 / 4"): [SelfExtend(8, trained // 4), LogNScale(trained)],
    }
    return found


@benchmark(
    "context_extension",
    "book NLL and passkeys at up to four times the trained length by every method",
    model="instruction-tuned decoder",
    data=(BOOKS, QMSUM),
    takes=("texts",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """The same last tokens behind contexts of every length; bfloat16 on a GPU."""
    model, tokenizer = decoder(settings, settings.dtype)
    texts = LongTexts(settings.data, tokenizer)
    trained = trained_length(find_anatomy(model))
    longest = 4 * trained
    windows = texts.book_windows(longest, settings.texts or settings.pick(_WINDOWS, 1))
    keys = settings.texts or settings.pick(_PASSKEYS, 1)
    for tokens in (trained // 4, trained, 2 * trained, longest):
        with slimformer.patched(model):
            yield _measured(model, windows, texts, tokens, keys, (DENSE, ""))
    for times in (4, 2):
        for name, methods_of in methods(times, trained).items():
            try:
                with slimformer.patched(model, *methods_of):
                    yield _measured(model, windows, texts, times * trained, keys, name)
            except torch.OutOfMemoryError as failure:
                at: Parameters = {"tokens": times * trained, "settings": name[1]}
                yield Measurement(at, name[0], status="failed", note=reason(failure))


def _measured(
    model: PreTrainedModel, windows: Tensor, texts: LongTexts, tokens: int, keys: int, name: tuple[str, str]
) -> Measurement:
    predicted = min(_PREDICTED, tokens // 4)
    prompts = texts.passkeys(tokens - _KEY, keys, in_a_book=False)
    values = {
        "nll": _nll(model, windows[:, -tokens:], predicted),
        "passkey": float(answers(model, prompts, 1, is_right)[0].mean()),
    }
    return Measurement({"tokens": tokens, "settings": name[1]}, name[0], values=values)


def _nll(model: PreTrainedModel, windows: Tensor, predicted: int) -> float:
    """Mean negative log-likelihood of the last tokens of every window, `[windows, tokens]`."""
    losses = []
    for ids in windows:
        ids = ids[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=predicted + 1).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, -predicted:]))
    return float(torch.stack(losses).mean())


@table("context_extension")
def every_method(content: dict[str, Any]) -> str:
    """One row per method and settings; up to the trained length all of them are as dense."""
    rows = {
        f"{m['candidate']}, {m['parameters']['settings']}".removesuffix(", "): {
            "candidate": m["candidate"],
            "settings": m["parameters"]["settings"],
        }
        for m in content["measurements"]
    }

    def cell(name: str, digits: int) -> tables.Cell:
        return lambda found: "" if found is None else f"{found['values'][name]:.{digits}f}"

    lengths = sorted(tables.distinct(content, "tokens"))
    columns = [(f"NLL, {length}", {"tokens": length}, cell("nll", 3)) for length in lengths]
    columns += [(f"passkey, {length}", {"tokens": length}, cell("passkey", 2)) for length in lengths[1:]]
    return tables.grid(content, "Method", rows.items(), columns)

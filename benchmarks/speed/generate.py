"""`generate` end to end: a token's time eager, with transformers' compiled static cache, and from our graphs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.compare import relative_error, release
from benchmarks.frame.inputs import LOSSLESS, UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Timing, reason
from benchmarks.speed.llamas import llama_8b, with_shared_weights

STATIC = "static cache, compiled"
# Tokens of a short and a long call, whose difference is the time of steps alone.
_SHORT, _LONG = 8, 40
_REPEATS = 3
# A step in bfloat16 beside another right one, on random weights.
_TOLERANCE = 0.1


@benchmark(
    "generate",
    "milliseconds per token of `generate`, and of the first call: eager, compiled static cache, the patch",
    on="any",
    parts=("qwen", "8b", "static"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Both shapes, at every batch and prompt that fits in the time and memory of a run."""
    rate = _read_rate(settings)
    shapes: Mapping[str, tuple[Callable[[Settings], PreTrainedModel], Any]] = {
        "qwen-1.5b": (
            qwen_1_5b,
            ((1, 512), (1, 4096), (1, 16384), (4, 512), (4, 4096), (16, 512), (16, 4096)),
        ),
        "llama-8b": (llama_8b, ((1, 512), (1, 4096), (1, 16384), (4, 512), (16, 512))),
    }
    for shape, (make, points) in shapes.items():
        if settings.only is not None and settings.only != "static" and settings.only not in shape:
            continue
        model = make(settings)
        patched = slimformer.patch(with_shared_weights(model))
        for batch, tokens in settings.pick(points, ((1, 24), (2, 24))):
            candidates: dict[str, tuple[Any, dict[str, Any]]] = {
                UNPATCHED: (model, {}),
                LOSSLESS: (patched, {}),
            }
            if settings.on_gpu and (batch, tokens) == (1, 512) and settings.only in (None, "static"):
                candidates[STATIC] = (with_shared_weights(model), {"cache_implementation": "static"})
            ids = _ids(model, batch, tokens)
            yield from _measured(
                settings, {"shape": shape, "batch": batch, "tokens": tokens}, candidates, ids, rate
            )
        del model, patched, candidates
        gc.collect()
        release()


def qwen_1_5b(settings: Settings) -> Qwen2ForCausalLM:
    """Random weights of Qwen2.5-1.5B's shape; a tiny one in a smoke run."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = settings.pick(
        (1536, 8960, 28, 12, 2, 151936), (64, 64, 4, 4, 2, 64)
    )
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    with settings.device:
        model = Qwen2ForCausalLM._from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _measured(
    settings: Settings,
    point: Mapping[str, Any],
    candidates: Mapping[str, tuple[Any, dict[str, Any]]],
    ids: Tensor,
    rate: float,
) -> Iterator[Measurement]:
    expected, first = None, {}
    found: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, (model, options) in candidates.items():
        try:
            first[name] = _seconds(settings, model, ids, _SHORT, options)
            logits = _logits(model, ids, options)
            expected = logits if expected is None else expected
            errors[name] = relative_error(logits, expected)
        except Exception as error:
            failed[name] = reason(error)
            release()
    # A second call, so that graphs of this length are there.
    for name in errors:
        model, options = candidates[name]
        _seconds(settings, model, ids, _LONG, options)
    for _ in range(settings.pick(_REPEATS, 1)):
        for name in errors:
            model, options = candidates[name]
            short = _seconds(settings, model, ids, _SHORT, options)
            long = _seconds(settings, model, ids, _LONG, options)
            found.setdefault(name, []).append((long - short) / (_LONG - _SHORT) * 1e3)
    best = _bytes_read(candidates[UNPATCHED][0], ids) / rate * 1e3
    for name, (model, _) in candidates.items():
        if name in failed:
            yield Measurement(point, name, status="failed", note=failed[name])
            continue
        if not errors[name] <= _TOLERANCE:
            far = f"relative error {errors[name]:.3g}"
            yield Measurement(point, name, status="wrong", error=errors[name], note=far)
            continue
        times = sorted(found[name])
        middle = median(times)
        values = {"first_call_seconds": first[name], "milliseconds_to_read": best}
        if name == LOSSLESS:
            values |= _of_step(model)
        yield Measurement(
            point,
            name,
            milliseconds=Timing(times[0], middle, times[-1], len(times)),
            baseline_ratio=middle / median(found[UNPATCHED]) if found.get(UNPATCHED) else None,
            ideal_ratio=middle / best,
            error=errors[name],
            values=values,
            note=slimformer.status(model).generation.get("steps", ""),
        )


def _seconds(settings: Settings, model: Any, ids: Tensor, tokens: int, options: dict[str, Any]) -> float:
    _wait(settings)
    begun = time.perf_counter()
    _generate(model, ids, tokens, options)
    _wait(settings)
    return time.perf_counter() - begun


def _generate(model: Any, ids: Tensor, tokens: int, options: dict[str, Any], **more: Any) -> Any:
    given = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
        **options,
    }
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given, **more)


def _logits(model: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Logits of the prompt and of two steps that read given tokens, since a rounding may choose others."""
    forced = ids[:, :3].tolist()
    start = ids.shape[1]

    def only(text: int, so_far: Tensor) -> list[int]:
        return [forced[text][len(so_far) - start]]

    found = _generate(
        model,
        ids,
        3,
        options,
        return_dict_in_generate=True,
        output_logits=True,
        prefix_allowed_tokens_fn=only,
    )
    return torch.stack(found.logits).float().cpu()


def _of_step(model: Any) -> dict[str, float]:
    """The GPU's own time of the last captured step."""
    from slimformer.changes.running_calls import PATCH  # noqa: PLC0415

    patch = next(vars(module)[PATCH] for module in model.modules() if PATCH in vars(module))
    stepping = patch.reports.get("steps")
    rooms = [] if stepping is None else [room for room in stepping.rooms.free if room.replay is not None]
    if not rooms or not torch.cuda.is_available():
        return {}
    room = rooms[-1]
    room.step.place.fill_(room.count // 2)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        room.step.place.fill_(int(room.at) - 1)
        start.record()
        room.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    room.at = -1
    return {"step_on_gpu_ms": median(times), "room": float(room.count)}


def _bytes_read(model: Any, ids: Tensor) -> float:
    """What one step has to read: every weight but the embeddings of other tokens, and the keys and values."""
    tied = model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= 0 if tied else embedding.numel() * embedding.element_size()
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    keys = (
        2
        * config.num_hidden_layers
        * width
        * embedding.element_size()
        * (ids.numel() + ids.shape[0] * _LONG // 2)
    )
    return float(weights + keys)


def _read_rate(settings: Settings) -> float:
    """Bytes per second that the device reads, measured with a sum over more than any cache holds."""
    numbers = torch.ones(settings.pick(2**30, 2**16), dtype=torch.int32, device=settings.device)
    times = []
    for _ in range(6):
        _wait(settings)
        begun = time.perf_counter()
        numbers.amax()
        _wait(settings)
        times.append(time.perf_counter() - begun)
    return numbers.numel() * 4 / min(times)


def _ids(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * tokens)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _wait(settings: Settings) -> None:
    if settings.on_gpu:
        torch.cuda.synchronize()


@table("generate")
def token_by_token(content: dict[str, Any]) -> str:
    """Milliseconds per token of both, and how far the patch is from what reading the weights takes."""
    rows = []
    for at in tables.points(content, "shape", "batch", "tokens"):
        dense, slim = (tables.find(content, name, **at) for name in (UNPATCHED, LOSSLESS))
        if dense is None or slim is None:
            continue
        rows.append(
            [
                f"{at['shape']}, batch {at['batch']}, prompt of {at['tokens']}",
                f"{dense['milliseconds']['p50']:.1f}",
                f"{slim['milliseconds']['p50']:.2f}",
                f"{1 / slim['baseline_ratio']:.1f}×",
                tables.shown(slim["values"].get("step_on_gpu_ms"), ".2f"),
                f"{slim['values']['milliseconds_to_read']:.2f}",
                f"{slim['values']['first_call_seconds']:.1f}",
            ]
        )
    head = [
        "",
        "unpatched, ms",
        "patched, ms",
        "faster",
        "step on the GPU, ms",
        "to read, ms",
        "first call, s",
    ]
    return tables.markdown(head, rows) if rows else ""

"""Ways to generate text that are timed beside each other, each in this process or in one of its own.

What compiles, or puts kernels of its own under a model, runs by itself: where one breaks its process, the others are
still measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import slimformer
from benchmarks.frame.compare import Unsupported
from benchmarks.frame.inputs import LOSSLESS, UNPATCHED
from benchmarks.frame.registry import Settings
from benchmarks.speed.llamas import llama_8b

STATIC, LIGER, HUB_KERNELS = "static cache, compiled", "Liger", "use_kernels=True"
# Tokens of a short and a long call, whose difference is the time of steps alone.
SHORT, LONG = 8, 40
_LONGEST_SECONDS = 400
# Lines at the end of what a process said, among which the reason is.
_LAST_LINES = 12


@dataclass
class Times:
    """What was found about one way to generate.

    Attributes:
        first_call: Seconds.
        logits: Of three tokens, the first behind the prompt, `[3, batch, vocabulary]`.
        milliseconds: Per token, of every round.
    """

    first_call: float = 0.0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    milliseconds: list[float] = field(default_factory=list)


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


SHAPES: Mapping[str, Callable[[Settings], PreTrainedModel]] = {"qwen-1.5b": qwen_1_5b, "llama-8b": llama_8b}


def seeded(shape: str, settings: Settings) -> PreTrainedModel:
    """A model whose weights are the same in every process."""
    torch.manual_seed(0)
    return SHAPES[shape](settings)


def made(name: str, model: Any) -> tuple[Any, dict[str, Any]]:
    """A way to generate: the model made ready for it, and what its `generate` takes.

    Raises:
        Unsupported: If what it needs is not installed.
    """
    if name == LOSSLESS:
        return slimformer.patch(model), {}
    if name == STATIC:
        return model, {"cache_implementation": "static"}
    if name == LIGER:
        _check_installed("liger_kernel")
        # It imports one library per model family.
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance  # noqa: PLC0415

        _apply_liger_kernel_to_instance(model=model)
    if name == HUB_KERNELS:
        _check_installed("kernels")
        model.set_use_kernels(True)
    return model, {}


def _check_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unsupported(f"{package} is not installed")


def first(settings: Settings, model: Any, ids: Tensor, options: Mapping[str, Any]) -> Times:
    """The first call, and what it computes; then one of every length that is timed."""
    found = Times(first_call=seconds(settings, model, ids, SHORT, options))
    found.logits = logits_of(model, ids, options)
    # So that graphs of these lengths are there.
    for _ in range(2):
        seconds(settings, model, ids, LONG, options)
    return found


def timed(settings: Settings, model: Any, ids: Tensor, options: Mapping[str, Any]) -> float:
    """Milliseconds of a step."""
    short, long = (seconds(settings, model, ids, tokens, options) for tokens in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def seconds(
    settings: Settings,
    model: Any,
    ids: Tensor,
    tokens: int,
    options: Mapping[str, Any],
    keep: Callable[[Any], object] = lambda output: None,
) -> float:
    """How long a call takes that generates so many tokens; what it returns is kept outside of the time."""
    wait(settings)
    begun = time.perf_counter()
    output = generate(model, ids, tokens, options)
    wait(settings)
    took = time.perf_counter() - begun
    keep(output)
    return took


def generate(model: Any, ids: Tensor, tokens: int, options: Mapping[str, Any], **more: Any) -> Any:
    """Exactly so many tokens behind every prompt, greedily."""
    given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options, **more)


def logits_of(model: Any, ids: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Logits of the prompt and of two steps that read given tokens, since a rounding may choose others."""
    forced = ids[:, :3].tolist()
    start = ids.shape[1]

    def only(text: int, so_far: Tensor) -> list[int]:
        return [forced[text][len(so_far) - start]]

    more = {"return_dict_in_generate": True, "output_logits": True, "prefix_allowed_tokens_fn": only}
    found = generate(model, ids, 3, options, **more)
    return torch.stack(found.logits).float().cpu()


def prompts(model: Any, batch: int, tokens: int) -> Tensor:
    """Random token ids `[batch, tokens]`."""
    generator = torch.Generator().manual_seed(batch * tokens)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def wait(settings: Settings) -> None:
    """Until the device has done everything."""
    if settings.on_gpu:
        torch.cuda.synchronize()


def in_its_own_process(
    settings: Settings, name: str, shape: str, batch: int, tokens: int, repeats: int
) -> Times:
    """What `first` and `timed` find in another process.

    Raises:
        Unsupported: If what the way to generate needs is not installed.
        RuntimeError: If the process fails, with the line in which it said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.pt"
        asked = [name, shape, batch, tokens, repeats, settings.smoke, str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(asked)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
            check=False,
        )
        if ended.returncode or not path.exists():
            lines = ended.stderr.strip().splitlines()[-_LAST_LINES:]
            raise RuntimeError(next((line for line in reversed(lines) if "Error" in line), *lines[-1:]))
        content = torch.load(path, weights_only=True)
    if "unsupported" in content:
        raise Unsupported(content["unsupported"])
    return Times(**content)


def main(asked: str) -> None:
    """Measure one way to generate, and write what was found where the caller said."""
    name, shape, batch, tokens, repeats, smoke, path = json.loads(asked)
    on_gpu = torch.cuda.is_available() and not smoke
    settings = Settings(torch.device("cuda" if on_gpu else "cpu"), smoke)
    content: dict[str, Any]
    try:
        model, options = made(name, seeded(shape, settings))
        with torch.no_grad():
            ids = prompts(model, batch, tokens)
            found = first(settings, model, ids, options)
            found.milliseconds = [timed(settings, model, ids, options) for _ in range(repeats)]
        content = vars(found)
    except Unsupported as limit:
        content = {"unsupported": str(limit)}
    torch.save(content, path)


ALONE = (STATIC, LIGER, HUB_KERNELS)
BESIDE_EACH_OTHER = (UNPATCHED, LOSSLESS)


if __name__ == "__main__":
    main(sys.argv[1])

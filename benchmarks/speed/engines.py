"""One engine on one exported model in a process of its own: `python -m benchmarks.speed.engines ENGINE FOLDER ...`.

Imports nothing that the engine does not, so that a cold start is the engine's.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import resource
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Greedy tokens for prompts of token ids, all at once.
Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def vllm(folder: Path, texts: int, length: int) -> Generate:
    """vLLM in float32, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", max_model_len=length, max_num_seqs=texts, enable_prefix_caching=False,
        kv_cache_memory_bytes=2**28, gpu_memory_utilization=0.1, disable_log_stats=True, enforce_eager=True,
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        asked: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [
            list(answer.outputs[0].token_ids) for answer in engine.generate(asked, settings, use_tqdm=False)
        ]

    return generate


def llama_cpp(folder: Path, texts: int, length: int) -> Generate:
    """llama.cpp's server in this process, with keys and values in float32."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.n_parallel, settings.n_ctx, settings.n_gpu_layers = texts, texts * length, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count() or 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.fit_params, settings.verbosity = False, False, 0
    server = xllamacpp.Server(settings)

    def ask(ids: Sequence[int], tokens: int) -> list[int]:
        asked = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "ignore_eos": True,
                 "return_tokens": True, "cache_prompt": False}  # fmt: skip
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer)["tokens"])

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: ask(ids, tokens), prompts))

    return generate


ENGINES = {"vllm": vllm, "llama_cpp": llama_cpp}


def main(engine: str, folder: str, tokens: int, texts: int) -> dict[str, Any]:
    """What one process measures, with the time of day at which it had its first token."""
    prompts = [[100 + text + place for place in range(32)] for text in range(texts)]
    generate = ENGINES[engine](Path(folder), texts, 64 + tokens)
    generate(prompts[:1], 1)
    first = time.time()
    found: dict[str, Any] = {"first": first, "answer": generate(prompts[:1], tokens)[0]}
    for name, asked in (("one", prompts[:1]), ("many", prompts)):
        # With a token less, the prompt is not among what is timed.
        times = []
        for count in (1, tokens):
            began = time.perf_counter()
            generate(asked, count)
            times.append(time.perf_counter() - began)
        found[name] = len(asked) * (tokens - 1) / (times[1] - times[0])
    # In KiB on Linux.
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
    # Engines take seconds to go, or wait for what they started.
    os._exit(0)

"""llama.cpp's own server on a GGUF file, as `xllamacpp` runs it in this process."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp
from xllamacpp import ggml_type, llama_flash_attn_type


class LlamaCpp:
    """A loaded file; nothing in it is computed or cached in half precision."""

    def __init__(self, file: Path, threads: int = 2, context: int = 512) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = ggml_type.GGML_TYPE_F32
        # Fused attention rounds to half precision.
        settings.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup, settings.fit_params, settings.verbosity = False, False, 0
        self.server = xllamacpp.Server(settings)

    def tokens(self, text: str) -> list[int]:
        """What it makes of a text, special tokens in it included."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        return list(self._post("/tokenize", asked)["tokens"])

    def generate(
        self, prompt: str | list[int], tokens: int, likely: int = 1
    ) -> tuple[list[int], list[dict[int, float]]]:
        """Greedy tokens, and the log-probabilities of the `likely` most likely ones at every step."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": likely, "return_tokens": True,
                 "cache_prompt": False}  # fmt: skip
        answer = self._post("/completion", asked)
        steps = [
            {one["id"]: one["logprob"] for one in step["top_logprobs"]}
            for step in answer["completion_probabilities"]
        ]
        return answer["tokens"], steps

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

"""An embedding model with its plan: texts to vectors, in batches of so many tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slimformer.corpora.rows import token_batches
from slimformer.errors import DataError
from slimformer.model.anatomy import transformer_of
from slimformer.patching import patch
from slimformer.plans.given import method_of
from slimformer.plans.plan import Plan

Vectors = npt.NDArray[np.float32]
# Of all-MiniLM-L6-v2 on an AVX2 core, batches of 1024 to 8192 tokens are equally fast, to 3%; a GPU is busy with more.
CPU_TOKENS, GPU_TOKENS = 4096, 65536
# Of a configuration, what says nothing of the values that a model computes.
_OF_NO_VALUE = ("_name_or_path", "name_or_path", "transformers_version")


@dataclass(frozen=True)
class Encoding:
    """How texts become vectors: options of `SentenceTransformer.encode`, and the size of batches.

    Attributes:
        prompt_name: Which of the model's prompts stands in front of each; None for its default.
        truncate_dim: So many of the first numbers of each vector; None for all.
        normalize: Whether vectors get length 1.
        batch_tokens: Tokens of a batch, padding included; None for what suits the device.
    """

    prompt_name: str | None = None
    truncate_dim: int | None = None
    normalize: bool = False
    batch_tokens: int | None = None


def loader_of(model: str | Callable[[str], Any]) -> Callable[[str], Any]:
    """What makes a SentenceTransformer on a device that it is given, as every worker calls it.

    Args:
        model: Such a function, or a folder or Hub id that every worker can load.
    """
    return functools.partial(_load, model) if isinstance(model, str) else model


def _load(name: str, device: str) -> Any:
    # Slow to import, and only workers need it.
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    try:
        return SentenceTransformer(name, device=device)
    # transformers, the Hub's client and safetensors share no class of errors.
    except Exception as error:
        raise DataError(
            f"Cannot load {name} as an embedding model: {type(error).__name__}: {error}. Every worker must be able to."
        ) from error


class Embedder:
    """A SentenceTransformer that is patched and embeds whole shards.

    Args:
        load: Makes the model.
        plan: A plan, or where one is; without one only what loses nothing is applied.
        encoding: How it embeds.
        threads: On how many threads it computes on a CPU; None leaves that alone.

    Attributes:
        model: The patched model.
        fingerprint: SHA-256 over its weights, configuration, tokenizer, modules and plan: what makes its vectors.
        dimension: Numbers per vector.

    Raises:
        SlimformerError: If the model cannot be loaded, the plan does not fit it, or it has no such prompt.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        plan: Plan | str | os.PathLike[str] | None = None,
        encoding: Encoding | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            # Read when the tokenizer first works, and by what is loaded from here on.
            os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        self.encoding = Encoding() if encoding is None else encoding
        self.model = load()
        inner = transformer_of(self.model)
        prompts = getattr(self.model, "prompts", None) or {}
        name = self.encoding.prompt_name or getattr(self.model, "default_prompt_name", None)
        if name is not None and name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none"
            raise DataError(f"The model has no prompt {name!r}. Its prompts: {known}.")
        self._prompt = prompts.get(name, "") if name is not None else ""
        methods = [] if plan is None else [method_of(plan, inner)]
        self.fingerprint = _fingerprint(self.model, inner, *methods)
        patch(self.model, *methods)
        on_gpu = inner.device.type != "cpu"
        self._budget = self.encoding.batch_tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
        self.dimension = int(self._encoded(["a"]).shape[1])

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, dict[int, str]]:
        """The vectors of some texts, in their order.

        Texts are sorted by length and batched by tokens, always in the same way for the same texts.

        Args:
            texts: Texts, none of them blank.

        Returns:
            Vectors `[texts, dimension]` in float32, and why some have none, by their places; those are zero.

        Raises:
            DataError: If a batch does not fit into a GPU's memory.
        """
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        lengths = self._lengths(texts)
        reasons = {place: "gives no token" for place, length in enumerate(lengths) if length == 0}
        places = [place for place in range(len(texts)) if place not in reasons]
        for batch in token_batches([lengths[place] for place in places], self._budget):
            chosen = [places[index] for index in batch]
            vectors[chosen] = self._encoded([texts[place] for place in chosen])
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        reasons.update((int(place), "the model gives no finite vector") for place in broken)
        vectors[broken] = 0
        return vectors, reasons

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, its prompt included, as many as the model reads."""
        if not texts:
            return []
        limit = getattr(self.model, "max_seq_length", None)
        encoded = self.model.tokenizer(
            [self._prompt + text for text in texts],
            padding=False,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )
        return [len(ids) for ids in encoded["input_ids"]]

    def _encoded(self, texts: list[str]) -> Vectors:
        try:
            found = self.model.encode(
                texts,
                prompt_name=self.encoding.prompt_name,
                batch_size=len(texts),
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=self.encoding.normalize,
                truncate_dim=self.encoding.truncate_dim,
            )
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"A batch of {len(texts)} texts of at most {self._budget} tokens does not fit into the GPU's memory. "
                "Give fewer tokens (--batch-tokens): what is finished stays."
            ) from error
        return np.asarray(found, dtype=np.float32)


def _fingerprint(model: Any, inner: Any, *methods: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().data)
    config = {k: v for k, v in inner.config.to_diff_dict().items() if k not in _OF_NO_VALUE}
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    splits = {} if tokenizer is None else json.loads(tokenizer.to_str())
    modules = [(type(module).__name__, _config_of(module)) for module in model.children()]
    plans = [method.to_dict()["methods"] for method in methods if isinstance(method, Plan)]
    said = {
        "config": config,
        # Both change with every call.
        "tokenizer": {k: v for k, v in splits.items() if k not in ("truncation", "padding")},
        "modules": modules,
        "prompts": getattr(model, "prompts", None),
        "max_seq_length": getattr(model, "max_seq_length", None),
        "plans": plans or [repr(method) for method in methods],
    }
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for method in methods:
        if isinstance(method, Plan):
            for name, tensor in sorted(method.tensors().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_of(module: Any) -> Any:
    read = getattr(module, "get_config_dict", None)
    return read() if callable(read) else None

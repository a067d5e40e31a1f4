"""Load a model and its tokenizer by folder or Hub id, or say in one line why that failed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from slimformer.cli.cpu_dtype import in_fast_dtype
from slimformer.errors import SlimformerError
from slimformer.model.anatomy import find_anatomy

_LONGEST_REASON = 300
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Loaded with the head that predicts tokens; every other architecture is loaded without a head.
_WITH_HEAD = (
    (AutoModelForCausalLM, set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())),
    (AutoModelForImageTextToText, set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())),
)


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load a model for inference: with its language-model head where its architecture has one.

    Args:
        name: A folder or Hub id.
        device: `auto` takes a GPU where there is one.
        dtype: Name of a torch dtype; `auto` keeps the checkpoint's, or takes float32 on a CPU that multiplies that
            slowly.

    Raises:
        SlimformerError: If it cannot be loaded or moved there; the message names what was tried.
    """
    place = _device(device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = _attempt("a model configuration", name, lambda: AutoConfig.from_pretrained(name))
    architectures = getattr(config, "architectures", None) or []
    factory = next((auto for auto, known in _WITH_HEAD if known.intersection(architectures)), AutoModel)
    what = f"{', '.join(architectures) or 'a model'} through {factory.__name__}"
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _attempt(what, name, lambda: factory.from_pretrained(name, config=config, dtype=wanted))
    try:
        model = model.to(place).eval()
    except RuntimeError as error:
        raise SlimformerError(
            f"Cannot move {name} to the device {place}: {_reason(error)}. Give another --device."
        ) from error
    return in_fast_dtype(model, name) if dtype == "auto" else model


def load_embedder(name: str, device: str = "auto", dtype: str = "auto") -> Any:
    """Load an embedding pipeline; a checkpoint that brings none gets mean pooling from sentence-transformers.

    Args:
        name: A folder or Hub id.
        device: `auto` takes a GPU where there is one.
        dtype: Name of a torch dtype; `auto` keeps the checkpoint's, or takes float32 on a CPU that multiplies that
            slowly.

    Raises:
        SlimformerError: If it cannot be loaded, or sentence-transformers is not installed.
    """
    place = _device(device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise SlimformerError(
            "Embeddings need sentence-transformers, which is not installed: "
            'pip install "slimformer[embeddings]"'
        ) from error
    wanted = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    model = _attempt(
        "an embedding model",
        name,
        lambda: library.SentenceTransformer(name, device=str(place), model_kwargs=wanted),
    )
    if model.tokenizer.pad_token_id is None:
        # Texts of different lengths need one; which token it is does not matter, since it is masked.
        model.tokenizer.pad_token = model.tokenizer.eos_token
    return in_fast_dtype(model, name) if dtype == "auto" else model


def load_for_plan(name: str, device: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A decoder with its head, or an encoder with the pooling that makes its embeddings, and the tokenizer.

    Without sentence-transformers an encoder is loaded alone, where its folder names no pooling.

    Raises:
        SlimformerError: If it cannot be loaded.
    """
    model = load_model(name, device, dtype)
    if model.get_output_embeddings() is not None and find_anatomy(model).causal:
        return model, load_tokenizer(name)
    pipeline = os.path.isfile(os.path.join(name, "modules.json")) or not os.path.isdir(name)
    if pipeline or importlib.util.find_spec("sentence_transformers") is not None:
        embedder = load_embedder(name, device, dtype)
        return embedder, embedder.tokenizer
    return model, load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        SlimformerError: If there is none that can be loaded.
    """
    return _attempt("a tokenizer", name, lambda: AutoTokenizer.from_pretrained(name))


def _attempt(what: str, name: str, load: Any) -> Any:
    try:
        return load()
    # transformers, the Hub client and safetensors share no base class of errors.
    except Exception as error:
        if not os.path.isdir(name) and not _HUB_ID.fullmatch(name):
            raise SlimformerError(
                f"There is no folder {name}, and a Hub id looks like owner/name. Give a folder with a transformers "
                "checkpoint (config.json, weights, tokenizer files) or a Hub id."
            ) from error
        where = (
            f"the folder {name}"
            if os.path.isdir(name)
            else f"the Hub id {name!r}, as there is no such folder"
        )
        raise SlimformerError(
            f"Cannot load {what} from {where}: {_reason(error)}. Give a folder with a transformers checkpoint "
            "(config.json, weights, tokenizer files) or a Hub id (owner/name)."
        ) from error


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()).rstrip(".")
    if len(words) > _LONGEST_REASON:
        words = words[:_LONGEST_REASON] + "..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _device(name: str) -> torch.device:
    if name == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        # Under accelerate launch every process has a GPU of its own.
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SlimformerError(
            f"There is no device {name!r}. Allowed are cpu, cuda, cuda:1, mps and the like, or auto."
        ) from error

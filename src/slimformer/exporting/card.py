"""The card of an exported model: what was left out of which model, what was measured, and what loads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimformer.exporting.source import Source
from slimformer.plans.base_model import CARD, card_metadata, in_folder
from slimformer.plans.card import base_of, card_base, commands, figures_of, written_card
from slimformer.plans.plan import Plan

_SENTENCES = "sentence-transformers"
# What is to be installed, and how a folder is then loaded.
_LOADED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "nemotron-nas": ("slimformer", "sh", ("pip install slimformer vllm", "vllm serve {name}")),
    "slimformer": ("slimformer", "sh", ("pip install slimformer vllm", "vllm serve {name}")),
    "gguf": ("gguf", "sh", ("llama-server -m {name}/model.gguf",)),
    "onnx": (
        "transformers",
        "python",
        (
            "from optimum.onnxruntime import ORTModelForFeatureExtraction",
            "",
            'model = ORTModelForFeatureExtraction.from_pretrained("{name}")',
        ),
    ),
}
_PIPELINES: Mapping[str, tuple[str, ...]] = {
    "checkpoint": ('model = SentenceTransformer("{name}")',),
    "onnx": ('model = SentenceTransformer("{name}", backend="onnx")',),
}


def write_card(
    folder: Path,
    earlier: Path,
    name: str,
    given: Any,
    source: Source,
    plan: Plan,
    format: str,
    config: Any,
    left: tuple[int, int],
    cosine: tuple[float, float] | None,
) -> None:
    """Write a card into the folder of an export; what the checkpoint's own card says is not taken along.

    Args:
        folder: The export, before it has its name.
        earlier: What it replaces, if it is there: what somebody wrote into that one's card stays.
        name: What the folder is called.
        given: The model as `export` got it.
        source: The checkpoint.
        plan: What was left out.
        format: In which format.
        config: The checkpoint's.
        left: How many layers are left of how many.
        cosine: What int8 costs, on average and at most.
    """
    base = _base(given, source, plan)
    library, language, lines = _loaded(format, source.pipeline, config)
    metadata = {
        "library_name": library,
        **card_base(base),
        "tags": ["slimformer", "pruned", *([format] if format in ("onnx", "gguf") else [])],
    }
    if source.pipeline:
        metadata["pipeline_tag"] = "sentence-similarity"
    of = base.get("id") or base.get("name") or getattr(config, "model_type", "a model")
    parts = [
        f"# {name}",
        f"{of} with {left[0]} of its {left[1]} layers, written by slimformer in the format {format}. What is left is "
        "its own, apart from what repair changed.",
        *figures_of(plan),
        *_rounded(cosine),
        "## Use",
        commands([line.format(name=name) for line in lines], language),
    ]
    if (earlier / CARD).is_file():
        shutil.copyfile(earlier / CARD, folder / CARD)
    text = written_card(folder / CARD, metadata, "\n\n".join(parts))
    if text is not None:
        (folder / CARD).write_text(text, encoding="utf-8")


def _base(given: Any, source: Source, plan: Plan) -> dict[str, Any]:
    """Where the model came from: what the plan knows, then the Hub id that was given, then the folder."""
    found = dict(base_of(plan))
    if isinstance(given, (str, os.PathLike)):
        own = in_folder(source.folder)
        if isinstance(given, str) and not os.path.isdir(given):
            own = {**own, "id": given}
        found = {**own, **found}
    else:
        place = str(getattr(getattr(given, "config", None), "_name_or_path", "") or "")
        if os.path.isdir(place):
            found = {**in_folder(Path(place)), **found}
    task = card_metadata(source.folder / CARD).get("pipeline_tag")
    return {**({"pipeline_tag": task} if task else {}), **found}


def _loaded(format: str, pipeline: bool, config: Any) -> tuple[str, str, tuple[str, ...]]:
    """The library of an export, and code that loads it with the language it is in."""
    if pipeline and format in _PIPELINES:
        head = ("from sentence_transformers import SentenceTransformer", "")
        return _SENTENCES, "python", (*head, *_PIPELINES[format])
    if format in _LOADED:
        return _LOADED[format]
    auto = next(iter(getattr(config, "architectures", None) or []), "AutoModel")
    return (
        "transformers",
        "python",
        (f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{{name}}")'),
    )


def _rounded(cosine: tuple[float, float] | None) -> list[str]:
    if cosine is None:
        return []
    return [
        "## In int8",
        f"Mean token vectors of texts keep a cosine of {cosine[0]:.4f} to those in float32, at least {cosine[1]:.4f}.",
    ]

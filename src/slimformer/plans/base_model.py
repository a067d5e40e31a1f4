"""What a plan says of the model it was made for: its name on the Hub, its revision and licence, as far as known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

CARD = "README.md"
# Of a checkpoint's card, what holds of whatever is made of it.
INHERITED = ("license", "license_name", "license_link", "language")


def base_model_of(config: Any, causal: bool) -> dict[str, Any]:
    """Where a model came from, for a plan's provenance; asks nobody.

    Args:
        config: The model's; it says which folder or Hub id it was loaded from.
        causal: Whether it predicts tokens.

    Returns:
        `name`; `id` and `revision` where it is the Hub's and they are known; what its card says of the licence; the
        task as the Hub calls it.
    """
    given = str(getattr(config, "_name_or_path", "") or "")
    task = {"pipeline_tag": "text-generation" if causal else "feature-extraction"}
    if not given:
        return task
    if os.path.isdir(given):
        return {**in_folder(Path(given)), **task}
    found: dict[str, Any] = {"name": given.rpartition("/")[2], "id": given}
    commit = getattr(config, "_commit_hash", None)
    return {**found, **({"revision": commit} if isinstance(commit, str) else {}), **task}


def in_folder(folder: Path) -> dict[str, Any]:
    """What a checkpoint's folder says of itself; a snapshot in the Hub's cache is named after its repository."""
    resolved = folder.absolute()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        owner = repository.removeprefix("models--").replace("--", "/", 1)
        found = {"name": owner.rpartition("/")[2], "id": owner, "revision": resolved.name}
    else:
        found = {"name": resolved.name}
    metadata = card_metadata(folder / CARD)
    return {**found, **{name: metadata[name] for name in INHERITED if name in metadata}}


def card_metadata(file: Path) -> Mapping[str, Any]:
    """The metadata of a card; nothing where there is no card, or it holds none that can be read."""
    try:
        content = file.read_text(encoding="utf-8")
        return ModelCard(content, ignore_metadata_errors=True).data.to_dict() if content[:3] == "---" else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError, HfHubHTTPError):
        return {}

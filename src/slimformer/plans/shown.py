"""What is shown of a plan, or of a model that was exported with one: only small files are read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from slimformer.errors import PlanError
from slimformer.plans.base_model import CARD
from slimformer.plans.card import card_part
from slimformer.plans.plan import FILE, Plan


def read_shown(path: str) -> Plan | str:
    """A plan without its weights; or, of an exported model, what slimformer wrote into its card.

    Args:
        path: A folder, a plan's file, or a Hub id, of which neither weights nor anything else that is large is
            downloaded.

    Raises:
        PlanError: If there is neither.
    """
    try:
        return Plan.from_pretrained(path, weights=False)
    except PlanError:
        # What is wrong with a plan is not to be hidden by the card beside it.
        part = None if (Path(path) / FILE).exists() else _card_of(path)
        if part is None:
            raise
        return part


def _card_of(path: str) -> str | None:
    file = Path(path) / CARD
    try:
        if not Path(path).exists() and path.count("/") == 1 and not path.startswith("."):
            file = Path(hf_hub_download(path, CARD))
        return card_part(file.read_text(encoding="utf-8"))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None

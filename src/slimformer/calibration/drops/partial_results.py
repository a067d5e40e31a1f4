"""What an interrupted calibration has measured, kept in a folder so that the same call goes on from there."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimformer.calibration.drops.search import Step
from slimformer.calibration.drops.similarity import UNITS, Similarity, Unit
from slimformer.errors import CalibrationError

_FILE = "calibration.json"
_logger = logging.getLogger("slimformer")


class PartialResults:
    """Similarity and removals of one calibration, written after each of them.

    Args:
        folder: Where they are kept; None keeps nothing.
        identity: What must be equal for results to be taken over: text, model, and the arguments that decide which
            removal comes next. When to stop is not among them.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.file = None if folder is None else Path(folder) / _FILE
        self.content: dict[str, Any] = {"identity": json.loads(json.dumps(identity)), "steps": []}
        try:
            found = {} if self.file is None else json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}  # none, or a file cut short: calibration starts anew
        if not isinstance(found, dict) or "identity" not in found:
            return
        if found["identity"] == self.content["identity"]:
            self.content = found
            _logger.info("Going on from the partial results in %s.", folder)
        else:
            _logger.info(
                "The partial results in %s are of another text, model or setting: starting anew.", folder
            )

    def kept(self, name: str) -> Any:
        """What was kept under a name; None if nothing was."""
        return self.content.get(name)

    def keep(self, name: str, value: Any) -> None:
        """Write a value that JSON can hold."""
        self._write({**self.content, name: value})

    def similarity(self) -> Similarity | None:
        """The cosines, if they were measured."""
        found = self.kept("similarity")
        if found is None:
            return None
        return Similarity(tokens=found["tokens"], **{unit: tuple(found[unit]) for unit in UNITS})

    def keep_similarity(self, similarity: Similarity) -> None:
        """Write the cosines."""
        self.keep("similarity", dataclasses.asdict(similarity))

    def steps(self) -> list[Step]:
        """The removals so far."""
        return [
            Step(step["kind"], step["layer"], step["divergence"], step.get("sources", {}))
            for step in self.content["steps"]
        ]

    def singles(self) -> dict[tuple[Unit, int], dict[str, float]]:
        """The divergences of candidates that are removed alone."""
        return {(one["kind"], one["layer"]): one["sources"] for one in self.kept("singles") or ()}

    def keep_singles(self, singles: Mapping[tuple[Unit, int], Mapping[str, float]]) -> None:
        """Write them."""
        self.keep(
            "singles",
            [{"kind": kind, "layer": layer, "sources": dict(of)} for (kind, layer), of in singles.items()],
        )

    def keep_steps(self, steps: Sequence[Step]) -> None:
        """Write the removals."""
        self.keep("steps", [step.to_dict() for step in steps])

    def _write(self, content: dict[str, Any]) -> None:
        self.content = content
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".new")
            temporary.write_text(json.dumps(content), encoding="utf-8")
            os.replace(temporary, self.file)
        except OSError as error:
            raise CalibrationError(
                f"Partial results cannot be kept in {self.file.parent}: {error}. Give another checkpoint folder."
            ) from error

"""What happened in a training, and its state in a folder, from which the same training goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from slimformer.errors import CalibrationError

_STATE, _HISTORY, _BEST = "state", "training.json", "best.safetensors"


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        losses: The training loss of every step.
        measured: What `after_step` returned, by step.
        held_out: What `EarlyStop` measured, by step; `"0"` is before the first.
    """

    losses: list[float] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The step after which the held-out figure was lowest, the earliest of equals."""
        return int(min(self.held_out, key=self.held_out.__getitem__))


class Checkpoint:
    """The state of one training in a folder: written beside the old one and then renamed.

    Args:
        folder: Where; None keeps nothing.
        identity: What must be equal for a state to be taken over.
        accelerator: What knows the state.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any], accelerator: Any
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.accelerator = accelerator
        self.best: dict[str, Tensor] | None = None

    def resume(self) -> History:
        """What has happened so far, with the state put back; nothing where the folder has no state of this training."""
        if self.folder is None:
            return History()
        try:
            content = json.loads((self.folder / _STATE / _HISTORY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return History()  # none, or one cut short: training starts anew
        if content.get("identity") != self.identity:
            return History()
        self.accelerator.load_state(str(self.folder / _STATE))
        if (self.folder / _STATE / _BEST).exists():
            self.best = safetensors.torch.load_file(self.folder / _STATE / _BEST)
        return History(content["losses"], content["measured"], content["held_out"])

    def write(self, history: History) -> None:
        """Keep the state.

        Raises:
            CalibrationError: If it cannot be written.
        """
        if self.folder is None or not history.losses:
            return
        new, old = self.folder / f"{_STATE}.new", self.folder / _STATE
        try:
            new.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(new))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                content = {"identity": self.identity, **dataclasses.asdict(history)}
                if self.best is not None:
                    safetensors.torch.save_file(self.best, new / _BEST)
                (new / _HISTORY).write_text(json.dumps(content), encoding="utf-8")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(new, old)
            self.accelerator.wait_for_everyone()
        except OSError as error:
            raise CalibrationError(
                f"The checkpoint cannot be kept in {self.folder}: {error}. Give another folder."
            ) from error

    def place(self) -> str:
        """Where the last state is, as a sentence with a space behind; nothing if there is none."""
        if self.folder is None or not (self.folder / _STATE).is_dir():
            return ""
        return f"The last good checkpoint is in {self.folder / _STATE}. "


class Interrupted(Exception):
    """Ctrl-C was pressed, and the step that was under way is done."""


class InterruptsBetweenSteps:
    """Lets a step finish when Ctrl-C is pressed, since half of one cannot be kept; pressed twice, it ends at once.

    Other threads than the main one get no signals, and are left alone.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.before: Any = None

    def __enter__(self) -> InterruptsBetweenSteps:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _press(self, number: int, frame: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def check(self) -> None:
        """Stop here if it was pressed."""
        if self.pressed:
            raise Interrupted

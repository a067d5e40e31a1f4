"""A plan: the methods chosen for one model, what they were chosen by, and what was measured with them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from slimformer.anatomy import Anatomy, Kind, find_anatomy
from slimformer.errors import PlanError, SlimformerWarning
from slimformer.executor import SublayerPlan
from slimformer.methods.layer_drop import LayerDrop

FORMAT = 1
FILE = "slimformer.json"
METHODS: dict[str, type[LayerDrop]] = {"LayerDrop": LayerDrop}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What must agree between the model a plan was made for and the one it is applied to."""
    anatomy = find_anatomy(model)
    config = anatomy.stack.config
    return {
        "model_type": config.model_type,
        "structure": anatomy.structure.name,
        "layers": len(anatomy.layers),
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
    }


@dataclass(frozen=True)
class Plan:
    """Methods in order, the model they were made for, and how they came about.

    A plan is itself a method: `slimformer.patch(model, plan)` applies it.

    Attributes:
        methods: What to apply.
        fingerprint: `fingerprint(model)` of the model it was made for; empty means any model.
        provenance: Data, tokens, seed, values per sublayer: whatever reproduces the choice.
        measured: Quality and speed beside dense.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Plan([LayerDrop(attention=[3])]).save_pretrained(folder)
        >>> Plan.from_pretrained(folder).methods
        (LayerDrop(attention=(3,), mlp=(), block=()),)
    """

    methods: Sequence[LayerDrop]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise PlanError("A plan needs at least one method, and none was given.")

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        """The decisions of all its methods; refused for another model than it was made for.

        Raises:
            PlanError: If the model differs from the plan's, naming the difference.
        """
        actual = fingerprint(anatomy.stack)
        for name, expected in self.fingerprint.items():
            if actual.get(name) != expected:
                raise PlanError(
                    f"This plan was made for another model: its {name} is {expected!r}, and this model's is "
                    f"{actual.get(name)!r}. Calibrate a plan for this model."
                )
        decisions: dict[tuple[int, Kind], SublayerPlan] = {}
        for method in self.methods:
            decisions.update(method.sublayer_plans(anatomy))
        return decisions

    def to_dict(self) -> dict[str, Any]:
        """The content of the plan's JSON file."""
        skip: dict[str, list[str]] = {}
        for method in self.methods:
            for name, layers in (
                ("self_attn", (*method.attention, *method.block)),
                ("mlp", (*method.mlp, *method.block)),
            ):
                for index in layers:
                    skip.setdefault(str(index), []).append(name)
        return {
            "format": FORMAT,
            "fingerprint": dict(self.fingerprint),
            "methods": [{"method": type(m).__name__, **dataclasses.asdict(m)} for m in self.methods],
            # The vocabulary of transformers' own per-layer configuration.
            "per_layer_config": {
                index: {"skip": names} for index, names in sorted(skip.items(), key=lambda s: int(s[0]))
            },
            "provenance": dict(self.provenance),
            "measured": dict(self.measured),
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `slimformer.json` into `folder`, creating it.

        The file is written beside the old one and then renamed, so a full disk or an interruption loses nothing.

        Raises:
            PlanError: If the folder cannot be written, or is a file.
        """
        target = Path(folder)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        temporary = ""
        try:
            target.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target, prefix=".slimformer-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target / FILE)
        except OSError as error:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
            raise PlanError(
                f"Could not save the plan in {target}: {error}. An older plan there is unharmed."
            ) from error

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a folder or its JSON file.

        Raises:
            PlanError: If there is none, it is damaged, newer than this version reads, or names an unknown method.
        """
        given = Path(path)
        if given.suffix in _PICKLES:
            raise PlanError(
                f"{given} may hold a pickle, which can run code when read. A plan is a folder with {FILE}."
            )
        file = given / FILE if given.is_dir() else given
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(
                f"No plan at {file}: {error.strerror}. Expected a folder that holds {FILE}."
            ) from error
        except ValueError as error:
            raise PlanError(f"{file} is damaged: {error}. Save the plan again.") from error
        return cls._from_dict(content, file)

    @classmethod
    def _from_dict(cls, content: Any, file: Path) -> Plan:
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise PlanError(f"{file} is not a plan: it has no format number.")
        if content["format"] > FORMAT:
            raise PlanError(
                f"{file} has format {content['format']}, and this version reads up to {FORMAT}. Upgrade slimformer."
            )
        try:
            methods = [_read_method(dict(entry), file) for entry in content["methods"]]
            parts = {name: content.get(name, {}) for name in ("fingerprint", "provenance", "measured")}
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"{file} is damaged: its methods cannot be read ({error!r}). Save the plan again."
            ) from error
        return cls(methods, **parts)


def _read_method(entry: dict[str, Any], file: Path) -> LayerDrop:
    name = entry.pop("method")
    if name not in METHODS:
        raise PlanError(
            f"{file} uses the method {name!r}, which this version does not know; known are {', '.join(METHODS)}. "
            "Ignoring it would change results. Upgrade slimformer."
        )
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    unknown = sorted(set(entry) - known)
    if unknown:
        warnings.warn(
            f"{file}: {name} has newer fields that are ignored: {unknown}.", SlimformerWarning, stacklevel=4
        )
    return METHODS[name](**{key: value for key, value in entry.items() if key in known})

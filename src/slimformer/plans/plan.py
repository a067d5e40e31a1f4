"""A plan: the methods chosen for one model, what they were chosen by, and what was measured with them.

On disk it is a folder: `slimformer.json` and, where a method has learned weights, `slimformer.safetensors`. Nothing in
it can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from slimformer.calls.layer_calls import layers_by_depth
from slimformer.decisions.policy import Decision, TokenPolicy
from slimformer.decisions.registry import (
    field_names,
    made,
    name_of,
    reads_plans,
    registered,
    settings_of,
    tensors_of,
)
from slimformer.errors import PlanError, SlimformerWarning
from slimformer.methods import load_all
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.anatomy import Anatomy, find_anatomy
from slimformer.model.layer_parts import Kind
from slimformer.plans.base_model import CARD
from slimformer.plans.card import base_of, plan_card, plan_name, written_card
from slimformer.plans.files import mapping, read_json, read_weights, shapes_of, stand_ins
from slimformer.plans.replaced_files import replace_all, write_beside
from slimformer.transforms.transform import Attentions, AttentionTransform, transformed_by

FORMAT = 1
FILE = "slimformer.json"
WEIGHTS = "slimformer.safetensors"


# A token policy or an attention transform, registered under a name.
PlannedMethod: TypeAlias = TokenPolicy | AttentionTransform
# Every name that a plan of this library has is known from here on; reading one imports nothing.
load_all()
_MOST_LAYERS = 10_000
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What must agree between the model a plan was made for and the one it is applied to."""
    anatomy = layers_by_depth(find_anatomy(model))
    config = anatomy.stack.config
    return {
        "model_type": config.model_type,
        "structure": anatomy.structure.name,
        "layers": len(anatomy.layers),
        "hidden_size": _of_all(config, "hidden_size"),
        "attention_heads": _of_all(config, "num_attention_heads"),
        "vocabulary": _of_all(config, "vocab_size"),
    }


def _of_all(config: Any, name: str) -> Any:
    """A config's number; None where the model has none, or not one for all layers."""
    try:
        return getattr(config, name, None)
    # transformers' word for the second.
    except RuntimeError:
        return None


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
        (LayerDrop(attention=(3,), mlp=(), block=(), replace='nothing', taps=1),)
    """

    methods: Sequence[PlannedMethod]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    # Pages of numbers, which `slimformer show` puts in order.
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    measured: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise PlanError("A plan needs at least one method, and none was given.")

    @property
    def drops(self) -> tuple[LayerDrop, ...]:
        """Those of its methods that drop sublayers."""
        return tuple(method for method in self.methods if isinstance(method, LayerDrop))

    @property
    def exit(self) -> int | None:
        """How many layers run, where a method stops at one."""
        return min((method.layer for method in self.methods if isinstance(method, EarlyExit)), default=None)

    def dropped(self, kind: Kind) -> tuple[int, ...]:
        """The layers without this sublayer, each once; those above an exit only where the model is known."""
        listed = [layer for method in self.drops for layer in method.dropped(kind)]
        count = self.fingerprint.get("layers")
        # A plan may come from anywhere, and a number that no model has would take all memory.
        known = self.exit is not None and isinstance(count, int) and count <= _MOST_LAYERS
        above = range(self.exit or 0, count or 0) if known else range(0)
        return tuple(dict.fromkeys((*listed, *above)))

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
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
        decisions: dict[tuple[int, Kind], Decision] = {}
        for method in self.methods:
            if isinstance(method, TokenPolicy):
                for sublayer, decision in method.decisions(anatomy).items():
                    decisions[sublayer] = decisions.get(sublayer, Decision()) & decision
        return decisions

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """What all its attention transforms change, in order."""
        return transformed_by(self.methods, attentions)

    def to_dict(self) -> dict[str, Any]:
        """The content of the plan's JSON file."""
        skip: dict[str, list[str]] = {}
        for name, layers in (("self_attn", self.dropped("attention")), ("mlp", self.dropped("mlp"))):
            for index in layers:
                skip.setdefault(str(index), []).append(name)
        return {
            "format": FORMAT,
            "fingerprint": dict(self.fingerprint),
            "methods": [{"method": _name(method), **settings_of(method)} for method in self.methods],
            # The vocabulary of transformers' own per-layer configuration.
            "per_layer_config": {
                index: {"skip": names} for index, names in sorted(skip.items(), key=lambda s: int(s[0]))
            },
            "provenance": dict(self.provenance),
            "measured": dict(self.measured),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The content of the plan's safetensors file: the weights of every method behind its number."""
        return {
            f"{number}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for number, method in enumerate(self.methods)
            for name, tensor in tensors_of(method).items()
        }

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: bool = True) -> None:
        """Write the plan into `folder`, creating it, with a model card.

        The files are written beside the old ones and then renamed, so a full disk or a failed write loses nothing.

        Args:
            folder: Where to.
            card: Whether to write the card, `README.md`. What somebody wrote into an earlier one stays; one that
                slimformer did not write, or whose own part was edited, stays as it is, with a warning.

        Raises:
            PlanError: If the folder cannot be written, or is a file.
        """
        self._save(Path(folder), Path(folder).absolute().name, card)

    def _save(self, target: Path, name: str, card: bool) -> None:
        content, tensors = self.to_dict(), self.tensors()
        written: list[tuple[str, str]] = []
        try:
            target.mkdir(parents=True, exist_ok=True)
            if tensors:
                weights = safetensors.torch.save(tensors)
                content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
                content["weights"] = shapes_of(tensors)
                write_beside(target / WEIGHTS, weights, written)
            write_beside(target / FILE, (json.dumps(content, indent=2) + "\n").encode(), written)
            text = written_card(target / CARD, *plan_card(self, name)) if card else None
            if text is not None:
                write_beside(target / CARD, text.encode(), written)
            replace_all(written)
            if not tensors:
                (target / WEIGHTS).unlink(missing_ok=True)
        except OSError as error:
            raise PlanError(
                f"Could not save the plan in {target}: {error}. An older plan there is unharmed."
            ) from error
        finally:
            for temporary, _ in written:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> str:
        """Upload the plan and its card to a model repository of the Hub, creating it if need be.

        What somebody wrote into the repository's card stays, as in `save_pretrained`.

        Args:
            repo_id: Such as `"me/SmolLM2-135M-slim-attn8"`; left out, a repository of your own, named like this after
                the plan's model.
            options: For `huggingface_hub.HfApi.upload_folder`, such as `token` or `commit_message`.

        Returns:
            The address of the commit.

        Raises:
            PlanError: If the Hub refuses, or the plan does not say which model it is for and no name is given.
        """
        token = options.pop("token", None)
        api, repo_id = HfApi(token=token), repo_id or self._name()
        try:
            with tempfile.TemporaryDirectory() as folder:
                repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
                with contextlib.suppress(EntryNotFoundError):
                    hf_hub_download(
                        repo_id, CARD, revision=options.get("revision"), token=token, local_dir=folder
                    )
                self._save(Path(folder), repo_id, card=True)
                files = [FILE, WEIGHTS, CARD]
                return str(
                    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, **options)
                )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise PlanError(f"Could not push the plan to {repo_id}: {error}") from error

    def _name(self) -> str:
        base = base_of(self).get("name")
        if not isinstance(base, str) or not base:
            raise PlanError(
                "This plan does not say which model it was made for, so that it has no name of its own. Give one: "
                'plan.push_to_hub("me/my-model-slim-attn8").'
            )
        return plan_name(base, self)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, weights: bool = True, **options: Any) -> Plan:
        """Read a plan from a folder, its JSON file, or a repository of the Hub.

        Args:
            path: The folder or file, or a Hub id (`"owner/name"`) where no such folder exists.
            weights: Without, learned weights are neither downloaded nor read: tensors without values stand for them,
                with which the plan can be looked at and not applied. Plans of version 0.1.0 are read whole.
            options: For `huggingface_hub.snapshot_download`, such as `revision` or `token`.

        Raises:
            PlanError: If there is none, it is damaged, newer than this version reads, or names an unknown method.
        """
        given = Path(path)
        if given.suffix in _PICKLES:
            raise PlanError(
                f"{given} may hold a pickle, which can run code when read. A plan is a folder with {FILE}."
            )
        if not given.exists() and isinstance(path, str) and path.count("/") == 1 and not path.startswith("."):
            given = _download(path, options, [FILE, WEIGHTS] if weights else [FILE])
            if not weights and _weights_unknown(read_json(given / FILE)):
                given = _download(path, options, [FILE, WEIGHTS])
        file = given / FILE if given.is_dir() else given
        return cls._from_dict(read_json(file), file, weights)

    @classmethod
    def _from_dict(cls, content: Any, file: Path, weights: bool) -> Plan:
        _check_format(content, file)
        digest = content.get("weights_sha256")
        tensors = None if weights or digest is None else stand_ins(content.get("weights"))
        if tensors is None:
            tensors = read_weights(file.with_name(WEIGHTS), digest)
        return cls._of(content, tensors, file)

    @classmethod
    def _of(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], file: object) -> Plan:
        try:
            entries = content["methods"]
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise TypeError("methods is no list of objects")
            methods = [
                _read_method(dict(entry), _of_method(number, tensors), file)
                for number, entry in enumerate(entries)
            ]
            parts = {name: mapping(content, name) for name in ("fingerprint", "provenance", "measured")}
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise PlanError(
                f"{file} is damaged: its methods cannot be read ({error!r}). Save the plan again."
            ) from error
        return cls(methods, **parts)


def _check_format(content: Any, file: object) -> None:
    number = content.get("format") if isinstance(content, Mapping) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise PlanError(f"{file} is not a plan: it has no format number.")
    if number > FORMAT:
        raise PlanError(
            f"{file} has format {number}, and this version reads up to {FORMAT}. Upgrade slimformer."
        )


@reads_plans
def _plan_in_a_method(given: Any, weights: Mapping[str, Tensor]) -> Plan:
    if isinstance(given, (str, os.PathLike)):
        return Plan.from_pretrained(given)
    if isinstance(given, Mapping):
        _check_format(given, "The plan within a plan")
        return Plan._of(given, weights, "The plan within a plan")
    return given if isinstance(given, Plan) else Plan([given])


def _download(repo_id: str, options: dict[str, Any], files: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files, **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PlanError(
            f"No plan at {repo_id}: there is no such folder, and the Hub gave none ({reason[0]}). "
            f"Expected a folder that holds {FILE}."
        ) from error


def _weights_unknown(content: Any) -> bool:
    """Whether a plan has weights, and its JSON does not say which."""
    return (
        isinstance(content, dict)
        and "weights_sha256" in content
        and stand_ins(content.get("weights")) is None
    )


def _of_method(number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lead = f"{number}."
    return {name[len(lead) :]: tensor for name, tensor in tensors.items() if name.startswith(lead)}


def _name(method: PlannedMethod) -> str:
    name = name_of(method)
    if name is None:
        kind = type(method).__name__
        raise PlanError(
            f"{kind} is not registered, so no plan that holds it could be read again. Write "
            f'@slimformer.register("a-name") above the class {kind}.'
        )
    return name


def _read_method(entry: dict[str, Any], weights: Mapping[str, Tensor], file: object) -> PlannedMethod:
    name = entry.pop("method")
    method = registered().get(name)
    if method is None:
        raise PlanError(
            f"{file} uses the method {name!r}, which is not known here; known are {', '.join(registered())}. Ignoring "
            "it would change results. If a newer version made the plan, upgrade slimformer. If the method is your own "
            f"or a library's, import what defines it, with @slimformer.register({name!r}) above the class, before the "
            "plan is read: a plan imports nothing."
        )
    known = field_names(method)
    unknown = sorted(set(entry) - set(known))
    if unknown:
        warnings.warn(
            f"{file}: {name} has newer fields that are ignored: {unknown}.", SlimformerWarning, stacklevel=4
        )
    return cast(
        PlannedMethod, made(method, {key: value for key, value in entry.items() if key in known}, weights)
    )

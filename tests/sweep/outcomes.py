"""What becomes of one model class under a patch, and the largest error of every condition."""

from __future__ import annotations

import contextlib
import copy
import re
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import slimformer
from slimformer import LayerDrop
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.model.layer_parts import KINDS, Kind
from slow_rows import kept, positions, slowly
from sweep.classes import Family
from sweep.models import build
from sweep.subject import LAYOUTS, TOKENS, batch, continued, error, given, outputs, real, steps, typical_error

Outcome = Literal["rows", "sublayers", "refused", "wrong", "crashed", "cannot be built"]
# In float32 a patch changes the order of additions only.
FLOAT32 = 2e-4
# In half precision: so many times the error of the unpatched model, and one rounding of bfloat16.
TIMES, FLOOR = 3.0, 4e-3
# What a module that mixes tokens is called, by the classes themselves.
_MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|recurrent", re.IGNORECASE)
# Two models that differ by less are one.
DIFFERENT = 1e-3


@dataclass
class Result:
    """The outcome of one class.

    Attributes:
        name: The family.
        use: `"decoder"` or `"encoder"`.
        model: The name of the class.
        variant: Whether it is one class under other settings, which is counted once.
        outcome: What became of it.
        detail: The error message, or the condition that was wrong.
        errors: The error of every condition that ran, as measured.
        limits: What it was allowed to be.
        skipped: Conditions that the unpatched model cannot do itself, and why.
        notes: What single layers cannot do, or which sublayers can be dropped.
        seconds: How long all of it took.
    """

    name: str
    use: str
    model: str
    variant: bool = False
    outcome: Outcome = "rows"
    detail: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def measure(self, condition: str, value: float, limit: float) -> None:
        """Note an error and its bound."""
        self.errors[condition], self.limits[condition] = value, limit

    def wrong(self) -> dict[str, float]:
        """The conditions beyond their bound, the worst first. NaN is beyond every bound."""
        beyond = {c: e for c, e in self.errors.items() if not e <= self.limits[c]}
        return dict(sorted(beyond.items(), key=lambda c: -c[1] if c[1] == c[1] else float("-inf")))


class _Changed(Exception):
    """A condition that is right or wrong without a figure."""


def outcome_of(family: Family) -> Result:
    """Build the model, patch it in every condition, undo, and say what came of it. Never raises."""
    result = Result(family.name, family.use, family.model.__name__, bool(family.settings))
    began = time.monotonic()
    try:
        model = build(family)
        with torch.no_grad():
            whole = outputs(model, given(family, model, "none"))
        if not bool(whole.isfinite().all()):
            raise ValueError("its outputs are not finite")
    except Exception as failed:
        result.outcome, result.detail = "cannot be built", said(failed)
    else:
        try:
            _Examination(family, model, result).run()
        except _Changed as changed:
            result.outcome, result.detail = "wrong", str(changed)
        except Exception as failed:
            result.outcome, result.detail = "crashed", said(failed)
        wrong = result.wrong()
        if wrong:
            result.detail = ", ".join(
                f"{c} {e:.2g} (allowed {result.limits[c]:.2g})" for c, e in wrong.items()
            ) + (f"; {result.detail}" if result.outcome in ("wrong", "crashed") else "")
            result.outcome = "crashed" if result.outcome == "crashed" else "wrong"
    result.seconds = round(time.monotonic() - began, 2)
    return result


class _Examination:
    """All conditions of one model, in the order in which they build on each other."""

    def __init__(self, family: Family, model: PreTrainedModel, result: Result) -> None:
        self.family, self.model, self.result = family, model, result
        # What the unpatched model gives in float32.
        self.dense: dict[str, Tensor] = {}
        # Whether its steps with a cache give what one pass gives.
        self.steps_agree = False
        self.state = _state(model)

    def run(self) -> None:
        for layout in LAYOUTS:
            with self._by_itself(f"float32 {layout}"):
                self.dense[layout] = self._outputs(self.model, layout)
        if self.family.use == "decoder":
            with self._by_itself("float32 cached"):
                self.dense["cached"] = steps(self.family, self.model)
        try:
            slimformer.patch(self.model)
        except UnsupportedModelError as refused:
            self.result.outcome, self.result.detail = "refused", said(refused)
        else:
            self._compare(self.model, "float32", dict.fromkeys(self.dense, FLOAT32))
        self._undo("patch")
        if self.result.outcome != "refused":
            self.support = slimformer.support(self.model)
            self.result.outcome = self.support.tier
            self.result.detail = self.support.reason
            self.result.notes = self.support.describe().splitlines()[1:]
            if _state(self.model) != self.state:
                raise _Changed("support leaves other attributes or names in the state")
        self._in_half_precision()
        if self.result.outcome != "refused":
            self._drop()
        if self.result.outcome != "refused":
            self._choose_rows()

    def _in_half_precision(self) -> None:
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        own: dict[str, float] = {}
        for condition in self.dense:
            with self._by_itself(f"bfloat16 {condition}"):
                own[condition] = self._error(condition, self._outputs(model, condition), typical_error)
        for condition, value in own.items():
            self.result.errors[f"bfloat16 {condition}, unpatched"] = value
            self.result.limits[f"bfloat16 {condition}, unpatched"] = float("inf")
        refused = self.result.outcome == "refused"
        try:
            slimformer.patch(model)
        except UnsupportedModelError as error_:
            if not refused:
                raise _Changed(f"refused in bfloat16 but not in float32: {said(error_)}") from error_
            return
        if refused:
            self.result.skipped["bfloat16"] = "not refused in bfloat16"
        usual = statistics.median(own.values()) if own else 0.0
        # With experts a few choices that fall otherwise decide, and an error that the model has by itself is rounding.
        largest = max(own.values(), default=0.0)
        limits = {c: max(TIMES * usual, TIMES / 2 * value, largest) + FLOOR for c, value in own.items()}
        if "cached" in limits:
            # A few tokens of every text scatter more than all of them.
            limits["cached"] *= 2
        self._compare(model, "bfloat16", limits, typical_error)

    def _drop(self) -> None:
        """An attention and an MLP less: another model, the same by every way of leaving them out."""
        if "cached" in self.dense:
            with self._by_itself("continued"):
                self.steps_agree = error(self.dense["cached"], continued(self.family, self.model)) <= FLOAT32
                if not self.steps_agree:
                    self.result.skipped["continued"] = (
                        "steps with a cache are something else in the model itself"
                    )
        drop = self._patch_without_some()
        if drop is None:
            self.result.outcome, self.result.detail = (
                "refused",
                f"nothing can be dropped: {self.result.detail}",
            )
            return
        slim = {condition: self._outputs(self.model, condition) for condition in self.dense}
        for condition, found in slim.items():
            if self._error(condition, found) < DIFFERENT:
                raise _Changed(f"{drop} changes nothing ({condition})")
        if self.steps_agree:
            expected = continued(self.family, self.model)
            self.result.measure("drop cached, one pass", error(slim["cached"], expected), FLOAT32)
        self._undo("drop")
        with self._left_out(drop) as fits:
            if fits:
                for condition, found in slim.items():
                    # The slow way in the first tier keeps no cache.
                    if condition in LAYOUTS or self.support.tier != "rows":
                        self.result.measure(f"drop {condition}", self._gap(condition, found), FLOAT32)

    def _patch_without_some(self) -> LayerDrop | None:
        """Patch with the first drop that the library takes: sublayers in different layers, one, or a layer."""
        for drop in self._drops():
            try:
                slimformer.patch(self.model, drop)
            except (UnsupportedModelError, PlanError) as refused:
                self.result.skipped[str(drop)] = said(refused)
                if _state(self.model) != self.state:
                    raise _Changed(
                        f"refused, {drop} leaves other attributes or names in the state"
                    ) from refused
            else:
                return drop
        return None

    def _drops(self) -> list[LayerDrop]:
        if self.support.tier == "rows":
            return [LayerDrop(attention=[1], mlp=[2])]
        modules = self.support.modules
        can: dict[str, list[int]] = {
            kind: [i for i, of in enumerate(modules) if kind in of.silent] for kind in KINDS
        }
        can["block"] = [i for i, of in enumerate(modules) if "block" not in of.reasons]
        for kind, layers in can.items():
            paths = sorted({entry.path for i in layers for entry in modules[i].silent.get(kind, ())})
            if kind == "mlp":
                mixers = [path for path in paths if _MIXER.search(path) and not self._is_mlp(path)]
                if mixers:
                    raise _Changed(f"takes {', '.join(mixers)} for an MLP")
            self.result.notes.append(f"{kind}: {len(layers)} of {len(modules)} {' '.join(paths)}".rstrip())
        # Not the first layers before others: positions may be counted in their caches.
        attentions, mlps, blocks = (sorted(can[kind], key=lambda i: (i < 1, i)) for kind in (*KINDS, "block"))
        return [
            *(LayerDrop(attention=[i], mlp=[j]) for i in attentions for j in reversed(mlps) if i != j),
            *(LayerDrop(attention=[i]) for i in attentions),
            *(LayerDrop(mlp=[i]) for i in mlps),
            *(LayerDrop(block=[i]) for i in blocks),
        ]

    def _is_mlp(self, path: str) -> bool:
        """Whether the modules at a path are MLPs by the names of their classes, as those of Nemotron-H are."""
        modules = (
            layer.get_submodule(path)
            for layer, found in zip(self.support.anatomy.layers, self.support.modules, strict=True)
            if any(entry.path == path for entry in found.silent.get("mlp", ()))
        )
        return all(re.search("MLP|MoE", type(module).__name__) for module in modules)

    @contextlib.contextmanager
    def _left_out(self, drop: LayerDrop) -> Iterator[bool]:
        """The unpatched model with sublayers whose results are thrown away; False where that cannot be had."""
        if self.support.tier == "rows":
            none = torch.zeros(3, TOKENS, dtype=torch.bool)
            fits = self._slow_way_fits()
            with (
                slowly(self.model, {(i, k): none for k in KINDS for i in drop.dropped(k)})
                if fits
                else nullcontext()
            ):
                yield fits
            return
        handles = []
        for kind in KINDS:
            for index in drop.dropped(kind):
                layers = self.support.anatomy.layers
                calls = [i for i, layer in enumerate(layers) if layer is layers[index]]
                for entry in self.support.modules[index].silent.get(kind, ()):
                    zeroed = _Zeroed(calls.index(index), len(calls))
                    handles.append(layers[index].get_submodule(entry.path).register_forward_hook(zeroed))
        try:
            yield not drop.block
        finally:
            for handle in handles:
                handle.remove()

    def _gap(self, condition: str, found: Tensor) -> float:
        """The error of a result against what the model gives as it is now."""
        expected = self._outputs(self.model, condition)
        return error(found, expected, None if condition == "cached" else real(condition))

    def _choose_rows(self) -> None:
        """Half of the tokens at every sublayer: what computing all of them and keeping the chosen ones gives."""
        keep = RandomKeep(0.5, layers=range(len(self.support.anatomy.layers)))
        try:
            slimformer.patch(self.model, keep)
        except (UnsupportedModelError, PlanError) as refused:
            self._undo("refused rows")
            if self.support.tier == "rows":
                raise _Changed(
                    f"in the tier 'rows', but token policies are refused: {said(refused)}"
                ) from refused
            return
        if self.support.tier != "rows":
            raise _Changed(f"token policies are not refused in the tier {self.support.tier!r}")
        found = {layout: self._outputs(self.model, layout) for layout in LAYOUTS if layout in self.dense}
        if self.steps_agree:
            expected = continued(self.family, self.model)
            self.result.measure(
                "chosen rows cached", error(steps(self.family, self.model), expected), FLOAT32
            )
        self._undo("chosen rows")
        if not self._slow_way_fits():
            return
        for layout, rows in found.items():
            # Positions are counted from the text's first token, or from the batch's where the model counts so.
            mask = batch(layout)[1]
            counted = (positions(mask), torch.arange(TOKENS).expand_as(mask))
            errors = []
            for places in counted:
                with slowly(self.model, kept(keep, places)):
                    errors.append(error(rows, self._outputs(self.model, layout), real(layout)))
            self.result.measure(f"chosen rows {layout}", min(errors), FLOAT32)

    def _slow_way_fits(self) -> bool:
        """Whether the slow reference, with every token chosen, is the model."""
        nothing: Mapping[tuple[int, Kind], Tensor] = {}
        try:
            with slowly(self.model, nothing):
                fits = self._error("none", self._outputs(self.model, "none")) <= FLOAT32
        except Exception as failed:
            self.result.skipped["slow reference"] = said(failed)
            return False
        if not fits:
            self.result.skipped["slow reference"] = "computes something else"
        return fits

    def _compare(
        self, model: PreTrainedModel, title: str, limits: Mapping[str, float], of: Any = error
    ) -> None:
        for condition, limit in limits.items():
            value = self._error(condition, self._outputs(model, condition), of)
            self.result.measure(f"{title} {condition}", value, limit)

    def _undo(self, after: str) -> None:
        slimformer.unpatch(self.model)
        if _state(self.model) != self.state:
            raise _Changed(f"unpatch after {after} leaves other attributes or other names in the state")
        for condition, expected in self.dense.items():
            if not torch.equal(self._outputs(self.model, condition), expected):
                if torch.equal(self._outputs(self.model, condition), self._outputs(self.model, condition)):
                    raise _Changed(f"unpatch after {after} leaves other outputs ({condition})")
                self.result.skipped[f"unpatched {condition}"] = "the model itself gives other bits every time"

    def _outputs(self, model: PreTrainedModel, condition: str) -> Tensor:
        if condition == "cached":
            return steps(self.family, model)
        return outputs(model, given(self.family, model, condition))

    def _error(self, condition: str, found: Tensor, of: Any = error) -> float:
        text = None if condition == "cached" else real(condition)
        return of(found, self.dense[condition], text)

    @contextlib.contextmanager
    def _by_itself(self, condition: str) -> Iterator[None]:
        """What the unpatched model cannot do is no condition of a patch."""
        try:
            yield
        except Exception as failed:
            self.result.skipped[condition] = said(failed)


@dataclass
class _Zeroed:
    """A forward hook that puts zeros for the result of one call of several in every forward pass."""

    turn: int
    of: int
    calls: int = 0

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        self.calls += 1
        if (self.calls - 1) % self.of != self.turn:
            return output
        if isinstance(output, (tuple, list)):
            return type(output)([torch.zeros_like(output[0]), *output[1:]])
        return torch.zeros_like(output)


def _state(model: PreTrainedModel) -> tuple[list[str], dict[str, set[str]]]:
    """Names in the state dict, and attributes of every module."""
    return list(model.state_dict()), {name: set(vars(module)) for name, module in model.named_modules()}


def said(failed: BaseException) -> str:
    """An exception in one line, with the places where it was raised and where the library was last."""
    frames = traceback.extract_tb(failed.__traceback__)
    ours = [frame for frame in frames if "/slimformer/" in frame.filename or "/sweep/" in frame.filename]
    last = (f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:]))
    places = ", ".join(dict.fromkeys(last))
    return f"{type(failed).__name__}: {' '.join(str(failed).split())[:400]} [{places}]"

"""Which modules of a layer make up its sublayers, found by what they do, where no row of the structure table fits.

A module inside a layer that puts out one vector per token is a *token mixer* (attention, linear attention, Mamba, a
convolution) if a token's output depends on other tokens, and else an MLP (or experts). A sublayer whose modules put out
zeros adds nothing, whatever multiplies, norms and adds come behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.anatomy import Anatomy
from slimformer.layer_calls import LayerCalls, mirrored
from slimformer.probes import error, float32_copy, in_dtype, noise, tolerance
from slimformer.structures import KINDS, Kind

# A residual that goes on past the sublayers stays this much like itself, norms and scales aside; one that ends in a
# module, as BERT's do, is lost where that module puts out zeros.
_LIKE_ITSELF = 0.5
# A part with fewer weights than this, of the largest of its kind, is a side road, such as a low-rank residual.
_SIDE_ROAD = 0.1
# What a foreign layer raises where it cannot be called as it is tried.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Silent:
    """A module that is to compute nothing, and what stands for its result.

    Attributes:
        path: Where it is within its layer.
        values: How many values it returns, of which the first counts and the others may be None; 0 for a bare tensor.
        width: The size of each output vector.
    """

    path: str
    values: int
    width: int


@dataclass(frozen=True)
class SublayerModules:
    """The modules of one layer's sublayers.

    Attributes:
        silent: What computes nothing where a sublayer is dropped; a kind that is not named cannot be dropped alone.
        returns: How many values the layer returns, of which the first is the residual; 0 for a bare tensor.
        reasons: Why a kind, or `"block"`, cannot be dropped.
    """

    silent: dict[Kind, tuple[Silent, ...]] = field(default_factory=dict)
    returns: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def without(self, shared: set[int], layer: nn.Module) -> SublayerModules:
        """The same without sublayers of `layer` whose modules, by identity, other layers use too."""
        gone: dict[str, str] = {
            kind: "other layers share its modules"
            for kind, silent in self.silent.items()
            if any(id(layer.get_submodule(entry.path)) in shared for entry in silent)
        }
        if id(layer) in shared:
            gone["block"] = "other layers share its modules"
        return self.excluding(gone)

    def excluding(self, gone: Mapping[str, str]) -> SublayerModules:
        """The same without kinds, or `"block"`, that cannot be dropped, each for its reason."""
        silent = {kind: entries for kind, entries in self.silent.items() if kind not in gone}
        return SublayerModules(silent, self.returns, {**self.reasons, **gone})


@torch.no_grad()
def find_sublayer_modules(anatomy: Anatomy, index: int, calls: LayerCalls) -> SublayerModules:
    """Find the modules of a layer's sublayers.

    Args:
        anatomy: The model's.
        index: Which layer.
        calls: A short call of the stack.
    """
    layer = anatomy.layers[index]
    if any(p.is_meta for p in layer.parameters()):
        return SublayerModules(reasons=dict.fromkeys((*KINDS, "block"), "its weights are not in memory"))
    trial = float32_copy(layer)
    trial = mirrored(layer, {}) if trial is None else trial
    weight = next((p for p in trial.parameters() if p.is_floating_point()), calls.hidden)
    given = {
        name: None if calls.beside is not None and value is calls.beside else in_dtype(value, weight)
        for name, value in calls.arguments[index].items()
    }
    probe = _Probe(trial, noise(tuple(calls.hidden.shape), weight), given)
    try:
        output = probe.run()
    except FAILURES as failure:
        reason = f"it could not be called on a few tokens: {type(failure).__name__}: {failure}"
        return SublayerModules(reasons=dict.fromkeys((*KINDS, "block"), reason))
    returns = len(output) if isinstance(output, tuple) else 0
    reasons: dict[str, str] = {}
    if calls.hands_over:
        reasons["block"] = "it hands more than the residual to the layers above"
    silent: dict[Kind, tuple[Silent, ...]] = {}
    for kind, paths in probe.sublayers().items():
        found = probe.silenced(paths, calls.hands_over)
        if isinstance(found, str):
            reasons[kind] = found
        else:
            silent[kind] = found
    return SublayerModules(silent, returns, reasons)


@dataclass
class _Record:
    """What a module returned, and how often it was called."""

    output: Any
    calls: int = 1

    @property
    def vectors(self) -> Tensor | None:
        first = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return first if isinstance(first, Tensor) else None


@dataclass
class _Probe:
    """A layer to try things on, with one input and its other arguments."""

    layer: nn.Module
    x: Tensor
    given: dict[str, Any]

    def run(self, changed: Mapping[str, Callable[[Any], Any]] | None = None, records: Any = None) -> Any:
        """Call the layer, with the results of some modules changed, and note what modules do."""
        handles = []
        try:
            for path, module in self.layer.named_modules():
                if not path:
                    continue
                if records is not None:
                    handles.append(module.register_forward_hook(_Recorder(path, records)))
                change = (changed or {}).get(path)
                if change is not None:
                    handles.append(module.register_forward_hook(_Changer(change)))
            return self.layer(self.x.clone(), **self.given)
        finally:
            for handle in handles:
                handle.remove()

    def residual(self, silent: tuple[str, ...] = ()) -> Tensor:
        output = self.run(dict.fromkeys(silent, _zeroed))
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def sublayers(self) -> dict[Kind, tuple[str, ...]]:
        """The modules of each kind, the outermost whose silence leaves the residual as it is."""
        records: dict[str, _Record] = {}
        self.run(records=records)
        tokens = self.x.shape[-2]
        whole = {
            path: record
            for path, record in records.items()
            if record.calls == 1
            and _per_token(record.vectors, self.x, tokens)
            and _has_matrix(self.layer, path)
        }
        matrices = [path for path in whole if _is_matrix(self.layer.get_submodule(path))]
        chosen: list[str] = []
        for path in sorted(whole, key=lambda path: path.count(".")):
            inside_one = any(path.startswith(f"{outer}.") for outer in chosen)
            if inside_one:
                continue
            # What other modules add is left out, so that it hides nothing.
            others = tuple(p for p in matrices if not (p == path or p.startswith(f"{path}.")))
            if _alike(self.residual((path, *others)), self.x) >= _LIKE_ITSELF:
                chosen.append(path)
        mixers = [path for path in chosen if self._mixes(path, records)]
        # A layer behind a mixer, as BERT's output layer, is that sublayer's too: without the mixer it knows no token.
        alone: dict[str, _Record] = {}
        self.run(dict.fromkeys(mixers, _zeroed), alone)
        kinds: dict[Kind, list[str]] = {"attention": mixers, "mlp": []}
        for path in chosen:
            if path not in mixers:
                kinds["attention" if mixers and _constant(alone[path].vectors) else "mlp"].append(path)
        found: dict[Kind, tuple[str, ...]] = {}
        for kind, paths in kinds.items():
            sizes = {path: _size(self.layer, path) for path in paths}
            least = _SIDE_ROAD * max(sizes.values(), default=0)
            found[kind] = tuple(path for path in paths if sizes[path] >= least)
        return found

    def _mixes(self, path: str, records: dict[str, _Record]) -> bool | None:
        """Whether a module's output for a token depends on other tokens."""
        base = records[path].vectors
        changed = self.x.clone()
        # The first token: every other one sees it, in a decoder too.
        changed[..., 0, :] = noise(tuple(changed[..., 0, :].shape), changed, seed=1)
        probe, again = _Probe(self.layer, changed, self.given), dict[str, _Record]()
        # What other mixers put out is held as it was, so that only this one's own mixing shows.
        held = {
            other: _Held(record.output)
            for other, record in records.items()
            if other != path
            and not other.startswith(f"{path}.")
            and not path.startswith(f"{other}.")
            and record.calls == 1
            and _has_matrix(self.layer, other)
            and _per_token(record.vectors, self.x, self.x.shape[-2])
        }
        probe.run(held, again)
        found = again[path].vectors if path in again else None
        if base is None or found is None:
            return None
        tokens, batch = self.x.shape[-2], self.x.shape[-3]
        first = torch.zeros(batch, tokens, dtype=torch.bool, device=base.device)
        first[:, 0] = True
        flat = first.flatten()
        width = base.shape[-1]
        before, after = base.reshape(-1, len(flat), width), found.reshape(-1, len(flat), width)
        return error(after[:, ~flat].flatten(0, 1), before[:, ~flat].flatten(0, 1)) > tolerance(self.x)

    def _feeding(self, paths: tuple[str, ...], records: dict[str, _Record], expected: Tensor) -> list[str]:
        """Further modules that nothing reads once these are silent, such as the first layer of an MLP in two parts."""
        outermost = sorted(records.items(), key=lambda item: item[0].count("."))
        found: list[str] = []
        for path, record in outermost:
            related = any(
                path == p or path.startswith(f"{p}.") or p.startswith(f"{path}.") for p in (*paths, *found)
            )
            vectors = record.vectors
            if related or record.calls != 1 or vectors is None or not _has_matrix(self.layer, path):
                continue
            if isinstance(record.output, tuple) or vectors.shape[:-1].numel() % self.x.shape[:-1].numel():
                continue
            if error(self.residual((*paths, path)).flatten(0, -2), expected.flatten(0, -2)) == 0.0:
                found.append(path)
        return found

    def silenced(self, paths: tuple[str, ...], hands_over: bool) -> tuple[Silent, ...] | str:
        """What is to compute nothing so that these modules put out zeros; in words why that cannot be.

        Args:
            paths: The modules.
            hands_over: Whether what layers return beside the residual goes to layers above.
        """
        if not paths:
            return "no module inside the layer was found that does this alone"
        records: dict[str, _Record] = {}
        self.run(records=records)
        expected = self.residual(paths)
        silent = []
        for path in (*paths, *self._feeding(paths, records, expected)):
            output, vectors = records[path].output, records[path].vectors
            if vectors is None:
                return f"{path} returns no vectors"
            beside = output[1:] if isinstance(output, tuple) else ()
            if hands_over and any(isinstance(value, Tensor) for value in beside):
                return f"what {path} returns beside its output goes to the layers above"
            silent.append(Silent(path, len(output) if isinstance(output, tuple) else 0, vectors.shape[-1]))
        before = {entry.path: self.layer.get_submodule(entry.path) for entry in silent}
        try:
            for entry in silent:
                before[entry.path].__dict__["forward"] = Zeros(entry)
            output = self.layer(self.x.clone(), **self.given)
        except FAILURES as failure:
            return f"{', '.join(paths)} cannot be left out: {type(failure).__name__}: {failure}"
        finally:
            for module in before.values():
                module.__dict__.pop("forward", None)
        actual = output[0] if isinstance(output, tuple) else output
        off = error(actual.flatten(0, -2), expected.flatten(0, -2))
        if not off <= tolerance(self.x):
            return (
                f"{', '.join(paths)} return more than is known, which the layer needs (difference {off:.2g})"
            )
        return tuple(silent)


@dataclass(frozen=True)
class Zeros:
    """Stands in for the `forward` of a module that computes nothing: zeros, or the same vector, for every token.

    Attributes:
        silent: What stands for its result.
        vector: Gives the vector `[width]`; None for zeros.
        seen: Gets the module's arguments, as the cache among them may have to know.
    """

    silent: Silent
    vector: Callable[[], Tensor] | None = None
    seen: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, without reading a weight."""
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if self.seen is not None:
            self.seen(args, kwargs)
        shape = (*hidden.shape[:-1], self.silent.width)
        out = hidden.new_zeros(shape) if self.vector is None else self.vector().to(hidden).expand(shape)
        return (out, *[None] * (self.silent.values - 1)) if self.silent.values else out


@dataclass(frozen=True)
class _Recorder:
    path: str
    records: dict[str, _Record]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        known = self.records.get(self.path)
        if known is not None:
            known.calls += 1
        else:
            # Layers behind may write into it.
            kept = tuple(_copied(value) for value in output) if isinstance(output, tuple) else _copied(output)
            self.records[self.path] = _Record(kept)


@dataclass(frozen=True)
class _Changer:
    change: Callable[[Any], Any]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.change(output)


@dataclass(frozen=True)
class _Held:
    output: Any

    def __call__(self, output: Any) -> Any:
        if isinstance(self.output, tuple):
            return tuple(_copied(value) for value in self.output)
        return _copied(self.output)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _constant(vectors: Tensor | None) -> bool:
    """Whether every token has the same vector."""
    if vectors is None:
        return False
    flat = vectors.flatten(0, -2)
    return bool((flat - flat[:1]).abs().max() <= 1e-6 * flat.abs().max().clamp_min(1e-12))


def _zeroed(output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _per_token(vectors: Tensor | None, x: Tensor, tokens: int) -> bool:
    """Whether a result has one vector of the residual's size for every token."""
    if vectors is None or vectors.dim() < 2 or vectors.shape[-1] != x.shape[-1]:
        return False
    return vectors.shape[:-1].numel() % (x.shape[-3] * tokens) == 0


def _has_matrix(layer: nn.Module, path: str) -> bool:
    return any(p.dim() >= 2 for p in layer.get_submodule(path).parameters())


def _is_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def _size(layer: nn.Module, path: str) -> int:
    return sum(p.numel() for p in layer.get_submodule(path).parameters())


def _alike(output: Tensor, x: Tensor) -> float:
    """How much the outputs of tokens tell of the same tokens' inputs: the mean cosine, the mean token taken off."""

    def centred(t: Tensor) -> Tensor:
        flat = t.float().flatten(0, -2)
        return flat - flat.mean(0)

    if output.shape != x.shape:
        return 0.0
    return float(torch.cosine_similarity(centred(output), centred(x), dim=-1).mean())

"""Which modules of a layer make up its sublayers, found by what they do, where no row of the structure table fits.

A module inside a layer that puts out one vector per token is a *token mixer* (attention, linear attention, Mamba, a
convolution) if a token's output depends on other tokens, and else an MLP (or experts). A sublayer whose modules put out
zeros adds nothing, whatever multiplies, norms and adds come behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.calls.layer_calls import LayerCalls, mirrored
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, SEVERAL, Kind, first_of
from slimformer.model.module_results import Changer, Held, Record, Recorder, perturbed, zeroed
from slimformer.model.probes import Failure, error, float32_copy, in_dtype, noise, tolerance

# A residual that goes on past the sublayers stays this much like itself, norms and scales aside; one that ends in a
# module, as BERT's do, is lost where that module puts out zeros.
_LIKE_ITSELF = 0.5
# A part with fewer weights than this, of the largest of its kind, is a side road, such as a low-rank residual.
_SIDE_ROAD = 0.1


@dataclass(frozen=True)
class Silent:
    """A module that is to compute nothing, and what stands for its result.

    Attributes:
        path: Where it is within its layer.
        values: How many values it returns, of which the first counts and the others may be None; 0 for a bare tensor.
        width: The size of each output vector.
        listed: Whether it returns them in a list, as OpenAI GPT's modules do.
    """

    path: str
    values: int
    width: int
    listed: bool = False


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
def find_sublayer_modules(
    anatomy: Anatomy, index: int, calls: LayerCalls, supplies: bool = False
) -> SublayerModules:
    """Find the modules of a layer's sublayers.

    Args:
        anatomy: The model's.
        index: Which layer.
        calls: A short call of the stack.
        supplies: Whether the layer leaves something for other layers in what they share, such as keys.
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
    except Failure as failure:
        reason = f"it could not be called on a few tokens: {type(failure).__name__}: {failure}"
        return SublayerModules(reasons=dict.fromkeys((*KINDS, "block"), reason))
    returns = len(output) if isinstance(output, SEVERAL) else 0
    reasons: dict[str, str] = {}
    if calls.hands_over:
        reasons["block"] = "it hands more than the residual to the layers above"
    if supplies:
        reasons["block"] = "other layers use what it leaves for them"
    if probe.x.shape[-3:-1] != calls.text.shape:
        return SublayerModules(
            {},
            returns,
            {**dict.fromkeys(KINDS, "its residual has several streams behind each token"), **reasons},
        )
    silent: dict[Kind, tuple[Silent, ...]] = {}
    for kind, paths in probe.sublayers().items():
        found = probe.silenced(paths, calls.hands_over)
        if kind == "attention" and supplies:
            found = "other layers use what it leaves for them"
        if isinstance(found, str):
            reasons[kind] = found
        else:
            silent[kind] = found
    return SublayerModules(silent, returns, reasons)


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
                    handles.append(module.register_forward_hook(Recorder(path, records)))
                change = (changed or {}).get(path)
                if change is not None:
                    handles.append(module.register_forward_hook(Changer(change)))
            return self.layer(self.x.clone(), **self.arguments())
        finally:
            for handle in handles:
                handle.remove()

    def arguments(self) -> dict[str, Any]:
        """The layer's other arguments; what layers write into is this call's own."""
        return {n: copy.copy(v) if isinstance(v, MutableMapping) else v for n, v in self.given.items()}

    def residual(self, silent: tuple[str, ...] = ()) -> Tensor:
        found: Tensor = first_of(self.run(dict.fromkeys(silent, zeroed)))
        return found

    def sublayers(self) -> dict[Kind, tuple[str, ...]]:
        """The modules of each kind, the outermost whose silence leaves the residual as it is."""
        records: dict[str, Record] = {}
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
        behind = self._behind_mixing(whole)
        mixers = [path for path in chosen if self._mixes(path, records, behind)]
        if not self._mixes_nowhere_else(mixers, records):
            # As Inkling's convolution behind the MLP does, whose state is in the attention's cache slot.
            return dict.fromkeys(KINDS, ())
        # A layer behind a mixer, as BERT's output layer, is that sublayer's too: without the mixer it knows no token.
        alone: dict[str, Record] = {}
        self.run(dict.fromkeys(mixers, zeroed), alone)
        kinds: dict[Kind, list[str]] = {"attention": mixers, "mlp": []}
        for path in chosen:
            if path in mixers:
                continue
            if mixers and _constant(alone[path].vectors):
                kinds["attention"].append(path)
            elif self._reaches_its_token(path, mixers, records):
                kinds["mlp"].append(path)
        found: dict[Kind, tuple[str, ...]] = {}
        for kind, paths in kinds.items():
            sizes = {path: _size(self.layer, path) for path in paths}
            least = _SIDE_ROAD * max(sizes.values(), default=0)
            found[kind] = tuple(path for path in paths if sizes[path] >= least)
        return found

    def _mixes_nowhere_else(self, mixers: list[str], records: dict[str, Record]) -> bool:
        """Whether no token's output depends on other tokens once what these mixers put out is held."""
        held = {mixer: Held(records[mixer].output) for mixer in mixers}
        other = _Probe(self.layer, self._other_first_token(self.x), self.given)
        return not self._differs_elsewhere(first_of(other.run(held)), first_of(self.run(held)))

    def _reaches_its_token(self, path: str, mixers: list[str], records: dict[str, Record]) -> bool:
        """Whether what a module puts out for a token reaches that one's output, and not by way of mixers alone."""
        held, output = {mixer: Held(records[mixer].output) for mixer in mixers}, records[path].output
        first = self._other_first_token(first_of(output))
        other = type(output)([first, *output[1:]]) if isinstance(output, SEVERAL) else first
        changed: Tensor = first_of(self.run({**held, path: Held(other)}))
        base: Tensor = first_of(self.run(held))
        if self._differs_elsewhere(changed, base):
            return False
        return error(changed.flatten(0, -2), base.flatten(0, -2)) > tolerance(self.x)

    def _other_first_token(self, vectors: Tensor) -> Tensor:
        """Vectors with others for the first token: every token sees it, in a decoder too."""
        changed = vectors.clone(memory_format=torch.contiguous_format)
        first = changed.view(-1, *self.x.shape[-3:-1], vectors.shape[-1])[:, :, 0]
        first.copy_(noise(tuple(first.shape), changed, seed=1))
        return changed

    def _differs_elsewhere(self, found: Tensor | None, base: Tensor | None) -> bool:
        """Whether vectors differ for other tokens than the first."""
        if found is None or base is None:
            return True
        shape = (-1, *self.x.shape[-3:-1], base.shape[-1])
        after, before = (t.reshape(shape)[:, :, 1:].flatten(0, 2) for t in (found, base))
        return error(after, before) > tolerance(self.x)

    def _with_another_first_token(self) -> _Probe:
        given = {name: perturbed(value) for name, value in self.given.items()}
        return _Probe(self.layer, self._other_first_token(self.x), given)

    def _behind_mixing(self, records: dict[str, Record]) -> set[str]:
        """The modules, of these, whose output for a token depends on other tokens, by whatever way."""
        again: dict[str, Record] = {}
        self._with_another_first_token().run(records=again)
        return {
            path
            for path, record in records.items()
            if path not in again or self._differs_elsewhere(again[path].vectors, record.vectors)
        }

    def _mixes(self, path: str, records: dict[str, Record], behind: set[str]) -> bool | None:
        """Whether a module's output for a token depends on other tokens, or on what other layers know of them."""
        base, again = records[path].vectors, dict[str, Record]()
        # What other mixers put out is held as it was, so that only this one's own mixing shows.
        held = {
            other: Held(record.output)
            for other, record in records.items()
            if other in behind
            and other != path
            and not other.startswith(f"{path}.")
            and not path.startswith(f"{other}.")
        }
        self._with_another_first_token().run(held, again)
        found = again[path].vectors if path in again else None
        if base is None or found is None:
            return None
        return self._differs_elsewhere(found, base)

    def _feeding(self, paths: tuple[str, ...], records: dict[str, Record], expected: Tensor) -> list[str]:
        """Further modules that nothing reads once these are silent, such as the first layer of an MLP in two parts."""
        outermost = sorted(records.items(), key=lambda item: item[0].count("."))
        whole, found = self.residual(), list[str]()
        for path, record in outermost:
            related = any(
                path == p or path.startswith(f"{p}.") or p.startswith(f"{path}.") for p in (*paths, *found)
            )
            vectors = record.vectors
            if related or record.calls != 1 or vectors is None or not _has_matrix(self.layer, path):
                continue
            if isinstance(record.output, SEVERAL) or vectors.shape[:-1].numel() % self.x.shape[:-1].numel():
                continue
            if error(self.residual((*paths, path)).flatten(0, -2), expected.flatten(0, -2)) != 0.0:
                continue
            # An indexer of few tokens, which chooses all of them, changes nothing either, and feeds another.
            if error(self.residual((path,)).flatten(0, -2), whole.flatten(0, -2)) > 0.0:
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
        records: dict[str, Record] = {}
        self.run(records=records)
        expected = self.residual(paths)
        silent = []
        for path in (*paths, *self._feeding(paths, records, expected)):
            output, vectors = records[path].output, records[path].vectors
            if vectors is None:
                return f"{path} returns no vectors"
            several = isinstance(output, SEVERAL)
            beside = output[1:] if several else ()
            if hands_over and any(isinstance(value, Tensor) for value in beside):
                return f"what {path} returns beside its output goes to the layers above"
            values = len(output) if several else 0
            silent.append(Silent(path, values, vectors.shape[-1], isinstance(output, list)))
        before = {entry.path: self.layer.get_submodule(entry.path) for entry in silent}
        try:
            for entry in silent:
                before[entry.path].__dict__["forward"] = Zeros(entry)
            output = self.layer(self.x.clone(), **self.arguments())
        except Failure as failure:
            return f"{', '.join(paths)} cannot be left out: {type(failure).__name__}: {failure}"
        finally:
            for module in before.values():
                module.__dict__.pop("forward", None)
        actual = first_of(output)
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
        if not self.silent.values:
            return out
        several = (out, *[None] * (self.silent.values - 1))
        return list(several) if self.silent.listed else several


def _constant(vectors: Tensor | None) -> bool:
    """Whether every token has the same vector."""
    if vectors is None:
        return False
    flat = vectors.flatten(0, -2)
    return bool((flat - flat[:1]).abs().max() <= 1e-6 * flat.abs().max().clamp_min(1e-12))


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

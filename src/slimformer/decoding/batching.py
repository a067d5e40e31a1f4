"""Stands in for an encoder's forward pass: a small batch is replayed from the graph of its size, others are as ever."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimformer.cache.steps import preparing_a_batch
from slimformer.decoding.capture import capture, captures, memory_pool
from slimformer.model.anatomy import named_arguments, positional_names
from slimformer.rows.sdpa_backend import without_cudnn
from slimformer.runtime.sublayers import KERNELS_FROM_ELEMENTS

_logger = logging.getLogger("slimformer")
# Texts are filled up to a multiple of so many tokens, and batches to a power of two of texts: few graphs, and where a
# GPU waits for the CPU what is computed in vain costs nothing.
_TOKENS = 32
# A size that comes once is not worth its graph.
_CAPTURED_FROM = 2
# Graphs kept, those that were used last.
_KEPT = 32
# A size whose graph was given up comes so often again before it gets another: making one takes as long as launching
# about five batches, and more sizes in turn than are kept would make one in every call.
_CAPTURED_AGAIN_FROM = 32
_OUTPUTS = ("last_hidden_state", "pooler_output")
# What a batch is read from, or would not change it.
_READ = ("input_ids", "attention_mask", "token_type_ids")
_KNOWN = {*_READ, "return_dict", "use_cache"}
# The largest relative difference at the tokens of texts between a replayed batch and the same launched one by one.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class Graph:
    """A batch that was captured.

    Attributes:
        given: What differs from batch to batch, each int64 `[texts, tokens]`.
        replay: Launches it.
        found: The last hidden states `[texts, tokens, hidden]`, and behind them the pooled one if there is any.
        output: The kind of output that the model has.
        pooled: Whether that has a pooled state.
    """

    given: dict[str, Tensor]
    replay: Callable[[], None]
    found: Tensor
    output: Any
    pooled: bool

    def outputs(self, texts: int, tokens: int) -> Any:
        """What the model returns for the batch that was replayed last."""
        values = {"last_hidden_state": self.found[:texts, :tokens].clone()}
        if self.pooled:
            values["pooler_output"] = self.found[:texts, -1].clone()
        return self.output(**values)


@dataclass(repr=False)
class Batching:
    """Stands in for the `forward` of an encoder's stack.

    Attributes:
        stack: The stack.
        untouched: Whether nobody has touched a module of its layers.
        never: Why no batch of it is replayed; empty where some may be.
        had: The stack's own forward.
        batches: How many batches were replayed.
        captured: How many graphs were made.
        why_not: Why the last call was not replayed.
        graphs: By what they were captured for.
    """

    stack: Any
    untouched: Callable[[], bool]
    never: str = ""
    had: Callable[..., Any] = field(init=False)
    batches: int = 0
    captured: int = 0
    why_not: str = ""
    graphs: OrderedDict[object, Graph] = field(default_factory=OrderedDict)
    # How often a size has to come until it gets a graph.
    _wanted: dict[object, int] = field(default_factory=dict)
    _pool: object = None
    _addresses: tuple[int, ...] = ()
    _lock: Any = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has graphs of its own."""
        fresh = {"graphs": None, "_wanted": None, "_pool": None, "_addresses": (), "_lock": None}
        return {**vars(self), **fresh}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """As `__getstate__` says."""
        vars(self).update(state, graphs=OrderedDict(), _wanted={}, _lock=threading.Lock())

    def __str__(self) -> str:
        if self.never:
            return f"launched one by one: {self.never}"
        found = f"{self.batches} replayed from {self.captured} graphs"
        return f"{found}, not the last one: {self.why_not}" if self.why_not else found

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The stack's own `forward`, whose signature tells others what they may pass."""
        return self.had

    def forget(self) -> None:
        """Give the memory of all graphs back."""
        self.graphs.clear()
        self._wanted.clear()
        self._pool = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stack's own, or a batch of it."""
        if self.never or torch.compiler.is_compiling():
            return self.had(*args, **kwargs)
        if args:
            # Heads of transformers give token ids by place.
            names = positional_names(self.stack)
            if names[0] != "input_ids" or len(args) > len(names):
                self.why_not = "its arguments are not known by their places"
                return self.had(*args, **kwargs)
            kwargs = named_arguments(names, args, kwargs)
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or not captures(ids.device.type):
            self.why_not = "it has no token ids on a device with graphs"
            return self.had(**kwargs)
        if not self._lock.acquire(blocking=False):
            self.why_not = "another one runs"
            return self.had(**kwargs)
        try:
            return self._begun(ids, kwargs)
        finally:
            self._lock.release()

    def _begun(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """One call at a time: graphs have their inputs and results in common places."""
        self.why_not = self._unlike_a_batch(ids, kwargs)
        if self.why_not:
            return self.had(**kwargs)
        addresses = tuple(t.data_ptr() for t in (*self.stack.parameters(), *self.stack.buffers()))
        if addresses != self._addresses:
            # Weights were loaded, moved or put around since.
            self._addresses = addresses
            self.forget()
        texts, tokens = self._size(ids)
        if texts * tokens * self.stack.config.hidden_size >= KERNELS_FROM_ELEMENTS:
            self.why_not = "it keeps the GPU busy"
            return self.had(**kwargs)
        names = tuple(name for name in _READ if isinstance(kwargs.get(name), Tensor))
        key = (names, texts, tokens, ids.device, getattr(self.stack.config, "_attn_implementation", None))
        graph = self.graphs.get(key)
        if graph is None:
            self._wanted[key] = self._wanted.get(key, _CAPTURED_FROM) - 1
            if self._wanted[key] > 0:
                self.why_not = "its size came too seldom for a graph so far"
                return self.had(**kwargs)
            return self._captured(key, names, (texts, tokens), kwargs)
        self.graphs.move_to_end(key)
        self._write(graph.given, kwargs)
        graph.replay()
        self.batches += 1
        return graph.outputs(*ids.shape)

    def _unlike_a_batch(self, ids: Tensor, kwargs: dict[str, Any]) -> str:
        """Why a call cannot be replayed; empty where it can."""
        more = [
            name
            for name, value in kwargs.items()
            if name not in _KNOWN and value is not None and value is not False
        ]
        if more:
            return f"it is called with {', '.join(more)}"
        if kwargs.get("return_dict") is False or kwargs.get("use_cache"):
            return "it is to return a tuple, or a cache"
        config = self.stack.config
        if any(getattr(config, name, False) for name in ("output_attentions", "output_hidden_states")):
            return "attentions or hidden states are to be returned"
        if ids.dim() != 2 or 0 in ids.shape:
            return "its token ids are no table"
        for name in _READ:
            value = kwargs.get(name)
            if value is not None and not _is_a_table(value, ids):
                return f"its {name} is not one whole number per token"
        if self.stack.training or torch.is_grad_enabled():
            return "it is trained, or not called under torch.no_grad"
        if torch.is_autocast_enabled(ids.device.type):
            return "autocast is on"
        if ids.device.type == "cuda":
            # Work on other streams would not wait for what is read from and written to common places.
            if torch.cuda.current_stream(ids.device) != torch.cuda.default_stream(ids.device):
                return "it runs on a stream of its own"
            if ids.device != next(self.stack.parameters()).device:
                return "its token ids lie on another device"
        return "" if self.untouched() else "somebody has touched its modules"

    def _size(self, ids: Tensor) -> tuple[int, int]:
        """Texts and tokens of the graph that serves a batch."""
        texts, tokens = ids.shape
        filled = -(-tokens // _TOKENS) * _TOKENS
        # Positions beyond the last one that the model knows do not exist.
        most = getattr(self.stack.config, "max_position_embeddings", None)
        fits = most is None or filled <= most
        return 1 << (texts - 1).bit_length(), filled if fits else tokens

    def _write(self, given: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> None:
        """Put a batch where its graph reads it, and padding around it."""
        texts, tokens = kwargs["input_ids"].shape
        for name, place in given.items():
            value = kwargs.get(name)
            place.fill_((self.stack.config.pad_token_id or 0) if name == "input_ids" else 0)
            if name == "attention_mask":
                # Rows beside the texts must see something: nobody reads what they give.
                place[texts:] = 1
            place[:texts, :tokens] = 1 if value is None else value

    def _captured(
        self, key: object, names: tuple[str, ...], size: tuple[int, int], kwargs: dict[str, Any]
    ) -> Any:
        """This batch launched one by one, and a graph for later ones, if it gives the same."""
        outputs = self.had(**kwargs)
        self.why_not = "its graph was being made"
        texts, tokens = kwargs["input_ids"].shape
        why = _unlike_a_result(outputs, texts, tokens)
        if why:
            return self._refused(outputs, why)
        device, pooled = kwargs["input_ids"].device, outputs.get("pooler_output") is not None
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            given = {
                name: torch.zeros(size, dtype=torch.int64, device=device)
                # Texts of other lengths have padding where these have none.
                for name in dict.fromkeys(("input_ids", "attention_mask", *names))
            }

            def call() -> Tensor:
                with preparing_a_batch(), without_cudnn:
                    found = self.had(**given, return_dict=True)
                states: Tensor = found.last_hidden_state
                return torch.cat([states, found.pooler_output[:, None]], 1) if pooled else states

            def rewind() -> None:
                self._write(given, kwargs)
                # A model that leaves out masks without padding is to warm up what it does with one.
                given["attention_mask"][:, -1] = 0

            self._pool = self._pool or memory_pool(device)
            try:
                graph = Graph(given, *capture(call, rewind, device, self._pool), type(outputs), pooled)
            except Exception as error:
                # Kernels that do not compile have errors of their own kinds.
                return self._refused(
                    outputs, f"a batch cannot be captured ({(str(error) or repr(error)).splitlines()[0]})"
                )
            self._write(given, kwargs)
            graph.replay()
            off = _apart(graph.outputs(texts, tokens), outputs, kwargs.get("attention_mask"))
        if not off <= _TOLERANCE.get(outputs.last_hidden_state.dtype, 0.0):
            return self._refused(outputs, f"a replayed batch gives something else (relative error {off:.2g})")
        self.graphs[key] = graph
        self.captured += 1
        if len(self.graphs) > _KEPT:
            given_up, _ = self.graphs.popitem(last=False)
            self._wanted[given_up] = _CAPTURED_AGAIN_FROM
        return outputs

    def _refused(self, outputs: Any, why: str) -> Any:
        self.never = self.why_not = why
        self.forget()
        _logger.info("Batches are launched one by one: %s.", why)
        return outputs


def _is_a_table(value: Any, ids: Tensor) -> bool:
    """Whether there is one whole number for every token."""
    if not isinstance(value, Tensor) or value.shape != ids.shape or value.device != ids.device:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _unlike_a_result(outputs: Any, texts: int, tokens: int) -> str:
    """Why what a model returns cannot be replayed; empty where it can."""
    items = getattr(outputs, "items", None)
    given = {name: value for name, value in items() if value is not None} if callable(items) else {}
    states, pooled = (given.pop(name, None) for name in _OUTPUTS)
    if given or not isinstance(states, Tensor) or states.shape[:2] != (texts, tokens):
        return "it returns something else than hidden states"
    if pooled is not None and (pooled.shape != (texts, states.shape[2]) or pooled.dtype != states.dtype):
        return "its pooled states are of another kind than its hidden states"
    return ""


def _apart(given: Any, expected: Any, mask: Tensor | None) -> float:
    """The largest relative difference, of hidden states at tokens of texts and of pooled states; NaN where one is."""
    pairs = [(given.last_hidden_state, expected.last_hidden_state)]
    text = None if mask is None else mask.bool()
    if text is not None:
        pairs = [(ours[text], theirs[text]) for ours, theirs in pairs]
    if expected.get("pooler_output") is not None:
        # Pooled is the first token, which is none of a text where padding stands in front.
        rows = slice(None) if text is None else text[:, 0]
        pairs.append((given.pooler_output[rows], expected.pooler_output[rows]))
    differences = [((a.float() - b.float()).norm(), b.float().norm()) for a, b in pairs]
    apart = [float(off / norm.clamp_min(1e-30)) for off, norm in differences]
    return next((off for off in apart if off != off), max(apart))

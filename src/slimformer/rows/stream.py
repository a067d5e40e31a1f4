"""The residual stream: which tokens of the batch its rows are, where each stands, and which keys it may see."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimformer.cache.slots import has_foreign_cache, layer_cache
from slimformer.cache.steps import is_prepared
from slimformer.calls.masks import ANY_WINDOW, MaskReading, keys_seen, own_key, read_mask
from slimformer.calls.stack_calls import callers_keys, callers_masks, callers_positions
from slimformer.changes.call_context import call_variable
from slimformer.errors import PlanError
from slimformer.model.layer_parts import Kind
from slimformer.rows.rows import Rows

_TAG = "_slimformer_stream"
_leaving_under_gradients: ContextVar[bool] = call_variable("leaving_under_gradients", False)


class ExaminedLayer(Protocol):
    """What row selectors may ask of the layer that runs.

    Attributes:
        layer: Its module.
        attention: Runs its attention for chosen rows; None where that is not possible.
    """

    def looked_into(self) -> bool:
        """Whether somebody has touched a module of any layer of the model."""

    def heads_input(self, stream: Stream, x: Tensor) -> Tensor:
        """What the attention's heads are made of, of the rows `x` `[rows, hidden]` of a stream, by the norm itself."""

    def scores(self, kind: Kind, stream: Stream, x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
        """The input of a sublayer's module times `router` `[hidden]`, plus `bias` `[1]`: float32 `[rows]`."""

    layer: nn.Module
    attention: Any


@dataclass(eq=False)
class Stream:
    """What the executors of one forward pass know about the residual that runs through them.

    It travels on the tensor itself, so that nothing is shared between calls, threads or models. A stream holds all
    tokens of the batch, `[batch, tokens, hidden]`, until one layer lets some leave for good; from then on the tensor
    is `[1, held, hidden]`, and the last layer puts it back among the rows that left.

    Attributes:
        batch: Sequences.
        tokens: Tokens of each, padding included.
        causal: Whether tokens see only the past.
        device: Where the residual lies.
        held: The tokens that are still in the stream, out of `batch * tokens`; None for all.
        full: The residual `[batch * tokens, hidden]` as it was when tokens left.
        shorter: Whether tokens that left are in no cache of the layers from there on.
        mean_behind: Whether tokens that left come out as the mean of those of their sequence that stayed.
        layer: What is known about the modules of the layer that runs.
        known: What was derived from masks and position embeddings, by the identity of the tensor.
        arguments: What the layer got beside the residual.
        past: How many tokens the layer's cache held before this call.
        earlier: How many tokens of the text came in earlier calls, whatever caches hold of them.
    """

    batch: int
    tokens: int
    causal: bool
    device: torch.device
    held: Rows | None = None
    full: Tensor | None = None
    shorter: bool = False
    mean_behind: bool = False
    layer: ExaminedLayer | None = None
    known: dict[Any, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    past: int | Tensor = 0
    earlier: int | Tensor = 0

    @staticmethod
    def of(hidden: Tensor, causal: bool, arguments: Mapping[str, Any]) -> Stream:
        """The stream that a layer's input `[batch, tokens, hidden]` belongs to."""
        found = None if torch.compiler.is_compiling() else getattr(hidden, _TAG, None)
        if found is None:
            found = Stream(hidden.shape[0], hidden.shape[1], causal, hidden.device)
        found.arguments = arguments
        return found

    @property
    def rows(self) -> int:
        """How many rows the residual has."""
        return self.batch * self.tokens if self.held is None else self.held.index.shape[0]

    @staticmethod
    def has_lost_rows(hidden: Tensor) -> bool:
        """Whether a layer's input belongs to a stream that some tokens have left."""
        found = None if torch.compiler.is_compiling() else getattr(hidden, _TAG, None)
        return found is not None and found.held is not None

    def handed_on(self, x: Tensor, last: bool) -> Tensor:
        """The residual `x`, `[rows, hidden]` or of the whole batch, as it leaves a layer: the last gives all tokens."""
        if last:
            return x if x.dim() > 2 else self.restored(x).view(self.batch, self.tokens, -1)
        shape = (self.batch, self.tokens, -1) if self.held is None else (1, *x.shape)
        x = x.view(shape)
        # Tensors in a compiled graph carry no attributes of ours.
        if not torch.compiler.is_compiling():
            setattr(x, _TAG, self)
        return x

    def without(self, rows: Rows | None, x: Tensor) -> tuple[Stream, Tensor]:
        """Let all rows but `rows` leave the stream `x` `[rows, hidden]` for good; at least two stay."""
        if rows is None or rows.index.shape[0] < 2:
            return self, x
        full = self.full
        if self.held is not None:
            index = self.held.index.index_select(0, rows.index)
            full = self._among_the_others(x)
        else:
            index, full = rows.index, x
        held = Rows(self.batch * self.tokens, given_index=index)
        smaller = dataclasses.replace(
            self,
            held=held,
            full=full,
            shorter=self.shorter or rows.evict_caches,
            mean_behind=self.mean_behind or rows.mean_behind,
        )
        return smaller, x.index_select(0, rows.index)

    def restored(self, x: Tensor) -> Tensor:
        """What comes out of the model: the rows `x` `[held, hidden]` and the others, `[batch * tokens, hidden]`."""
        if self.held is None or not self.mean_behind:
            return self._among_the_others(x)
        sequence = self.held.index // self.tokens
        total = x.new_zeros(self.batch, x.shape[1], dtype=torch.float32).index_add_(0, sequence, x.float())
        mean = (total / self.offsets(None).diff().clamp_min(1)[:, None]).to(x.dtype)
        return mean.repeat_interleave(self.tokens, 0).index_copy_(0, self.held.index, x)

    def _among_the_others(self, x: Tensor) -> Tensor:
        """The rows `x` `[held, hidden]` among those that left, as these were, `[batch * tokens, hidden]`."""
        if self.held is None or self.full is None:
            return x
        return self.full.to(x.dtype).index_copy(0, self.held.index, x)

    def padded(self, x: Tensor) -> Tensor:
        """`x` `[held, ...]` at its places in `[batch * tokens, ...]`, zeros elsewhere."""
        if self.held is None:
            return x
        return x.new_zeros((self.batch * self.tokens, *x.shape[1:])).index_copy_(0, self.held.index, x)

    def in_the_batch(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module's output for the rows `x` `[held, hidden]`, which it gets among all tokens of the batch."""
        y: Tensor = module(self.padded(x).view(self.batch, self.tokens, -1))
        y = y.reshape(self.batch * self.tokens, -1)
        return y if self.held is None else y.index_select(0, self.held.index)

    def token_of(self, index: Tensor | None) -> Tensor | None:
        """Which of the `batch * tokens` tokens each row is; None for every token in order."""
        if self.held is None:
            return index
        return self.held.index if index is None else self.held.index.index_select(0, index)

    def offsets(self, rows: Rows | None) -> Tensor:
        """Where every sequence's part of the chosen rows starts and ends, int64 `[batch + 1]`."""
        where = self.derived(rows)
        if "offsets" not in where:
            sequences = torch.arange(self.batch + 1, device=self.device)
            each = self.tokens if rows is None else rows.each
            if each is not None and self.held is None:
                where["offsets"] = sequences * each
            else:
                index = self.held.index if rows is None and self.held is not None else None
                token = self.token_of(rows.index) if rows is not None else index
                if token is not None:
                    where["offsets"] = torch.searchsorted(token, sequences * self.tokens)
        found: Tensor = where["offsets"]
        return found

    def ranges(self, rows: Rows | None) -> Tensor:
        """First and last (exclusive) of every sequence's part of the chosen rows, int64 `[batch, 2]`."""
        where = self.derived(rows)
        if "ranges" not in where:
            offsets = self.offsets(rows)
            where["ranges"] = torch.stack([offsets[:-1], offsets[1:]], 1)
        found: Tensor = where["ranges"]
        return found

    def slots(self) -> tuple[Tensor, Tensor]:
        """Where each row stands when every sequence is filled up in front to the longest, and which places are rows.

        Returns:
            int64 `[held]` into `batch * longest`, and bool `[batch, longest]`.
        """
        where = self.derived(None)
        if "slots" not in where:
            offsets = self.offsets(None)
            counts = offsets.diff()
            longest = int(counts.max())
            sequence = torch.arange(self.batch, device=self.device).repeat_interleave(counts)
            place = torch.arange(self.rows, device=self.device) - offsets[:-1][sequence]
            slots = sequence * longest + longest - counts[sequence] + place
            valid = torch.arange(longest, device=self.device) >= (longest - counts)[:, None]
            where["slots"] = (slots, valid)
        slots, valid = where["slots"]
        return slots, valid

    def ends(self) -> tuple[bool, int]:
        """Whether every sequence holds equally many rows, and how many of the last tokens all sequences hold."""
        where = self.derived(None)
        if "ends" not in where:
            held = None if self.held is None else self.held.mask.view(self.batch, self.tokens)
            last = self.tokens if held is None else held.flip(1).int().cumprod(1).sum(1).min()
            # One wait for the device, for all layers.
            alike, count = torch.stack(
                [self.slots()[1].all().long(), torch.as_tensor(last, device=self.device)]
            ).tolist()
            where["ends"] = (bool(alike), int(count))
        found: tuple[bool, int] = where["ends"]
        return found

    def filled_up(self, x: Tensor) -> Tensor:
        """Rows `[held, heads, head_dim]` as `[batch, heads, longest, head_dim]`, zeros in front."""
        slots, valid = self.slots()
        batch, longest = valid.shape
        full = x.new_zeros(batch * longest, *x.shape[1:]).index_copy_(0, slots, x)
        return full.view(batch, longest, *x.shape[1:]).transpose(1, 2)

    def derived(self, rows: Rows | None) -> dict[Any, Any]:
        """Where what is computed from a choice of rows is kept, with the rows themselves."""
        if rows is not None:
            return rows.derived
        return self.known if self.held is None else self.held.derived

    def positions(self) -> Tensor:
        """The position of every row's token in its text, int64 `[rows]`: the model's position ids, if it has any."""
        given = (self.arguments.get("position_ids"), callers_positions())
        ids = next((ids for ids in map(self._of_tokens, given) if ids is not None), None)
        if ids is None:
            ids = torch.arange(self.tokens, device=self.device)[None] + self.past
            # A layer's mask may begin where its window does, or read otherwise than by flags.
            mask = callers_keys()
            mask = self.arguments.get("attention_mask") if mask is None else mask
            if isinstance(mask, Tensor) and mask.dim() in (2, 4):
                # As position ids are made: none is below 0, at padding in front either.
                ids = (ids - keys_seen(mask).int().argmax(1, keepdim=True)).clamp_min(0)
        ids = ids.expand(self.batch, self.tokens).reshape(-1)
        return ids if self.held is None else ids.index_select(0, self.held.index)

    def _of_tokens(self, ids: Any) -> Tensor | None:
        """Position ids, if there is one for every token."""
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] not in (1, self.batch):
            return None
        if ids.shape[1] > self.tokens and self.causal:
            # A stack that goes on with the last tokens alone, where upper layers read the keys of lower ones (Gemma 4).
            ids = ids[:, -self.tokens :]
        return ids if ids.shape[1] == self.tokens else None

    def real(self) -> Rows | None:
        """The tokens that are not padding, by the attention masks; None if nothing more can leave.

        Where a mask does more than padding, windows and packing explain, every token stays.
        """
        mask = self.arguments.get("attention_mask")
        if (
            self.held is not None
            or not isinstance(mask, Tensor)
            or self.tokens == 1
            or has_foreign_cache(self.arguments)
            or in_a_graph(self.device)
        ):
            return None
        if getattr(layer_cache(self.arguments), "is_compileable", False):
            # In a static cache keys do not end with this call's tokens, and shapes are to stay as they are.
            return None
        if "real" not in self.known:
            text = self._text_of_all_masks(mask)
            everything = text is None or bool(text.all())
            self.known["real"] = (
                None if everything or text is None else Rows(text.numel(), given_mask=text.flatten())
            )
        found: Rows | None = self.known["real"]
        return found

    def padding_mask(self) -> Tensor:
        """Which tokens of the batch are text, bool `[batch, tokens]`.

        Raises:
            PlanError: If the mask does not say which tokens make up one text per row.
        """
        mask, cache = self.arguments.get("attention_mask"), layer_cache(self.arguments)
        if mask is None:
            return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)
        # The keys of a static cache go on behind this call's tokens.
        static = cache is not None and getattr(cache, "is_compileable", False)
        keys = int(self.earlier) + self.tokens if static else None
        if isinstance(mask, Tensor) and in_a_graph(self.device):
            text = own_key(mask if keys is None else mask[..., :keys], self.batch, self.tokens)
        else:
            text = self._text_of_all_masks(mask, packed=False, keys=keys)
        if text is None:
            raise PlanError(
                "Tokens are chosen by comparing those of a text, and the attention mask of this call does not say "
                "which make up one: it is one of your own (biases, trees, hidden keys), holds several texts per row, "
                f"or is a {type(mask).__name__} that cannot be read. Give one text per row and a mask "
                "[batch, tokens] of ones and zeros, with attn_implementation='sdpa' or 'eager'."
            )
        return text

    def reading(self, mask: Any, window: int | None = ANY_WINDOW) -> MaskReading:
        """What a mask says of this call's tokens, read once for all layers that share it."""
        key = (id(mask), window)
        if key not in self.known:
            own = any(mask is given for given in callers_masks())
            found = read_mask(mask, self.batch, self.tokens, self.causal, window, own=own)
            # The mask is kept beside the answer, so that its identity stays its own.
            self.known[key] = (mask, found)
        known: MaskReading = self.known[key][1]
        return known

    def key_ranges(self, mask: Any, window: int | None) -> Tensor | None:
        """First and last key (exclusive) of every sequence, int64 `[batch, 2]`.

        Returns:
            None if the mask does more than causality, the window and padding explain: a mask of the user's own, or
            of several texts packed into one row.
        """
        return None if in_a_graph(self.device) else self.reading(mask, window).ranges

    def _text_of_all_masks(self, mask: Any, packed: bool = True, keys: int | None = None) -> Tensor | None:
        """Which tokens are text by a layer's mask and those that the caller made for other layers.

        Args:
            mask: The layer's.
            packed: Whether texts may lie behind each other in one row.
            keys: How many keys there are up to this call's last token; None if they end there.

        Returns:
            bool `[batch, tokens]`; None where masks say something else.
        """
        masks = [mask, *(given for given in callers_masks() if given is not mask)]
        if keys is not None:
            masks = [given[..., :keys] if isinstance(given, Tensor) else given for given in masks]
        readings = [self.reading(given) for given in masks]
        text = readings[0].text
        for reading in readings:
            if reading.text is None or text is None or (reading.kind == "packed" and not packed):
                return None
            if reading.text is not text and not torch.equal(reading.text, text):
                return None
        return text

    def rotary(
        self, position_embeddings: tuple[Tensor, Tensor], spread: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[batch * tokens, rotary]` from the layer's, `[1 or batch, tokens, rotary]`.

        Args:
            position_embeddings: The layer's.
            spread: Whether each of their first half is to count for two neighbours.
        """
        cos, sin = position_embeddings
        key = ("rotary", id(cos), spread)
        if key not in self.known:
            shape = (self.batch, self.tokens, cos.shape[-1])
            flat = [t.expand(shape).reshape(-1, cos.shape[-1]) for t in (cos, sin)]
            if spread:
                flat = [t[:, : t.shape[1] // 2].repeat_interleave(2, dim=1) for t in flat]
            # The tensor itself is kept too, so that its identity stays its own.
            self.known[key] = (cos, *flat)
        return self.known[key][1], self.known[key][2]


@contextlib.contextmanager
def tokens_leave_under_gradients() -> Iterator[None]:
    """A block in which tokens leave the stream although gradients are recorded, as in inference."""
    token = _leaving_under_gradients.set(True)
    try:
        yield
    finally:
        _leaving_under_gradients.reset(token)


def leaving_under_gradients() -> bool:
    """Whether such a block is open."""
    return _leaving_under_gradients.get()


def in_a_graph(device: torch.device) -> bool:
    """Whether a graph is being compiled or captured, in which no value can be read from the device."""
    if torch.compiler.is_compiling() or is_prepared():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""Read texts several times longer than a rotary model was trained for, without training (arXiv 2401.01325)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimformer.calls.texts import Texts
from slimformer.decisions.registry import register
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import find_anatomy
from slimformer.transforms.rotary import Rotary, find_rotary, rope_type
from slimformer.transforms.transform import Attentions, checked_length
from slimformer.transforms.transform import trained_length as model_length
from slimformer_kernels.self_extend import self_extend
from slimformer_kernels.self_extend_reference import far_turns


@register("SelfExtend")
@dataclass(frozen=True)
class SelfExtend:
    """Near keys keep their distance; far ones share positions in groups, so that no distance is new to the model.

    A query at m and a key at n have the relative position `m - n` where it is below `window`, and
    `m // G - n // G + window - window // G` beyond; in an encoder the same mirrored for keys ahead. It reaches
    `(L0 - window) * G + window` tokens, with L0 the trained length.

    Texts of up to L0 tokens are computed as without it, bit for bit: in a decoder every query at a place below L0, in
    an encoder every text that is no longer. So a cached step gives what one pass gives, and an embedding depends on
    its own text only. Layers with a sliding window are left alone. Cached keys are those of the model.

    Padding may stand at the ends of a row. A tokenizer that cuts texts off (`model_max_length`, `max_seq_length` of a
    SentenceTransformer) has to be told the new length by its owner.

    Attributes:
        group_size: G, how many neighbours share a position.
        window: Distance up to which every token keeps its own.
        trained_length: L0; None for what the config says.

    Raises:
        PlanError: If a field is not a whole number from 1 up.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
        >>> model = LlamaForCausalLM(config)
        >>> method = SelfExtend.for_length(model, tokens=2000)
        >>> method
        SelfExtend(group_size=5, window=128, trained_length=None)
        >>> slimformer.status(slimformer.patch(model, method))[0]["attention"]
        'text rows, SelfExtend(group_size=5, window=128), up to 2048 tokens'
    """

    group_size: int
    window: int
    trained_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("group_size", "window"):
            checked_length("SelfExtend", name, getattr(self, name))
        if self.trained_length is not None:
            checked_length("SelfExtend", "trained_length", self.trained_length, least=2)

    @classmethod
    def for_length(cls, model: Any, tokens: int, trained_length: int | None = None) -> SelfExtend:
        """Group size and window by the published rule: with `s = ceil(tokens / L0)`, `G = s + 1` and `w = L0 / s`.

        Args:
            model: A transformers model, or a SentenceTransformer or Pipeline that holds one.
            tokens: The length to reach.
            trained_length: L0; None for what the config says.

        Raises:
            PlanError: If the model reads that many tokens anyway.
        """
        checked_length("SelfExtend.for_length", "tokens", tokens)
        trained = model_length(find_anatomy(model)) if trained_length is None else trained_length
        if tokens <= trained:
            raise PlanError(
                f"The model was trained for {trained} tokens and reads {tokens} without SelfExtend. Pass the length "
                "of your longest texts, or trained_length=... if the config says too much."
            )
        return cls(*_by_rule(tokens, trained), trained_length)

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Grouped positions in every layer that sees all of a text.

        Raises:
            UnsupportedModelError: If the model's positions are not rotary, or its layers all have a sliding window.
            PlanError: If the window is no smaller than the trained length, or another method changes positions too.
        """
        attentions.claim_positions("SelfExtend")
        rotary = find_rotary(attentions, "SelfExtend")
        trained = self.trained_length or attentions.trained_length
        if self.window >= trained:
            raise PlanError(
                f"SelfExtend(window={self.window}) leaves no position for far tokens: the model was trained for "
                f"{trained}. Take a window below that; SelfExtend.for_length(model, tokens) chooses one."
            )
        turns: dict[tuple[str | None, bool], FarTurns] = {}
        for index, own in rotary.items():
            kind = rope_type(own.module, own.layer_type)
            if kind in ("dynamic", "longrope"):
                raise UnsupportedModelError(
                    f"The rotary embedding of {type(attentions.anatomy.stack).__name__} is of the type {kind!r}, "
                    "which turns by other angles in long texts, by itself. SelfExtend needs angles that stay."
                )
            shared = turns.setdefault((own.layer_type, own.interleaved), FarTurns(own, self.group_size))
            extension = GroupedAttention(self.group_size, self.window, trained, own, shared)
            attentions.scores(index).extension = extension
        capacity = _capacity(self.group_size, self.window, trained)
        attentions.read_texts(capacity)
        note = f"SelfExtend(group_size={self.group_size}, window={self.window}), up to {capacity} tokens"
        return dict.fromkeys(rotary, note)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}


@dataclass
class FarTurns:
    """By how much far keys are turned, kept from step to step and shared by all layers.

    Attributes:
        rotary: What turns queries and keys.
        group_size: How many neighbours share a position.
        made: Cosines and sines by device, dtype and number of places. None is given up for a longer one: what replays
            a step reads them where they are.
    """

    rotary: Rotary
    group_size: int
    made: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def up_to(self, places: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[places or more, rotary_dim]` for keys like this tensor."""
        # Half precision on a GPU, where they are read with every key: finer than a key's own rounding.
        narrow = like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)
        size = 1 << (places - 1).bit_length()
        key = like.device, torch.float16 if narrow else torch.float32, size
        found = self.made.get(key)
        if found is None:
            inv_freq = self.rotary.inv_freq.to(like.device)
            found = far_turns(inv_freq, self.group_size, size, self.rotary.interleaved, key[1])
            found = self.made.setdefault(key, found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own."""
        return {**vars(self), "made": {}}


@dataclass(frozen=True)
class GroupedAttention:
    """The extension of one layer's attention.

    Attributes:
        group_size: How many neighbours share a position.
        window: Distance up to which every token keeps its own.
        trained: The length up to which nothing changes.
        rotary: What turns the layer's queries and keys.
        turns: By how much far keys are turned.
    """

    group_size: int
    window: int
    trained: int
    rotary: Rotary
    turns: FarTurns

    def applies(self, texts: Texts) -> bool:
        """Whether some text is longer than the model was trained for.

        Raises:
            DataError: If one is longer than this reaches, naming what reaches it.
        """
        return texts.check_longer_than(
            self.trained, _capacity(self.group_size, self.window, self.trained), self._remedy
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_offsets: Tensor,
        key_ranges: Tensor,
        longest: int,
        causal: bool,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention with grouped positions, `[queries, heads, head_dim]`; see `slimformer_kernels.self_extend`."""
        return self_extend(
            query,
            key,
            value,
            self.rotary.inv_freq.to(query.device),
            positions=positions,
            query_offsets=query_offsets,
            key_ranges=key_ranges,
            longest=longest,
            causal=causal,
            scale=scale,
            group=self.group_size,
            window=self.window,
            trained=self.trained,
            softcap=softcap,
            interleaved=self.rotary.interleaved,
            turns=self.turns.up_to(key.shape[1], key),
        )

    def _remedy(self, tokens: int) -> str:
        group, window = _by_rule(tokens, self.trained)
        return f"SelfExtend(group_size={group}, window={window}) reaches that."


def _capacity(group: int, window: int, trained: int) -> int:
    return (trained - window) * group + window


def _by_rule(tokens: int, trained: int) -> tuple[int, int]:
    """LongEmbed's choice: group 3 and half of the trained length for twice as much, 5 and a quarter for four times."""
    times = math.ceil(tokens / trained)
    return times + 1, max(trained // times, 1)

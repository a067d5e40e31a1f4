"""Candidates for transformers' assisted generation: from the text so far, or drafted by the model under a slim plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)

from slimformer.cache.slots import CACHE_NAMES
from slimformer.methods.speculation.draft_cache import borrowed, can_borrow
from slimformer.methods.speculation.draft_model import DraftModel
from slimformer.methods.speculation.pace import LONGEST, Pace
from slimformer.methods.speculation.tally import Tally

# As many tokens have to stand in the text a second time before what came next is looked up.
_MATCHING = 3


class Candidates(CandidateGenerator):
    """What one call of `generate` asks for tokens to check.

    A continuation that stands in the text already is copied. Otherwise the draft goes on as long as that pays.
    Greedily, it takes its best tokens. When sampling it samples, and transformers accepts with the probability that
    leaves the model's distribution as it is (arXiv 2211.17192); a copied token is accepted where the model samples it
    anyway.

    Args:
        draft: The model under the draft's plan.
        pace: Decides how much is drafted.
        tally: Counts for `status`.
        config: Of this call.
        model_kwargs: Of the model's first forward pass, its cache among them.
        process: Changes scores as `generate` was asked to.

    Attributes:
        tokens: Written behind the first.
        seconds: In which time.
    """

    def __init__(
        self,
        draft: DraftModel,
        pace: Pace,
        tally: Tally,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        process: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.draft, self.pace, self.tally, self.config, self.process = draft, pace, tally, config, process
        self.cache_name = next(name for name in CACHE_NAMES if model_kwargs.get(name) is not None)
        self.cache = model_kwargs[self.cache_name]
        self.kwargs = {name: value for name, value in model_kwargs.items() if name != self.cache_name}
        self.kwargs.pop("logits_to_keep", None)
        mask = self.kwargs.get("attention_mask")
        self.padded = 0 if mask is None or not draft.bounds else int((mask == 0).sum())
        self.borrows = can_borrow(draft.layout, draft.of_model)
        self.own: Any = None
        self.rounds = 0
        ends = getattr(config, "_eos_token_tensor", None)
        self.ends = set() if ends is None else set(ends.reshape(-1).tolist())
        self._copied, self._confidences, self._drafted = 0, list[float](), 0.0
        self._held, self._begun, self._first = 0, 0.0, 0.0
        self.tokens, self.seconds = 0, 0.0
        pace.begin()

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens to check behind `input_ids` `[1, tokens]`; none in front of the prompt's own forward pass.

        Returns:
            The text with the candidates `[1, tokens + candidates]`, and the scores that they were sampled from
            `[1, candidates, vocabulary]`; None where they were copied or there are none.
        """
        begun = time.perf_counter()
        self.rounds += 1
        self._copied, self._confidences = 0, []
        # The model adds one token itself.
        room = min(LONGEST, int(self.config.max_length) - input_ids.shape[1] - 1, self._to_bound(input_ids))
        found, scores = input_ids, None
        if self.rounds > 1 and room > 0:
            found = self._copy(input_ids, room)
            self._copied = found.shape[1] - input_ids.shape[1]
            if not self._copied and self.pace.drafts:
                found, scores = self._draft(input_ids, room)
        self._begun = time.perf_counter()
        self._drafted = self._begun - begun
        return found, scores

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Count what was accepted."""
        accepted, now = int(num_matches), time.perf_counter()
        if self.rounds == 1:
            self._first = now
        else:
            self.tokens, self.seconds = self.tokens + accepted + 1, now - self._first
            checking = now - self._begun
            self.pace.checked(self._confidences, self._copied, accepted, self._drafted, checking)
        self.tally.count(len(self._confidences), self._copied, accepted)
        if self.own is not None:
            # The text without its last token, as far as the draft has read the same.
            self._crop(min(self._held, input_ids.shape[1] - 1))

    def _to_bound(self, ids: Tensor) -> int:
        """How many tokens may be guessed of which none is beyond a bound: what is done there is not taken back."""
        length = ids.shape[1] - self.padded
        return min(
            (max(bound - length, 0) for bound in self.draft.bounds if bound >= length - 1), default=LONGEST
        )

    def _copy(self, ids: Tensor, room: int) -> Tensor:
        """The text and what came when its last tokens stood there before; the text alone if they never did."""
        length = min(room, self.pace.copies()) if ids.shape[1] > _MATCHING else 0
        if length == 0:
            return ids
        places = (ids[0, :-1].unfold(0, _MATCHING, 1) == ids[0, -_MATCHING:]).all(-1).nonzero()
        if not len(places):
            return ids
        start = int(places[-1]) + _MATCHING
        tokens = ids[0, start : start + length].tolist()
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return torch.cat([ids, ids[:, start : start + end]], 1)

    def _draft(self, ids: Tensor, room: int) -> tuple[Tensor, Tensor]:
        chance, scores = 1.0, []
        kwargs = {**self.kwargs, self.cache_name: self._cache()}
        reads = 1 if self.borrows else ids.shape[1] - self._held
        for _ in range(room):
            given = self.draft.inputs(ids, reads, _to_length(kwargs, ids.shape[1]))
            logits = self.draft.model(**given).logits[:, -1].to(torch.float32, copy=True)
            score = self.process(ids, logits.to(ids.device))
            self._held = ids.shape[1]
            reads = 1
            token, confidence = self._chosen(score)
            ids = torch.cat([ids, token], 1)
            scores.append(score)
            self._confidences.append(confidence)
            chance *= self.pace.chance(confidence)
            if int(token) in self.ends or not self.pace.goes_on(chance):
                break
        return ids, torch.stack(scores, 1)

    def _chosen(self, score: Tensor) -> tuple[Tensor, float]:
        """The next token `[1, 1]`, and how sure of it the draft is."""
        if self.config.do_sample:
            chances = score.softmax(-1)
            token = torch.multinomial(chances, 1)
            return token, float(chances[0, token[0, 0]])
        best, token = score.max(-1)
        return token[:, None], float((best - score.logsumexp(-1)).exp())

    def _cache(self) -> Any:
        if self.borrows:
            return borrowed(self.cache, self.draft.of_model, self.draft.layout)
        if self.own is None:
            self.own = DynamicCache(config=self.draft.model.config.get_text_config(decoder=True))
            self.own.activate_past_recording()
        return self.own

    def _crop(self, length: int) -> None:
        self.own.crop(length - self._held)
        self._held = length


def _to_length(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Arguments of a forward pass, for a text of so many tokens."""
    for lengthen in (_prepare_attention_mask, _prepare_position_ids):
        kwargs = lengthen(kwargs, length, False)
    return _prepare_token_type_ids(kwargs, length)

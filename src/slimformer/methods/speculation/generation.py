"""Stands in for `generate`: lets transformers' assisted generation ask a draft, where that changes no result."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, LogitsProcessor, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode

from slimformer.cache.slots import CACHE_NAMES
from slimformer.methods.speculation.candidates import Candidates
from slimformer.methods.speculation.draft_cache import can_borrow, grows_by_replacing
from slimformer.methods.speculation.draft_model import DraftModel, MakesDraft
from slimformer.methods.speculation.pace import Pace
from slimformer.methods.speculation.tally import Tally
from slimformer.methods.speculation.worth import Clock, Worth

# What the call of `generate` that runs is to ask for candidates: empty until it does, and None where it asks no draft.
_asks: ContextVar[list[Candidates] | None] = ContextVar("slimformer_asks_a_draft", default=None)
# Those that `generate` takes itself, beside what the model and its configuration take.
_ASSISTS = ("assistant_model", "assistant_tokenizer", "custom_generate")
# What remembers what it saw, and would see candidates that are taken back.
_REMEMBERING = (
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)


@dataclass
class Speculating:
    """Stands in for a model's `generate`, with the same arguments and the same result.

    Attributes:
        model: The model.
        makes: Makes its draft.
        replays: Whether its steps are replayed from graphs.
        draft: The draft; None where it is to be made.
        pace: What drafts cost and how often they are right, measured in all calls.
        worth: Whether calls with drafts are faster than calls without.
        tally: Counts for `status`.
        had: The model's own `generate`.
        had_candidates: What it asks for candidates by itself.
    """

    model: Any
    makes: MakesDraft
    replays: Callable[[], bool]
    draft: DraftModel | None = None
    pace: Pace = field(default_factory=Pace)
    worth: Worth = field(default_factory=Worth)
    tally: Tally = field(default_factory=Tally)
    had: Callable[..., Any] = field(init=False)
    had_candidates: Callable[..., Any] = field(init=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a draft of its own, since it may get weights of its own."""
        return {**vars(self), "draft": None}

    def __call__(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the model's own, with drafts where they can be had."""
        self.tally.without = self._without_drafts(inputs, generation_config, args, kwargs)
        if self.tally.without:
            return self.had(inputs, generation_config, *args, **kwargs)
        if self.worth.sits_out():
            self.tally.without = "they did not pay in the calls before"
            clock, own = Clock(), self._own(args, kwargs)
            found = self.had(
                inputs, generation_config, **{**own, "stopping_criteria": StoppingCriteriaList([clock])}
            )
            self.worth.count_without(clock)
            return found
        # What makes `generate` ask for candidates; how many is said by those.
        if generation_config is None:
            kwargs["prompt_lookup_num_tokens"] = 1
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.prompt_lookup_num_tokens = 1
        asked: list[Candidates] = []
        token = _asks.set(asked)
        try:
            found = self.had(inputs, generation_config, *args, **kwargs)
        finally:
            _asks.reset(token)
        for candidates in asked:
            self.worth.count(candidates.tokens, candidates.seconds, self.pace.resting > 0)
        return found

    def candidates(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's `_get_candidate_generator`."""
        asked = _asks.get()
        if asked is None or asked:
            return self.had_candidates(*args, **kwargs)
        config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
        asked.append(
            Candidates(self._draft(), self.pace, self.tally, config, model_kwargs, kwargs["logits_processor"])
        )
        return asked[0]

    def _draft(self) -> DraftModel:
        """The draft, made anew if need be."""
        if self.draft is None or not self.draft.fits(self.model):
            self.draft = self.makes()
        return self.draft

    def _drafted_by_graphs(self) -> bool:
        """Whether the draft's steps are replayed too: in the room of the model's cache."""
        draft = self._draft()
        return draft.replays() and can_borrow(draft.layout, draft.of_model)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call gives beside the inputs and the configuration, by name."""
        return {**dict(zip(self._names[2:], args, strict=False)), **kwargs}

    @property
    def _names(self) -> tuple[str, ...]:
        kind: Any = type(self.model)
        return _names(kind)

    def _without_drafts(
        self, inputs: Any, config: GenerationConfig | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str:
        """Why a call is the model's own alone; empty where drafts change nothing about its result."""
        own, names = self._own(args, kwargs), self._names
        if any(own.get(name) is not None for name in _ASSISTS):
            return "the call brings its own way to generate"
        if own.get("synced_gpus"):
            return "several processes generate in step"
        if own.get("stopping_criteria") or own.get("tokenizer") is not None:
            return "what stops it may have to see every token alone"
        if any(not _forgets(processor) for processor in own.get("logits_processor") or ()):
            return "a logits processor of its own may remember what it saw"
        others = {name: value for name, value in own.items() if name not in names}
        if others.get("cache_implementation") == "paged":
            return "continuous batching"
        others.pop("tokenizer", None)
        chosen, model_kwargs = self.model._prepare_generation_config(copy.copy(config), **others)
        if chosen.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"its mode is {chosen.get_generation_mode().value}"
        given = next(
            (
                value
                for value in (inputs, own.get("input_ids"), own.get("inputs_embeds"))
                if value is not None
            ),
            None,
        )
        texts = (1 if given is None else len(given)) * (chosen.num_return_sequences or 1)
        if texts > 1:
            return f"{texts} texts at once, and transformers' assisted generation takes one"
        if self.replays() and not self._drafted_by_graphs():
            return "steps are replayed from graphs, faster than drafts that are launched one by one"
        return _unlike_steps(chosen, model_kwargs)


def _unlike_steps(config: GenerationConfig, model_kwargs: dict[str, Any]) -> str:
    """Why checked tokens would not be those of single steps, or not with what else was asked for."""
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states of every step were asked for"
    if (config.guidance_scale or 1) != 1 or config.watermarking_config is not None:
        return "guidance and watermarks remember what they saw"
    if config.stop_strings:
        return "what stops it may have to see every token alone"
    if config.prefill_chunk_size is not None:
        return "the prompt was to be read in chunks"
    cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    dynamic = cache is None or (type(cache) is DynamicCache and grows_by_replacing(cache))
    if not config.use_cache or config.cache_implementation not in (None, "dynamic") or not dynamic:
        return "its cache is none from which tokens can be taken back"
    return ""


def _forgets(processor: Any) -> bool:
    """Whether a processor's result depends on the text alone."""
    known = isinstance(processor, LogitsProcessor) and type(processor).__module__ == logits_process.__name__
    return known and not isinstance(processor, _REMEMBERING)


@functools.cache
def _names(model: Any) -> tuple[str, ...]:
    """The arguments of `generate` itself, the first two being the inputs and the configuration."""
    parameters = inspect.signature(inspect.unwrap(model.generate)).parameters.values()
    return tuple(p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD)

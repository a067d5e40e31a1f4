"""A plan judged by several capabilities, each as the part of the dense model's that is kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.panel.capabilities.yours import Judging, Prompt, check_answers, read_prompts
from slimformer.evaluation.panel.capability import Capability, Kept
from slimformer.evaluation.panel.decoders import NAMES, DecoderCapabilities
from slimformer.evaluation.panel.judgement import Judgement
from slimformer.evaluation.panel.sizes import SIZES, PanelBudget
from slimformer.evaluation.readable import predicts_tokens
from slimformer.examination.tiers import support
from slimformer.patching import patched, status


@dataclass(frozen=True)
class Panel:
    """Capabilities of a dense model, measured once, by which any number of plans can be judged.

    Attributes:
        capabilities: With what the dense model does on their rows.
        left_out: Capabilities that the dense model has not got, or that have no room in it, with the reason.
        record: What reproduces the panel, for a plan's `measured`.
    """

    capabilities: Sequence[Capability]
    left_out: Mapping[str, str]
    record: Mapping[str, Any]

    @classmethod
    def recorded(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        texts: Sequence[str] | None = None,
        text_source: str = "built in",
        prompts: str | os.PathLike[str] | Sequence[Prompt] | None = None,
        prompts_by: Judging = "likelihood",
        lengths: Sequence[int] | None = None,
        capabilities: Sequence[str] | None = None,
        budget: PanelBudget = "standard",
        chat: bool | None = None,
        cache: str | os.PathLike[str] | None = None,
        tokens_at_once: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Panel:
        """Run the dense model over what every capability is judged by.

        Args:
            model: A decoder with a language-model head, unpatched.
            tokenizer: Its tokenizer.
            texts: The user's text, for the capability `text`; left out, texts of six kinds that come with the package.
            text_source: Where it came from, for the record.
            prompts: The user's own prompts, for the capability `yours`: a file as `read_prompts` takes it, or prompts.
            prompts_by: How those are judged: by `"likelihood"` of the answers (of what the dense model writes, where
                there are none), or by exact `"match"` of what is written.
            lengths: Tokens of the prompts in which a key is looked for; left out, what the budget says.
            capabilities: Some of `text`, `own words`, `copying`, `retrieval`, `reasoning` and `yours`; left out,
                all that there are.
            budget: How much is read: `"quick"`, `"standard"` (two minutes on two CPU cores for 135M parameters) or
                `"thorough"`.
            chat: Whether prompts are put into the tokenizer's chat template; left out, where it has one.
            cache: A folder for what the dense model writes, which is read from there the next time.
            tokens_at_once: Most tokens per forward; left out, what suits the device.
            seed: Which rows are read, which tokens and keys are drawn.
            progress: Show a progress bar.

        Raises:
            CalibrationError: If the model is patched, predicts no tokens, has none of the capabilities, or gives NaN.
            DataError: If a source cannot be read, an argument is not one of those allowed, or a chat template fails.

        Example:
            >>> from transformers import AutoModelForCausalLM, AutoTokenizer  # doctest: +SKIP
            >>> panel = Panel.recorded(model, tokenizer)  # doctest: +SKIP
            >>> panel.measured(model, slimformer.LayerDrop(attention=[6, 10])).score  # doctest: +SKIP
            0.93
        """
        if budget not in SIZES:
            raise DataError(f"budget must be one of {', '.join(SIZES)}, got {budget!r}.")
        wanted = NAMES if capabilities is None else tuple(capabilities)
        unknown = [name for name in wanted if name not in NAMES]
        if unknown or not wanted:
            raise DataError(f"capabilities must be some of {', '.join(NAMES)}, got {unknown or 'none'}.")
        if status(model):
            raise CalibrationError(
                "The model is patched; a panel is recorded with the dense model. Call unpatch first."
            )
        # Whether layers that no row of the table describes keep a cache is seen when they are called.
        if not predicts_tokens(model, support(model).anatomy):
            raise CalibrationError(
                f"{type(model).__name__} makes embeddings and predicts no tokens. Give a decoder with a language-model "
                "head, or call embedding_panel."
            )
        asked, source = _prompts(prompts)
        if "yours" in wanted and asked:
            check_answers(asked, prompts_by)
        made = DecoderCapabilities(
            model, tokenizer, SIZES[budget], seed=seed, chat=chat, cache=cache, tokens_at_once=tokens_at_once
        )
        steps: dict[str, Callable[[], Capability | str | None]] = {
            "text": lambda: made.text(texts),
            "own words": made.own_words,
            "copying": made.copying,
            "retrieval": lambda: made.retrieval(lengths),
            "reasoning": made.reasoning,
            "yours": lambda: made.yours(asked, prompts_by),
        }
        found, left_out = [], {}
        for name in _tracked([name for name in NAMES if name in wanted], "dense", progress):
            capability = steps[name]()
            if isinstance(capability, str):
                left_out[name] = capability
            elif capability is not None:
                found.append(capability)
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
            raise CalibrationError(f"There is nothing to judge by ({reasons or 'no prompts were given'}).")
        record = record_of(
            found,
            budget=budget,
            seed=seed,
            data=text_source if texts is not None else "built in",
            **({"prompts": source} if source else {}),
            **made.record,
        )
        return cls(found, left_out, record)

    def judged(self, model: Any, progress: bool = False) -> Judgement:
        """Judge a model as it is: patched, repaired, or another checkpoint with the same tokenizer."""
        return Judgement(list(self._each(model, progress)), self.left_out, self.record)

    def measured(self, model: Any, *methods: Any, progress: bool = False) -> Judgement:
        """Judge the dense model patched with methods or a plan; it is left unpatched.

        Raises:
            CalibrationError: If the model is patched already.
            PlanError: If a method does not fit the model.
        """
        if status(model):
            raise CalibrationError("The model is patched already. Call unpatch first, or judged(model).")
        with patched(model, *methods):
            return self.judged(model, progress)

    def _each(self, model: Any, progress: bool) -> Iterator[Kept]:
        for capability in _tracked(self.capabilities, "slim", progress):
            yield capability.judged(model)


def _prompts(given: str | os.PathLike[str] | Sequence[Prompt] | None) -> tuple[list[Prompt], str]:
    if given is None:
        return [], ""
    if isinstance(given, (str, os.PathLike)):
        return read_prompts(given)
    prompts = list(given)
    if len(prompts) < 2 or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise DataError(f"prompts takes a file, or at least two of Prompt; got {len(prompts)} entries.")
    return prompts, f"{len(prompts)} prompts"


def _tracked(items: Sequence[Any], what: str, progress: bool) -> Iterable[Any]:
    return track(items, description=f"panel, {what}", disable=not progress, transient=True)


def record_of(capabilities: Sequence[Capability], **settings: Any) -> dict[str, Any]:
    """What reproduces a panel: its settings, and a digest of the rows of all its capabilities."""
    found = hashlib.sha256()
    for capability in capabilities:
        found.update(repr(capability.digest_parts()).encode())
    return {**settings, "rows": found.hexdigest()[:16]}

"""What a plan makes of long prompts: the wait for the first token, the text that follows, a fact to be recalled."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calls.layer_calls import cache_argument
from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.timing.speed import cache_bytes
from slimformer.patching import patched, status
from slimformer.text.sources import token_blocks

_FACT = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"
_LEAST = 48


@dataclass(frozen=True)
class LongPrompts:
    """One model's figures.

    Attributes:
        first_token_seconds: Median time of reading a prompt.
        cache_bytes: Keys and values of a prompt.
        loss: Mean negative log-likelihood of the tokens that follow, in nats.
        recalled: Share of the facts that stand somewhere in a prompt and are told when it asks for them.
    """

    first_token_seconds: float
    cache_bytes: int
    loss: float
    recalled: float


@dataclass(frozen=True)
class LongPromptComparison:
    """The dense and the patched model on the same prompts.

    Attributes:
        dense: The unpatched model.
        slim: The patched model.
        prompt_tokens: Tokens per prompt.
        prompts: How many, half of them with a fact.
    """

    dense: LongPrompts
    slim: LongPrompts
    prompt_tokens: int
    prompts: int

    @property
    def speedup(self) -> float:
        """How many times sooner the patched model's first token is there."""
        return self.dense.first_token_seconds / self.slim.first_token_seconds


@dataclass(frozen=True)
class _Trial:
    """A prompt `[1, tokens]` and what is wanted behind it, `[1, answer]`; a fact counts when all of it is right."""

    prompt: Tensor
    answer: Tensor
    fact: bool


def measure_long_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *methods: TokenPolicy,
    texts: Sequence[str],
    prompt_tokens: int = 2048,
    answer_tokens: int = 64,
    count: int = 4,
    seed: int = 0,
) -> LongPromptComparison:
    """Read prompts with the dense and the patched model in turns.

    Args:
        model: An unpatched decoder; it is left as it was.
        tokenizer: Its tokenizer.
        methods: What to patch it with.
        texts: What the prompts are cut from; none of it should have chosen the methods.
        prompt_tokens: Tokens per prompt.
        answer_tokens: Tokens of the text that follows.
        count: So many prompts that go on as their text does, and so many that ask for a fact.
        seed: Which of the text is read, and which facts are told.

    Raises:
        CalibrationError: If the model is patched already.
        DataError: If a size is too small, or there is too little text.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, _LEAST),
        ("answer_tokens", answer_tokens, 2),
        ("count", count, 1),
    ):
        if value < least:
            raise DataError(f"{name} must be at least {least}, got {value}.")
    if status(model):
        raise CalibrationError("The model is patched, and both are measured here. Call unpatch first.")
    blocks = token_blocks(
        texts, tokenizer, sequence_length=prompt_tokens + answer_tokens, count=2 * count, seed=seed
    )
    if len(blocks) < 2 * count:
        raise DataError(
            f"The text gives {len(blocks)} prompts of {prompt_tokens} tokens, and {2 * count} are read. Give more "
            "text, or ask for shorter or fewer prompts."
        )
    drawn = random.Random(seed)
    trials = [_following(block, answer_tokens) for block in blocks[::2]]
    trials += [
        _fact(tokenizer, block[:prompt_tokens], place / count, drawn)
        for place, block in enumerate(blocks[1::2])
    ]
    found: dict[str, list[_Run]] = {"dense": [], "slim": []}
    with evaluating(model):
        # What the first call of a process allocates is no part of any prompt's time.
        _run(model, trials[0])
        for trial in trials:
            found["dense"].append(_run(model, trial))
            with patched(model, *methods):
                found["slim"].append(_run(model, trial))
    return LongPromptComparison(
        _summary(found["dense"], trials), _summary(found["slim"], trials), prompt_tokens, len(trials)
    )


def _following(block: Tensor, answer: int) -> _Trial:
    return _Trial(block[None, :-answer], block[None, -answer:], fact=False)


def _fact(tokenizer: PreTrainedTokenizerBase, block: Tensor, place: float, drawn: random.Random) -> _Trial:
    """A prompt as long as the block, with a fact at `place` of it (0 to 1) and a question for it at the end."""
    key = "".join(drawn.choices("0123456789", k=5))
    fact, question, answer = (
        torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])[0]
        for text in (_FACT.format(key=key), _QUESTION, f" {key}")
    )
    text = block[: len(block) - len(fact) - len(question)]
    start = round(place * len(text))
    prompt = torch.cat([text[:start], fact, text[start:], question])
    return _Trial(prompt[None], answer[None], fact=True)


@dataclass(frozen=True)
class _Run:
    seconds: float
    cache_bytes: int
    likelihoods: Tensor
    right: bool


def _run(model: PreTrainedModel, trial: _Trial) -> _Run:
    """Read a prompt, then what is wanted behind it: how likely its tokens are, and whether each is the likeliest."""
    prompt, answer = trial.prompt.to(model.device), trial.answer.to(model.device)
    cache = DynamicCache(config=model.config)
    handed: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    _wait(model.device)
    start = time.perf_counter()
    first = model(input_ids=prompt, logits_to_keep=1, **handed).logits
    _wait(model.device)
    seconds = time.perf_counter() - start
    size = cache_bytes(cache)
    rest = model(input_ids=answer[:, :-1], **handed).logits
    scores = torch.cat([first, rest], dim=1)[0].float().log_softmax(-1)
    return _Run(
        seconds,
        size,
        scores.gather(1, answer[0, :, None]).cpu(),
        bool((scores.argmax(-1) == answer[0]).all()),
    )


def _wait(device: torch.device) -> None:
    # Work on an accelerator is only queued when the call returns.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(runs: Sequence[_Run], trials: Sequence[_Trial]) -> LongPrompts:
    text = [run for run, trial in zip(runs, trials, strict=True) if not trial.fact]
    facts = [run for run, trial in zip(runs, trials, strict=True) if trial.fact]
    return LongPrompts(
        statistics.median(run.seconds for run in runs),
        max(run.cache_bytes for run in runs),
        -float(torch.cat([run.likelihoods for run in text]).mean()),
        sum(run.right for run in facts) / len(facts),
    )

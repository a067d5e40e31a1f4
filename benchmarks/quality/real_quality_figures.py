"""What is measured of a plan: perplexity, five tasks that nothing was chosen or trained by, panel, times, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import slimformer
from benchmarks.frame.compare import release
from benchmarks.frame.flops import flops
from benchmarks.frame.inputs import WIKI_TEST, kept_json, wikitext_perplexity
from benchmarks.frame.registry import Settings
from benchmarks.frame.timing import Candidate, Effort, interleaved
from benchmarks.quality import gsm8k
from benchmarks.quality.accuracy import answered, read_tasks
from benchmarks.quality.real_quality_cases import OWN_WORDS
from slimformer import MixtureOfDepths, Plan
from slimformer.calls.layer_calls import cache_argument
from slimformer.evaluation.panel import Judgement, Panel
from slimformer.evaluation.perplexity import wikitext_blocks
from slimformer.evaluation.timing.speed import cache_bytes
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind

TASKS = {
    "lambada": "LAMBADA",
    "piqa": "PIQA",
    "arc_easy": "ARC-Easy",
    "openbookqa": "OpenBookQA",
    "gsm8k": "GSM8K",
}
_QUESTIONS, _PROBLEMS, _RESAMPLES = 400, 200, 1000
# Of the panel that judges: other rows than those that plans are chosen by.
JUDGING_SEED = 1
Right = Mapping[str, Sequence[bool]]


class Judge:
    """A dense model, and what is asked of plans for it.

    Args:
        settings: Of the run.
        model: Unpatched.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        questions = min(settings.texts or _QUESTIONS, _QUESTIONS)
        self.perplexity = wikitext_perplexity(settings, model, tokenizer, most=questions)
        self.tasks = {name: asked[:questions] for name, asked in read_tasks(settings.data).items()}
        problems = settings.pick(min(settings.texts or _PROBLEMS, _PROBLEMS), 2)
        self.problems = gsm8k.read_problems(settings.data, problems)

    @cached_property
    def dense(self) -> Right:
        """Which questions the unpatched model answers right; found by one process, and kept for the others."""
        count = sum(map(len, self.tasks.values())) + len(self.problems)
        file = self.settings.plans / f"dense-answers-{count}.json"
        found: Right = kept_json(file, lambda: {name: list(right) for name, right in self._answers()})
        return found

    @cached_property
    def panel(self) -> Panel:
        """Recorded once."""
        return Panel.recorded(
            self.model,
            self.tokenizer,
            budget="standard" if self.settings.on_gpu else "quick",
            cache=self.settings.plans / OWN_WORDS,
            seed=JUDGING_SEED,
        )

    def of_dense(self) -> Iterator[tuple[str, dict[str, float]]]:
        """What there is to say of the unpatched model, by what it is about."""
        yield "perplexity", {"perplexity": self.perplexity()}
        for name, right in self.dense.items():
            yield name, task_values(name, right, right)
        yield "tasks", summary(self.dense, self.dense)

    def of(self, plan: Plan) -> Iterator[tuple[str, dict[str, float]]]:
        """The same of a plan, with the panel."""
        # The dense model's before anything is patched.
        dense, panel = self.dense, self.panel
        found: dict[str, Sequence[bool]] = {}
        with slimformer.patched(self.model, plan):
            yield "perplexity", {"perplexity": self.perplexity()}
            for name, right in self._answers():
                found[name] = right
                yield name, task_values(name, right, dense[name])
            yield "tasks", summary(found, dense)
            yield "panel", panel_values(panel.judged(self.model))

    def _answers(self) -> Iterator[tuple[str, Sequence[bool]]]:
        for name, questions in self.tasks.items():
            yield name, answered(self.model, self.tokenizer, questions)
        new_tokens = self.settings.pick(320, 4)
        right = gsm8k.solved(self.model, self.tokenizer, self.problems, new_tokens=new_tokens)
        # Other processes may share the GPU.
        release()
        yield "gsm8k", right

    def speed(self, plan: Plan) -> dict[str, float]:
        """Times of both models in turns, on text, and what the plan leaves of cache, weights and multiplications."""
        tokens = self.settings.pick(4096 if self.settings.on_gpu else 512, 64)
        ids = wikitext_blocks(self.settings.data / WIKI_TEST, self.tokenizer, tokens, count=1)
        ids = ids.to(self.model.device)
        new = self.settings.pick(64, 4)
        values: dict[str, float] = {"prompt_tokens": tokens}
        for name, run in (
            ("prefill", lambda: prefill(self.model, ids)),
            ("generate", lambda: _generate(self.model, ids[:, : tokens // 8], new)),
        ):
            milliseconds = in_turns(self.settings, self.model, run, plan)
            values |= {f"{name}_dense_ms": milliseconds[0], f"{name}_ms": milliseconds[1]}
            values[f"{name}_speedup"] = milliseconds[0] / milliseconds[1]
        dense = cache_bytes(prefill(self.model, ids))
        with slimformer.patched(self.model, plan):
            values["cache"] = cache_bytes(prefill(self.model, ids)) / dense
        values["weights"] = weights_left(self.model, plan)
        values["work"] = _work(self.model, plan, tokens)
        return values


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> DynamicCache:
    """The cache that reading a prompt fills; the head reads the last token only, as in generation."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    return cache


def in_turns(settings: Settings, model: Any, run: Any, *methods: Any) -> tuple[float, float]:
    """Median milliseconds of a call of the unpatched and of the patched model."""

    def unpatched() -> None:
        if slimformer.status(model):
            slimformer.unpatch(model)

    def patched() -> None:
        if not slimformer.status(model):
            slimformer.patch(model, *methods)

    few = Effort(milliseconds=0.0, least=2, most=2, warm_ups=1)
    effort = Effort(milliseconds=3000.0, least=4, most=10, warm_ups=1) if settings.on_gpu else few
    try:
        times = interleaved(
            {"dense": Candidate(run, unpatched), "slim": Candidate(run, patched)},
            settings.device,
            regime="wall",
            effort=effort,
        )
    finally:
        unpatched()
    return times["dense"].p50, times["slim"].p50


def _generate(model: Any, ids: Tensor, new: int) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        repetition_penalty=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )


def weights_left(model: PreTrainedModel, plan: Plan) -> float:
    """Bytes of the weights that a plan's model needs, as a part of all: what is dropped is gone, filters are there."""
    anatomy = find_anatomy(model)
    total = sum(weight.nbytes for weight in model.parameters())
    gone = 0
    for kind in KINDS:
        for layer in (anatomy.layers[number] for number in plan.dropped(kind)):
            for name in anatomy.structure.parts(kind).children_of(layer):
                gone += sum(weight.nbytes for weight in layer.get_submodule(name).parameters())
    added = sum(weight.nbytes for method in plan.drops for weight in method.weights.values())
    return (total - gone + added) / total


def _work(model: PreTrainedModel, plan: Plan, tokens: int) -> float:
    """Multiplications of a prefill as a part of the dense one's, as `benchmarks.frame.flops` counts."""
    routed = [method for method in plan.methods if isinstance(method, MixtureOfDepths)]

    def computed(layer: int, kind: Kind) -> float:
        if layer in plan.dropped(kind):
            return 0.0
        return min((method.keep for method in routed if layer in getattr(method, kind)), default=1.0)

    return flops(model.config, tokens, computed) / flops(model.config, tokens)


def binomial(part: float, count: int) -> float:
    """The standard error of a share of so many questions."""
    return math.sqrt(part * (1 - part) / count)


def task_values(name: str, right: Sequence[bool], dense: Sequence[bool]) -> dict[str, float]:
    """Accuracy with its binomial spread, and as a part of dense's."""
    accuracy, own = sum(right) / len(right), sum(dense) / len(dense)
    found = {name: accuracy, f"{name}_spread": binomial(accuracy, len(right))}
    return found | ({f"{name}_of_dense": accuracy / own} if own else {})


def summary(right: Right, dense: Right) -> dict[str, float]:
    """Mean accuracy over the tasks, that and the worst task as parts of dense's, with spreads over the questions.

    Both models answer the same questions, which are drawn again together.
    """
    slim, own = (torch.stack([_resampled(of[name]) for name in dense]) for of in (right, dense))
    means = slim.mean(0) / own.mean(0).clamp_min(1e-9)
    # A task of which the dense model can do nothing has nothing to lose.
    known = own[:, 0] > 0
    found = {"mean": float(slim.mean(0)[0]), "mean_spread": float(slim.mean(0)[1:].std())}
    if known.any():
        worst = (slim[known] / own[known].clamp_min(1e-9)).amin(0)
        found |= {"mean_of_dense": float(means[0]), "mean_of_dense_spread": float(means[1:].std())}
        found |= {"worst_of_dense": float(worst[0]), "worst_of_dense_spread": float(worst[1:].std())}
    return found


def _resampled(right: Sequence[bool]) -> Tensor:
    """The accuracy, and that of every resample; of the same number of questions the same ones are drawn."""
    values = torch.tensor(right, dtype=torch.float64)
    drawn = torch.randint(
        len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(len(values))
    )
    return torch.cat([values.mean()[None], values[drawn].mean(1)])


def panel_values(judgement: Judgement) -> dict[str, float]:
    """Score, mean and worst, and every capability with its spread."""
    found = {"panel": judgement.score, "panel_spread": judgement.spread, "panel_mean": judgement.mean}
    found["panel_worst"] = judgement.worst.kept
    for of in judgement.capabilities:
        name = of.name.replace(" ", "_")
        found |= {f"panel_{name}": of.kept, f"panel_{name}_spread": of.spread}
    return found

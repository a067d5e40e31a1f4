"""`slimformer.optimize`: the fastest plan within a loss, with the curve that it was chosen from."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drafts.draft import choose_draft
from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask
from slimformer.evaluation.panel import Judgement, Panel, PanelBudget, Prompt
from slimformer.evaluation.panel.capabilities.yours import Judging
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest, predicts_tokens
from slimformer.examination.tiers import support
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.speculation.self_speculation import SelfSpeculation
from slimformer.model.anatomy import transformer_of
from slimformer.optimization.candidates import Candidate, Verdict, best
from slimformer.optimization.goals import GOALS, Conditions, Goal, Wish
from slimformer.optimization.judging import Here, Judges
from slimformer.optimization.measuring.costs import Meter
from slimformer.optimization.measuring.reading import Reading, workload
from slimformer.optimization.outcome import nothing_fits, plan_of, told
from slimformer.optimization.preparation import Asked, prepared
from slimformer.optimization.proposing.programme import check_solver
from slimformer.optimization.proposing.search import Search
from slimformer.optimization.repaired import repair_candidates, why_not
from slimformer.optimization.units import Proposal
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages
from slimformer.training.attempts.minutes import Minutes

_logger = logging.getLogger("slimformer")
DEFAULT_LOSS = 0.02
# The part of the time, after everything is measured, in which is proposed and judged where repair follows.
_PROPOSING = 0.5
# What times differ by from one minute to the next: a wish that is met so nearly is met, and the patch alone is worth
# having from here on.
_AS_FAST, _WON = 0.97, 1.02
# So many of the best are judged on other rows before it is said that none fits.
_VERDICTS = 3
# From so many minutes on, a GPU's panel reads more.
_LONG = 8


def optimize(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    goal: Goal,
    max_loss: float | None = None,
    speedup: float | None = None,
    data: EmbeddingTask | str | os.PathLike[str] | Iterable[str] | Mapping[str, float] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    prompts: str | os.PathLike[str] | Iterable[Prompt] | None = None,
    prompts_by: Judging = "likelihood",
    prompt: int | None = None,
    new_tokens: int | None = None,
    batch: int | None = None,
    minutes: float = 15.0,
    repair: bool = True,
    seed: int = 0,
    judges: Judges | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Find the fastest plan within a loss, or the least loss at a speed, from all that can be left out together.

    Attentions, MLPs and whole blocks may go; of long prompts the tokens that matter least; in embedding models the
    last layers and hidden units of the MLPs. What each saves is measured on this machine in the phase asked for, and
    what each loses on a mixture of text. A mixed integer programme over both proposes, the panel judges what it
    proposes, the pairs that cost more than their sum are learnt, and it proposes again. Then what loses somewhat too
    much is repaired, as far as there is time.

    Args:
        model: An unpatched decoder, encoder or SentenceTransformer, on the device to measure; it is left as it was.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        goal: What is to cost less: `"prefill"` (the wait for the first token), `"generate"` (prompt and tokens behind
            it), `"encode"` (embeddings), or `"memory"` (bytes of weights, as `slimformer.export` leaves them, and of
            the cache behind a prompt).
        max_loss: The part of the dense model's capabilities that may be lost, as the panel measures it: 0.02 for 2% on
            average, and twice as much of each. With 0 only what loses nothing is tuned: for `"generate"` a draft
            (`SelfSpeculation`). 2% if `speedup` is not given either.
        speedup: Instead: the least loss at so many times dense's speed.
        data: As for `slimformer.calibrate`: text like that of your application, a mapping from sources to weights, or
            for a SentenceTransformer what embeddings are for (a folder in BEIR's layout, a `.tsv` file of pairs), whose
            figure then decides alone.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Judge by every fifth text, which is not chosen by.
        prompts: Your own prompts, with answers or without, as the panel takes them; what is kept of these then decides
            alone.
        prompts_by: How those are judged: by `"likelihood"`, or by exact `"match"` of what is written.
        prompt: Tokens of a prompt; None for 8192 on a GPU and 1024 on a CPU, for `"generate"` 512 and 128.
        new_tokens: Tokens that are generated behind it, for `"generate"`: 64 on a GPU and 32 on a CPU if not given.
        batch: Prompts at once, 1 if not given; for `"encode"` texts at once, 32 if not given.
        minutes: How long it may take.
        repair: Whether candidates are repaired where there is time.
        seed: What is drawn.
        judges: Who judges what is proposed; None for this model. `slimformer.integrations.ray.RayJudges` are several
            workers, each with a copy of it.
        checkpoint: A folder for partial results. The same call goes on from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan. `plan.measured["optimize"]` holds every candidate with its speed and what it keeps of each capability,
        `plan.measured["panel"]` what other rows than those it was chosen by say of the plan. Where nothing that was
        tried is faster within the loss, the plan changes nothing, and `plan.measured["optimize"]` has `won` False, with
        the nearest in `why`.

    Raises:
        CalibrationError: If an argument is not one of those allowed or does not suit the model, the minutes are too few
            for one round, or the device is full; partial results are kept.
        DataError: If the text cannot be read, or is shorter than a prompt.
        UnsupportedModelError: If nothing can be left out of the model.
        SlimformerError: If SciPy is not installed.

    Example:
        >>> import slimformer
        >>> plan = slimformer.optimize(model, tokenizer, goal="prefill", max_loss=0.02)  # doctest: +SKIP
        >>> slimformer.patch(model, plan)  # doctest: +SKIP
    """
    if max_loss is None and speedup is None:
        max_loss = DEFAULT_LOSS
    wish = Wish(max_loss, speedup)
    if minutes is None:
        raise CalibrationError("optimize needs an end: give minutes.")
    clock = Minutes(minutes)
    check_solver()
    if goal not in GOALS:
        raise CalibrationError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}.")
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    inner, found = transformer_of(model), support(model)
    _check_goal(inner, predicts_tokens(inner, found.anatomy), goal, prompts)
    tokenizer = tokenizer or tokenizer_of(model)
    most = longest(found.anatomy, tokenizer)
    conditions = Conditions.of(goal, inner.device.type, most, prompt, new_tokens, batch)
    reading = Reading.of(
        data, text_field=text_field, hold_out=hold_out, decoder=goal != "encode", tokens=conditions.prompt
    )
    own = prompts if prompts is None or isinstance(prompts, (str, os.PathLike)) else list(prompts)
    budget: PanelBudget = "standard" if inner.device.type == "cuda" and minutes >= _LONG else "quick"
    with (
        evaluating(inner),
        Stages(progress) as stages,
        _cache(checkpoint) as cache,
        _says_where_full(conditions, checkpoint),
    ):
        asked = Asked(
            model, inner, found, tokenizer, wish, conditions, reading, own, prompts_by, budget, text_field, seed, clock,
            checkpoint, cache, Here() if judges is None else judges,
        )  # fmt: skip
        return _lossless(asked) if max_loss == 0 else _searched(asked, stages, repair)


def _searched(asked: Asked, stages: Stages, repair: bool) -> Plan:
    clock, notes = asked.clock, []
    if asked.support.tier != "rows":
        notes.append(
            f"Of this model only whole sublayers can be dropped, since {asked.support.reason}: nothing is repaired, "
            "and no tokens leave"
        )
        _logger.warning("%s.", notes[-1])
    search, recording = prepared(asked, stages)
    end = clock.begun + clock.seconds
    # The dense model's part of the last panel (its own words are known), what is judged by it, and the last timing.
    timing = 0.0 if search.judge.meter.counts_bytes else 8 * search.costs.dense
    last = 1.4 * recording + timing + 5.0
    left = end - time.monotonic() - last
    refused = why_not(search, _PROPOSING * left) if repair else "repair was not asked for"
    until = time.monotonic() + left * (1.0 if refused else _PROPOSING)
    search.run(until, stages.advance("candidates judged"))
    last = max(last, 0.7 * recording + 2 * max(search.took, default=0.0) + timing)
    if refused:
        notes.append(f"Nothing was repaired: {refused}")
    else:
        repair_candidates(
            search,
            asked.model,
            asked.tokenizer,
            data=asked.reading.data,
            text_field=asked.text_field,
            hold_out=asked.reading.hold_out,
            until=end - last,
            checkpoint=asked.checkpoint,
            cache=asked.cache,
            advance=stages.advance("repairs"),
        )
    chosen, judgement = _chosen(asked, search, notes)
    why = "" if chosen else nothing_fits(search.candidates, asked.wish, asked.conditions.goal)
    measured = _measured(asked, search.candidates, chosen, judgement, why, notes)
    provenance = {
        **_provenance(asked),
        "tokens": search.judge.losses.text.tokens,
        "data": search.judge.losses.text.source,
        "optimize": {
            "costs": search.costs.to_dict(),
            "losses_are": search.judge.losses.name,
            "alone": [
                {"kind": kind, "layer": layer, "losses": dict(of)}
                for (kind, layer), of in search.single.items()
            ],
        },
    }
    return plan_of(chosen, fingerprint(asked.inner), provenance, measured)


def _last_panel(asked: Asked, search: Search, notes: list[str]) -> Panel:
    """Other rows than those that were searched on; the same where others cannot tell what was asked for."""
    panel = asked.panel(last=True)
    decides = {"yours"} & {capability.name for capability in search.judge.panel.capabilities}
    if decides <= {capability.name for capability in panel.capabilities}:
        return panel
    notes.append(
        f"What is lost was measured on what was chosen by, since of the rest of the task {panel.left_out['yours']}"
    )
    return search.judge.panel


def _chosen(asked: Asked, search: Search, notes: list[str]) -> tuple[Candidate | None, Judgement | None]:
    """The best candidate that is faster than dense and fits on rows that were not searched on, too."""
    ordered = best(search.candidates, asked.wish)
    panel, judged = None, 0
    # What loses something has to be faster than the patch alone, which does not.
    alone = max(
        (one.speedup for one in ordered if not (one.proposal.units or one.proposal.base)), default=1.0
    )
    for found in ordered:
        candidate = dataclasses.replace(found, methods=search.methods(found))
        search.candidates[search.candidates.index(found)] = candidate
        timed = search.judge.meter.compared(candidate.methods, max(search.took, default=2.0) / 3)
        again = _with(candidate, timed, None)
        nothing = not (candidate.proposal.units or candidate.proposal.base or candidate.repaired)
        least = _WON if nothing else max(alone, 1.0)
        if again.speedup <= max(least, (asked.wish.speedup or 0.0) * _AS_FAST):
            continue
        if nothing:
            # What loses nothing needs no verdict.
            others = [one for one in search.candidates if one.proposal.units or one.proposal.base]
            said = nothing_fits(others, asked.wish, asked.conditions.goal)
            notes.append(
                f"The plan is slimformer.patch(model) alone, and leaves nothing out: beside that, {said}"
            )
            search.candidates[search.candidates.index(candidate)] = again
            return again, None
        if judged == _VERDICTS or (judged and asked.clock.used > asked.clock.seconds / 60):
            continue
        panel = _last_panel(asked, search, notes) if panel is None else panel
        with patched(asked.model, *candidate.methods):
            judgement = panel.judged(asked.model)
        judged += 1
        verdict = Verdict.of(judgement)
        if asked.wish.max_loss is not None and verdict.need > asked.wish.max_loss:
            _logger.info(
                "%s loses %.2f%% on rows that were not searched on, more than is allowed.",
                candidate.proposal.words,
                100 * verdict.mean,
            )
            search.candidates[search.candidates.index(candidate)] = _with(candidate, timed, verdict)
            continue
        final = _with(candidate, timed, verdict)
        search.candidates[search.candidates.index(candidate)] = final
        return final, judgement
    return None, None


def _with(candidate: Candidate, timed: tuple[float, float], verdict: Verdict | None) -> Candidate:
    dense, cost = timed
    return dataclasses.replace(candidate, dense=dense, cost=cost, verdict=verdict or candidate.verdict)


def _lossless(asked: Asked) -> Plan:
    """What loses nothing: the patch itself, and for generation a draft."""
    work = workload(asked.reading, asked.model, asked.tokenizer, asked.support, asked.conditions, asked.seed)
    meter = Meter(asked.model, asked.support, work, asked.conditions)
    options: list[tuple[str, tuple[Any, ...]]] = [("", (LayerDrop(),))]
    notes = []
    if asked.conditions.goal == "generate":
        try:
            draft = choose_draft(
                asked.model, asked.tokenizer, prompts=max(min(int(asked.clock.seconds / 30), 14), 2)
            )
            options.append(("draft of the model itself", (SelfSpeculation(draft),)))
        except CalibrationError as error:
            notes.append(str(error))
    timed = [meter.compared(methods, 0.2 * asked.clock.seconds) for _, methods in options]
    nothing = Verdict({"everything": 0.0}, {"everything": 0.0})
    candidates = [
        Candidate(Proposal(name, ()), dense, cost, nothing, methods=methods)
        for (name, methods), (dense, cost) in zip(options, timed, strict=True)
    ]
    fitting = best(candidates, asked.wish)
    chosen = fitting[0] if fitting else None
    why = "" if chosen else nothing_fits(candidates, asked.wish, asked.conditions.goal)
    measured = _measured(asked, candidates, chosen, None, why, notes)
    return plan_of(chosen, fingerprint(asked.inner), _provenance(asked), measured)


def _measured(
    asked: Asked,
    candidates: list[Candidate],
    chosen: Candidate | None,
    judgement: Judgement | None,
    why: str,
    notes: list[str],
) -> dict[str, Any]:
    found = told(
        candidates,
        chosen,
        None if judgement is None else Verdict.of(judgement),
        conditions=asked.conditions,
        wish=asked.wish,
        why=why,
        notes=notes,
        minutes=asked.clock.used,
    )
    return {"optimize": found, **({} if judgement is None else {"panel": judgement.to_dict()})}


def _provenance(asked: Asked) -> dict[str, Any]:
    return {
        **versions(asked.support.anatomy),
        "arguments": {
            **dataclasses.asdict(asked.conditions),
            **dataclasses.asdict(asked.wish),
            "minutes": asked.clock.seconds / 60,
            "seed": asked.seed,
            "hold_out": asked.reading.hold_out,
        },
        "data": asked.reading.source,
    }


def _check_goal(model: PreTrainedModel, decoder: bool, goal: Goal, prompts: object) -> None:
    name = type(model).__name__
    if decoder and goal == "encode":
        raise CalibrationError(
            f"{name} predicts tokens, and the goal 'encode' is for embeddings. Ask for prefill, generate or memory."
        )
    if not decoder and goal != "encode":
        raise CalibrationError(
            f"{name} makes embeddings and predicts no tokens, so that the goal is 'encode', got {goal!r}."
        )
    if prompts is not None and goal == "encode":
        raise CalibrationError(
            "Prompts are for models that predict tokens. For embeddings give what they are for as data."
        )


@contextlib.contextmanager
def _cache(checkpoint: str | os.PathLike[str] | None) -> Iterator[str]:
    """Where what the model writes is kept from one panel to the next."""
    if checkpoint is not None:
        yield os.fspath(checkpoint)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@contextlib.contextmanager
def _says_where_full(conditions: Conditions, checkpoint: object) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        kept = "" if checkpoint is None else f" What was measured is kept in {checkpoint}."
        what, shorter = (
            ("prompts", "shorter prompts") if conditions.goal != "encode" else ("texts", "a smaller model")
        )
        raise CalibrationError(
            f"The device is full, with {conditions.batch} {what} of up to {conditions.prompt} tokens at once. Ask for "
            f"a smaller batch or {shorter}.{kept}"
        ) from error

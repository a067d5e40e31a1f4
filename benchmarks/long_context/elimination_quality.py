"""What leaving out tokens of a long prompt costs, measured by what needs far tokens and by what does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import BOOKS, C4, DENSE, QMSUM, WIKI_TRAIN, decoder
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.long_context.far_tokens import Tasks
from benchmarks.long_context.long_prompts import HELD_OUT_BOOKS, HELD_OUT_MEETINGS, LongTexts, meetings
from slimformer import Plan, TokenElimination
from slimformer.decisions.registry import tensors_of
from slimformer.model.anatomy import find_anatomy
from slimformer.text.sources import load_texts
from slimformer.training.loop import TrainingSettings
from slimformer.training.predictors import train_predictors

# What is read, for training and for prompts.
DATA = (BOOKS, QMSUM, WIKI_TRAIN, C4)
LENGTHS = (4096, 8192 - 512, 2048)
SCHEDULES: dict[str, dict[int, float]] = {
    "3: 44%": {3: 0.444},
    "5: 40%": {5: 0.4},
    "6: 50%, 15: 25%": {6: 0.5, 15: 0.25},
    "5: 52%": {5: 0.52},
    "15: 20%": {15: 0.2},
    "20: 20%": {20: 0.2},
}
SCORERS: dict[str, dict[str, Any]] = {
    "attention": {"scorer": "attention"},
    "attention, max over heads": {"scorer": "attention", "heads": "max"},
    "attention, blocks of 128": {"scorer": "attention", "block": 128},
    "attention, blocks of 256, last 768 kept": {"scorer": "attention", "block": 256, "window": 768},
    "predictor": {"scorer": "predictor", "block": 64},
    "predictor, blocks of 256, last 768 kept": {"scorer": "predictor", "block": 256, "window": 768},
    "key norm": {"scorer": "norm"},
    "random": {"scorer": "random"},
}
TRUNCATED = "truncated to as many"


@benchmark(
    "elimination_quality",
    "passkeys, associations, copies and following text by each scorer and schedule",
    model="instruction-tuned decoder",
    data=DATA,
    parts=list(map(str, LENGTHS)),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Dense, truncated, and every scorer at every schedule, at three lengths."""
    model, tokenizer = decoder(settings, settings.dtype)
    layers = len(find_anatomy(model).layers)
    schedules = settings.pick(SCHEDULES, {"2: 50%": {2: 0.5}})
    starts = sorted({layer for schedule in schedules.values() for layer in schedule})
    plan = predictors_of(settings, model, tokenizer, dict.fromkeys(starts, 0.25))
    weights = tensors_of(plan.methods[0])
    for layer, found in plan.measured["predictors"].items():
        values = {name: found[name] for name in ("loss", "recall_all", "recall_last")}
        sizes = f"{found['sizes'][0]} and {found['sizes'][1]} neurons"
        yield Measurement({"layer": int(layer)}, "training of the predictors", values=values, note=sizes)
    texts = LongTexts(settings.data, tokenizer)
    for tokens in settings.pick(LENGTHS, (700,)):
        if not settings.wants(str(tokens)):
            continue
        tasks = Tasks.of(texts, tokens, settings.pick(20, 2), settings.pick(40960, 1024) // tokens)
        yield Measurement({"tokens": tokens, "schedule": ""}, DENSE, values=tasks.measure(model))
        for name, schedule in schedules.items():
            share = computed(schedule, layers)
            at: Parameters = {"tokens": tokens, "schedule": name, "computed": round(share, 3)}
            yield Measurement(at, TRUNCATED, values=tasks.measure(model, last=round(share * tokens)))
            for scorer, options in SCORERS.items():
                learned = options["scorer"] == "predictor"
                own = {**options, "weights": weights} if learned else options
                with slimformer.patched(model, TokenElimination(schedule, **own)):
                    yield Measurement(at, scorer, values=tasks.measure(model))


def predictors_of(settings: Settings, model: Any, tokenizer: Any, schedule: dict[int, float]) -> Plan:
    """Predictors for the layers of a schedule, trained at 4096 tokens."""
    return train_predictors(
        model,
        tokenizer,
        schedule=schedule,
        data=training_texts(settings),
        hold_out=True,
        length=settings.pick(4096, 256),
        settings=TrainingSettings(steps=settings.pick(800, 2)),
        progress=False,
    )


def computed(schedule: Mapping[int, float], layers: int) -> float:
    """The share of tokens times layers that a schedule computes."""
    starts, total, keep = [*schedule, layers], float(min(schedule)), 1.0
    for (start, keep), end in zip(schedule.items(), starts[1:], strict=True):
        total += keep * (end - start)
    return total / layers


def training_texts(settings: Settings) -> list[str]:
    """Everything but the held-out books and meetings."""
    texts = load_texts(settings.data / C4)[0]
    texts += meetings(settings.data)[HELD_OUT_MEETINGS:]
    for path in sorted((settings.data / "books").glob("*.txt")):
        if path.name not in HELD_OUT_BOOKS:
            texts += _chapters(path.read_text(encoding="utf-8")[20_000:])
    return texts + _chapters((settings.data / WIKI_TRAIN).read_text(encoding="utf-8"))


def _chapters(text: str) -> list[str]:
    """Parts in chapters' lengths, so that a long text is both in what is trained on and in what is not."""
    return [text[start : start + 40_000] for start in range(0, len(text), 40_000)]


# What the README shows of the whole.
_SHOWN = {
    "3: 44%": (TRUNCATED, "attention, blocks of 256, last 768 kept", "predictor", "random"),
    "6: 50%, 15: 25%": (TRUNCATED, "attention, max over heads", "predictor", "random"),
    "15: 20%": (TRUNCATED, "attention, blocks of 128", "predictor", "random"),
    "20: 20%": (TRUNCATED, "attention, blocks of 128", "predictor", "random"),
}


@table("elimination_summary", source="elimination_quality")
def summary(content: dict[str, Any]) -> str:
    """A part of the middle length's."""
    return _table(content, 4096, _SHOWN)


def _of_length(name: str, tokens: int) -> None:
    table(name, source="elimination_quality")(lambda content: _table(content, tokens))


for _name, _tokens in (("", 4096), ("_2k", 2048), ("_8k", 8192 - 512)):
    _of_length(f"elimination_quality{_name}", _tokens)


@table("elimination_predictors", source="elimination_quality")
def predictors(content: dict[str, Any]) -> str:
    """Recall of the predictors on text that they were not trained on."""
    rows = []
    for measurement in content["measurements"]:
        at, values = measurement["parameters"], measurement["values"]
        if "layer" in at:
            recalls = [f"{values[name]:.1%}" for name in ("recall_all", "recall_last")]
            rows.append([str(at["layer"]), *recalls, measurement["note"]])
    return tables.markdown(["Layer", "recall, all tokens ask", "recall, last blocks ask", "predictor"], rows)


# The heads of what `figures` gives.
FIGURES = ("passkey", "passkey in a book", "associations", "copy, NLL", "following text, NLL")


def _table(content: dict[str, Any], tokens: int, shown: Mapping[str, tuple[str, ...]] | None = None) -> str:
    """One row per schedule and scorer."""
    found = tables.find(content, DENSE, tokens=tokens)
    dense = None if found is None else found["values"]
    rows = [] if dense is None else [["dense", "", "100%", *figures(dense, None)]]
    for measurement in content["measurements"]:
        at, by = measurement["parameters"], measurement["candidate"]
        wanted = shown is None or by in shown.get(at.get("schedule", ""), ())
        if wanted and at.get("tokens") == tokens and at.get("schedule"):
            share = f"{at['computed']:.0%}"
            rows.append([at["schedule"], by, share, *figures(measurement["values"], dense)])
    return tables.markdown(["From layer: kept", "by", "computed", *FIGURES], rows)


def figures(values: Mapping[str, float], dense: Mapping[str, float] | None) -> list[str]:
    """The cells of one row; following text beside dense, where that is given."""
    following = f"{values['following_nll']:.3f}"
    if dense is not None:
        following = tables.change(values["following_nll"], dense["following_nll"])
    shares = [f"{values[name]:.2f}" for name in ("passkey", "passkey_in_book", "associations", "copy_nll")]
    return [*shares, following]

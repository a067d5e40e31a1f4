"""What minutes of repair win back in a small language model: perplexity and accuracy before and after."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import (
    C4,
    DENSE,
    WIKI_TEST,
    WIKI_TRAIN,
    decoder,
    kept,
    repaired,
    wikitext_perplexity,
)
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from benchmarks.quality.accuracy import TASK_FILES, accuracy, read_tasks
from slimformer import Plan
from slimformer.text.sources import load_texts

BEFORE, AFTER = "as calibrated", "repaired"
TASKS = {"lambada": "LAMBADA", "piqa": "PIQA", "arc_easy": "ARC-Easy", "openbookqa": "OpenBookQA"}
WIKIPEDIA = "c4_calib/wiki_demo.txt"
TRAINING: dict[str, Any] = {"steps": 250, "rows": 4, "accumulate": 2, "length": 1024}
# Lines of a WikiText article that make one text.
_LINES = 8


class Setting(NamedTuple):
    """A plan: what is dropped, and what stands in its place."""

    kind: str
    removed: int
    replace: str

    @property
    def key(self) -> str:
        """For `--only` and for the folder of the plan."""
        return f"{self.kind}-{self.removed}"

    @property
    def name(self) -> str:
        """In words."""
        what = {"attention": "attentions", "mlp": "MLPs"}[self.kind]
        left = {"nothing": "", "filter": ", filters left"}[self.replace]
        return f"{self.removed} {what}{left}"


SETTINGS = (
    Setting("attention", 8, "filter"),
    Setting("attention", 12, "filter"),
    Setting("mlp", 2, "nothing"),
    Setting("mlp", 4, "nothing"),
)


@benchmark(
    "repair",
    "perplexity, LAMBADA, PIQA, ARC-Easy and OpenBookQA of repaired plans",
    model="decoder",
    data=(C4, WIKIPEDIA, WIKI_TRAIN, WIKI_TEST, *TASK_FILES),
    parts=[setting.key for setting in SETTINGS],
    takes=("plans",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4, repair on C4, WikiText-2's training text and Wikipedia, measure on what neither reads."""
    model, tokenizer = decoder(settings)
    perplexity = wikitext_perplexity(settings, model, tokenizer)
    tasks = read_tasks(settings.data)
    texts = training_text(settings)

    def figures() -> dict[str, float]:
        right = {name: accuracy(model, tokenizer, questions) for name, questions in tasks.items()}
        return {"perplexity": perplexity()} | right

    if settings.only is None:
        yield Measurement({"removed": 0}, DENSE, values=figures())
    for setting in settings.pick(SETTINGS, (Setting("attention", 2, "filter"),)):
        if not settings.wants(setting.key):
            continue
        folder = settings.plans / setting.key
        plan, _ = kept(folder / "calibrated", partial(_calibrated, settings, model, tokenizer, setting))
        better, seconds = kept(
            folder / "repaired", partial(repaired, settings, model, tokenizer, plan, texts, **TRAINING)
        )
        for candidate, found in ((BEFORE, plan), (AFTER, better)):
            with slimformer.patched(model, found):
                values = figures()
            if candidate == AFTER:
                steps = len(found.provenance["repair"][-1]["losses"])
                values |= {"seconds": seconds, "steps": float(steps)}
            yield Measurement({"removed": setting.removed, "setting": setting.name}, candidate, values=values)


def training_text(settings: Settings) -> list[str]:
    """C4, the training text of WikiText-2 as its lines stand in it, and Wikipedia; nothing that is measured on."""
    paragraphs = load_texts(settings.data / WIKI_TRAIN)[0]
    wiki = ["\n".join(paragraphs[start : start + _LINES]) for start in range(0, len(paragraphs), _LINES)]
    others = [load_texts(settings.data / name)[0] for name in (C4, WIKIPEDIA)]
    return [*wiki, *(text for part in others for text in part)]


def _calibrated(settings: Settings, model: Any, tokenizer: Any, setting: Setting) -> Plan:
    kind: Any = setting.kind
    replace: Any = setting.replace
    return slimformer.calibrate(
        model,
        tokenizer,
        data=settings.data / C4,
        hold_out=False,
        kinds=(kind,),
        drop=setting.removed,
        replace=replace,
        budget=settings.pick("standard", "quick"),
    )


@table("repair")
def won_back(content: dict[str, Any]) -> str:
    """One row per plan: perplexity before and after, and what that is of the loss; accuracies before and after."""
    dense = tables.find(content, DENSE, removed=0)
    known = [task for task in TASKS if dense is None or task in dense["values"]]
    rows = []
    if dense is not None:
        own = [f"{100 * dense['values'][task]:.1f}" for task in known]
        rows.append([DENSE, f"{dense['values']['perplexity']:.2f}", "", "", *own])
    for name in tables.distinct(content, "setting", where=lambda at: at["removed"] > 0):
        found = [dense, *(tables.find(content, candidate, setting=name) for candidate in (BEFORE, AFTER))]
        if None in found:
            continue
        low, high, now = (tables.figure(one, "perplexity") or 0.0 for one in found)
        _, before, after = (one["values"] for one in found if one is not None)
        accuracies = [f"{100 * before[task]:.1f} → {100 * after[task]:.1f}" for task in known]
        share = f"{100 * (high - now) / (high - low):.0f}%"
        rows.append([name, f"{high:.2f} → {now:.2f}", share, f"{after['seconds']:.0f}", *accuracies])
    head = ["Removed", "perplexity", "won back", "training, s"]
    return tables.markdown([*head, *(TASKS[task] for task in known)], rows)

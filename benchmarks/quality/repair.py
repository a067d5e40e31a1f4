"""What minutes of repair win back in a small language model: perplexity and accuracy before and after."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimformer
from benchmarks.accuracy import accuracy, read_tasks
from benchmarks.drop_table import DENSE, load_model
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import Plan
from slimformer.evaluation.perplexity import perplexity, wikitext_blocks
from slimformer.text.sources import load_texts
from slimformer.training.loop import TrainingSettings

BEFORE, AFTER = "as calibrated", "repaired"
TASKS = {"lambada": "LAMBADA", "piqa": "PIQA", "arc_easy": "ARC-Easy"}
_BLOCKS, _TOKENS = 64, 1024
# Lines of a WikiText article that make one text.
_LINES = 8


class Setting(NamedTuple):
    """A plan: what is dropped, and what stands in its place."""

    kind: str
    removed: int
    replace: str

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
    needs="any",
    description="perplexity, LAMBADA, PIQA and ARC-Easy of repaired plans (--model, --data; --plans, --only)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4, repair on C4, WikiText-2's training text and Wikipedia, measure on what neither reads."""
    model, tokenizer = load_model(settings)
    figures = _figures(settings, model, tokenizer)
    texts = training_text(settings)
    if settings.only is None:
        yield Measurement({"removed": 0}, DENSE, values=figures())
    for setting in settings.pick(SETTINGS, (Setting("attention", 2, "filter"),)):
        if settings.only not in (None, f"{setting.kind}-{setting.removed}"):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (settings.plans or Path(temporary)) / f"{setting.kind}-{setting.removed}"
            plan, _ = kept(folder / "calibrated", partial(_calibrated, settings, model, tokenizer, setting))
            repaired, seconds = kept(
                folder / "repaired",
                partial(repaired_plan, settings, model, tokenizer, plan, texts),
            )
        for candidate, found in ((BEFORE, plan), (AFTER, repaired)):
            with slimformer.patched(model, found):
                values = figures()
            if candidate == AFTER:
                steps = len(repaired.provenance["repair"][-1]["losses"])
                values |= {"seconds": seconds, "steps": float(steps)}
            yield Measurement({"removed": setting.removed, "setting": setting.name}, candidate, values=values)


def repaired_plan(
    settings: Settings, model: Any, tokenizer: PreTrainedTokenizerBase, plan: Plan, texts: list[str]
) -> Plan:
    """The plan after a few minutes on one GPU."""
    training = TrainingSettings(
        steps=settings.pick(250, 4),
        rows=settings.pick(4, 2),
        accumulate=2,
        learning_rate=1e-3,
        precision="bf16" if settings.device.type == "cuda" else "no",
        keep_every=10_000,
    )
    return slimformer.repair(
        model,
        plan,
        tokenizer,
        data=texts,
        near=None,
        rank=settings.pick(32, 2),
        length=settings.pick(_TOKENS, 64),
        every=settings.pick(25, 2),
        patience=6,
        settings=training,
        progress=not settings.smoke,
    )


def kept(folder: Path, make: Callable[[], Plan]) -> tuple[Plan, float]:
    """A plan from its folder, made first if it is not there, and the seconds that this took."""
    if not folder.is_dir():
        start = time.monotonic()
        plan = make()
        plan.save_pretrained(folder)
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - start))
    return Plan.from_pretrained(folder), float(json.loads((folder / "seconds.json").read_text()))


def training_text(settings: Settings) -> list[str]:
    """C4, the training text of WikiText-2 as its lines stand in it, and Wikipedia; nothing that is measured on.

    Raises:
        MissingInput: If there is no `--data`.
    """
    if settings.data is None:
        if not settings.smoke:
            raise MissingInput(
                "it needs --data, a folder with c4_calib/, wikitext2/, lambada_openai/, piqa/ and arc_easy/"
            )
        return load_texts(None, limit=40)[0]
    slice_of_training = settings.data / "wikitext2" / "wiki.train.raw.slice5k.txt"
    paragraphs = load_texts(slice_of_training)[0]
    wiki = ["\n".join(paragraphs[start : start + _LINES]) for start in range(0, len(paragraphs), _LINES)]
    others = [load_texts(settings.data / "c4_calib" / name)[0] for name in ("c4_demo.jsonl", "wiki_demo.txt")]
    return [*wiki, *(text for part in others for text in part)]


def _calibrated(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting
) -> Plan:
    kind: Any = setting.kind
    replace: Any = setting.replace
    return slimformer.calibrate(
        model,
        tokenizer,
        data=None if settings.data is None else settings.data / "c4_calib" / "c4_demo.jsonl",
        hold_out=False,
        kinds=(kind,),
        drop=setting.removed,
        replace=replace,
        budget=settings.pick("standard", "quick"),
    )


def _figures(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], dict[str, float]]:
    text: Path | str = "\n\n".join(load_texts(None, limit=20)[0])
    tasks = {}
    if settings.data is not None:
        text = settings.data / "wikitext2" / "wiki.test.raw"
        tasks = read_tasks(settings.data, settings.pick(None, 4))
    blocks = wikitext_blocks(text, tokenizer, settings.pick(_TOKENS, 128), count=settings.pick(_BLOCKS, 2))
    batch = 8 if settings.device.type == "cuda" else 1

    def figures() -> dict[str, float]:
        found = {"perplexity": perplexity(model, blocks, batch_size=batch)}
        return found | {name: accuracy(model, tokenizer, questions) for name, questions in tasks.items()}

    return figures


@table("repair", source="repair")
def won_back(content: dict[str, Any]) -> str:
    """One row per plan: perplexity before and after, and what that is of the loss; accuracies before and after."""
    dense = tables.find(content, DENSE, removed=0)
    rows = []
    if dense is not None:
        own = [f"{100 * dense['values'][task]:.1f}" for task in TASKS if task in dense["values"]]
        rows.append([DENSE, f"{dense['values']['perplexity']:.2f}", "", "", *own])
    for (name,) in tables.points(content, "setting", where=lambda p: p["removed"] > 0):
        before, after = (tables.find(content, candidate, setting=name) for candidate in (BEFORE, AFTER))
        if dense is None or before is None or after is None:
            continue
        low, high, now = (found["values"]["perplexity"] for found in (dense, before, after))
        accuracies = [
            f"{100 * before['values'][task]:.1f} → {100 * after['values'][task]:.1f}"
            for task in TASKS
            if task in after["values"]
        ]
        share = f"{100 * (high - now) / (high - low):.0f}%"
        rows.append(
            [name, f"{high:.2f} → {now:.2f}", share, f"{after['values']['seconds']:.0f}", *accuracies]
        )
    names = [label for task, label in TASKS.items() if dense is None or task in dense["values"]]
    return tables.markdown(["Removed", "perplexity", "won back", "training, s", *names], rows)

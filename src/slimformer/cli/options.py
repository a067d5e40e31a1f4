"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring with the lines of a paragraph joined, as terminals are wide in many ways."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


class Dtype(str, Enum):
    """What the weights are held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class PanelBudget(str, Enum):
    """How much the panel reads."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"
    none = "none"


class JudgedBy(str, Enum):
    """How the user's prompts are judged."""

    likelihood = "likelihood"
    match = "match"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="A checkpoint's folder or Hub id.")
]
PlanPath = Annotated[
    str, typer.Option("--plan", metavar="PLAN", show_default=False, help="A plan's folder, file or Hub id.")
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="Text: a .txt, .jsonl or .parquet file, a Hub dataset (owner/name:config), or - for standard input. "
        "Left out, the manual that comes with Python.",
    ),
]
AnyData = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="Text: a .txt, .jsonl or .parquet file, a Hub dataset (owner/name:config), or - for standard input. "
        "For embeddings also what they are for: a BEIR folder or a .tsv file of pairs. Left out, Python's manual.",
    ),
]
TaskData = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="What embeddings are for: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/), a .tsv file of "
        "pairs (score, sentence1, sentence2), or text, for what the unpatched model makes of it. Left out, Python's "
        "manual.",
    ),
]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default=False,
        help="Any other setting, such as seed=3. May be repeated.",
    ),
]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field of .jsonl, .parquet, Hub datasets.")]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="What embeddings are measured by: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/), a .tsv "
        "file of pairs (score, sentence1, sentence2), or text, for agreement with the dense model.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help="cpu, cuda, cuda:1 or mps. Left out, a GPU where there is one.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        metavar="NAME",
        show_default=False,
        help="float32, bfloat16 or float16. Left out, the checkpoint's, unless slow here.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same result.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Where the plan goes."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a plan in the output folder.")]
Save = Annotated[bool, typer.Option("--save", help="Keep the figures in the plan, for `slimformer show`.")]
Length = Annotated[int, typer.Option(min=16, metavar="N", help="Tokens per row.")]


class Precision(str, Enum):
    """What is trained in."""

    auto = "auto"
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", metavar="NAME", help="Mixed precision: auto, no, bf16 or fp16."),
]

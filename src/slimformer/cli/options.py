"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """What the weights are held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
        help="Text: a .txt, .jsonl or .parquet file, a Hub dataset (owner/name or owner/name:config), or - for "
        "standard input. Left out, the language reference that comes with Python.",
    ),
]
AnyData = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="Text: a .txt, .jsonl or .parquet file, a Hub dataset, or - for standard input. For embeddings also a "
        "folder in BEIR's layout or a .tsv file of pairs, whose figure is then kept. Left out, the language reference "
        "that comes with Python.",
    ),
]
TaskData = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="What embeddings are for: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/), a .tsv file of "
        "pairs (score, sentence1, sentence2), or text, for what the unpatched model makes of it.",
    ),
]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default=False,
        help="Any other setting, such as seed=3; may be repeated.",
    ),
]
TextField = Annotated[
    str, typer.Option(metavar="NAME", help="Where the text is in .jsonl, .parquet and Hub datasets.")
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="What embeddings are measured by: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/), a .tsv "
        "file of pairs (score, sentence1, sentence2), or text as --data takes it, for agreement with the dense model.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps, or auto for a GPU where there is one.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="What to hold the weights in; auto is the checkpoint's own, or float32 on a CPU that is slow in it.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to standard output instead of tables.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write to."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the plan that the output folder holds.")]
Save = Annotated[bool, typer.Option("--save", help="Keep the figures in the plan, for `slimformer show`.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens per row.")]


class Precision(str, Enum):
    """What is trained in."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="Mixed precision; no is float32, or what the weights are held in."),
]

"""`slimformer embed`: a whole corpus as vectors."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

from slimformer.cli import options
from slimformer.cli.output import note

# Seconds between lines where standard error is no terminal.
_BETWEEN_LINES = 30.0


class Precision(str, Enum):
    """What vectors are kept in, as `slimformer.corpora.precision.Precision`, whose module imports torch."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


def embed(
    model: options.Model,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="SOURCE",
            show_default=False,
            help="A .parquet or .jsonl file, a folder or pattern of such, or hf://datasets/owner/name/...",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="Where vectors go."),
    ],
    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", show_default=False, help="Left out, only what loses nothing."),
    ] = None,
    text_column: Annotated[str, typer.Option(metavar="NAME", help="The column with the text.")] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="A column that is kept beside vectors."),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Which of MODEL's prompts; else its default."),
    ] = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Keep the first N numbers of vectors."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    precision: Annotated[
        Precision, typer.Option(metavar="NAME", help="Of vectors: float32, float16, int8.")
    ] = Precision.float32,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="All vectors in one vectors.npy, too, for faiss, usearch.")
    ] = False,
    max_bad: Annotated[
        int, typer.Option(metavar="N", min=0, help="Rows that may be null, blank, broken.")
    ] = 1000,
    shard_rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of a file of vectors.")] = 8192,
    batch_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Tokens of a batch; else by the device."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Left out, one per GPU or few cores."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Of a worker on a CPU.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", show_default=False, help="Of a cluster; else this machine alone."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", show_default=False, help="cpu or cuda. Left out, GPUs where there are any."
        ),
    ] = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
) -> None:
    """Embed a corpus into FOLDER; the same command goes on where it ended, however it ended."""
    from slimformer.integrations.ray.cluster import from_anywhere, import_ray

    import_ray()
    from slimformer.corpora.embedder import Encoding
    from slimformer.integrations.ray import CorpusRun, embed_corpus

    encoding = Encoding(prompt_name, truncate_dim, normalize, batch_tokens)
    run = CorpusRun(source, text_column, id_column, encoding, precision.value, shard_rows, max_bad)
    with _shown() as progress:
        done = embed_corpus(
            run,
            output,
            functools.partial(_loaded, from_anywhere(model), dtype.value),
            plan,
            address=ray,
            workers=workers,
            threads=threads,
            device=device,
            matrix=matrix,
            progress=progress,
        )
    left_out = f", {done['bad_rows']:,} left out (bad_rows)" if done["bad_rows"] else ""
    note(f"{output} holds the vectors of {done['rows']:,} texts in {done['shards']:,} files{left_out}.")


def _loaded(name: str, dtype: str, device: str) -> Any:
    from slimformer.cli.loading import load_embedder

    return load_embedder(name, device, dtype)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Any], None]]:
    """How far a run is: a line that changes where standard error is a terminal, else one every half minute."""
    console = rich.get_console()
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda pace: status.update(str(pace))
        return
    said = [time.monotonic()]

    def say(pace: Any) -> None:
        if time.monotonic() - said[0] > _BETWEEN_LINES:
            said[0] = time.monotonic()
            note(str(pace))

    yield say

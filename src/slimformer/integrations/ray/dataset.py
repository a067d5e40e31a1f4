"""Embedding as a step of a Ray Data pipeline of one's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from slimformer.corpora.embedder import Embedder, Encoding, loader_of
from slimformer.corpora.precision import Precision, kept
from slimformer.errors import DataError
from slimformer.integrations.ray.cluster import from_anywhere, import_ray, workers_on
from slimformer.plans.plan import Plan

# Enough texts of every length to fill batches that are even.
_ROWS = 2048


def embed_dataset(
    dataset: Any,
    model: str | Callable[[str], Any],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    text_column: str = "text",
    into: str = "embedding",
    encoding: Encoding | None = None,
    precision: str = "float32",
    workers: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    rows: int = _ROWS,
) -> Any:
    """Add the embedding of a text to every row of a Ray dataset, on one worker per GPU or per group of cores.

    Nothing is computed before the dataset is consumed. Rows keep their order within a block, and their columns.

    Args:
        dataset: A `ray.data.Dataset`.
        model: A folder or Hub id that every worker can load, or a function that makes a SentenceTransformer on the
            device that it is given, "cpu" or "cuda".
        plan: A plan, or where one is; without one only what loses nothing is applied.
        text_column: The column with the text.
        into: The column for the vectors, lists of fixed length. Where a row has no text that can be embedded (null,
            another type, broken UTF-8, blank) there is null, and `<into>_error` says why.
        encoding: Prompt, dimensions, length, and tokens of a batch.
        precision: "float32" or "float16"; int8 needs the ranges of a whole corpus, which `embed_corpus` finds.
        workers: How many; None for as many as the cluster has room for.
        threads: Of each, on a CPU.
        device: "cpu", "cuda", or "auto" for GPUs where there are any.
        rows: How many a worker sorts by length and embeds at a time.

    Returns:
        A dataset.

    Raises:
        DataError: If the precision or a number of workers is refused; a missing column or model is one too, when the
            dataset is consumed.
        SlimformerError: If Ray is not installed.

    Example:
        >>> import ray  # doctest: +SKIP
        >>> dataset = ray.data.read_parquet("corpus.parquet")  # doctest: +SKIP
        >>> embed_dataset(dataset, "my-encoder", "plans/mine").write_parquet("vectors")  # doctest: +SKIP
    """
    ray = import_ray()
    allowed = [Precision.float32.value, Precision.float16.value]
    if precision not in allowed:
        raise DataError(f"precision is one of {', '.join(allowed)} here, got {precision!r}.")
    if not ray.is_initialized():
        ray.init()
    there = ray.cluster_resources()
    # One core is for those that read.
    group = workers_on(
        max(1, int(there.get("CPU", 1)) - 1), int(there.get("GPU", 0)), workers, threads, device
    )
    return dataset.map_batches(
        EmbedBatches,
        fn_constructor_kwargs={
            "model": from_anywhere(model), "plan": from_anywhere(plan), "text_column": text_column, "into": into,
            "encoding": encoding, "precision": Precision(precision),
            "threads": None if group.gpus else group.threads, "device": "cuda" if group.gpus else "cpu",
        },
        batch_size=rows, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=group.count), **group.options,
    )  # fmt: skip


class EmbedBatches:
    """What a worker of `embed_dataset` does with tables of rows; its arguments are those of that function."""

    def __init__(
        self,
        model: str | Callable[[str], Any],
        plan: Plan | str | os.PathLike[str] | None,
        text_column: str,
        into: str,
        encoding: Encoding | None,
        precision: Precision,
        threads: int | None,
        device: str,
    ) -> None:
        load = functools.partial(loader_of(model), device)
        self.embedder = Embedder(load, plan, encoding, threads=threads)
        self.text_column, self.into, self.precision = text_column, into, precision

    def __call__(self, table: Any) -> Any:
        """The table with two columns more."""
        # pyarrow, which these need, comes with Ray.
        import pyarrow  # noqa: PLC0415

        from slimformer.corpora.reading import as_bytes  # noqa: PLC0415
        from slimformer.corpora.rows import text_of  # noqa: PLC0415
        from slimformer.corpora.shards import fixed_lists  # noqa: PLC0415

        if self.text_column not in table.column_names:
            raise DataError(
                f"The dataset has no column {self.text_column!r}. Its columns: {', '.join(table.column_names)}. Name "
                "one as text_column."
            )
        found = [text_of(value) for value in as_bytes(table.column(self.text_column)).to_pylist()]
        places = [place for place, (text, _) in enumerate(found) if text is not None]
        vectors, reasons = self.embedder.embed([found[place][0] or "" for place in places])
        stored, more = kept(vectors, self.precision, None)
        why: list[str | None] = [reason or None for _, reason in found]
        for index, reason in {**reasons, **more}.items():
            why[places[index]] = reason
        taken = [index for index, place in enumerate(places) if why[place] is None]
        order = {places[index]: number for number, index in enumerate(taken)}
        lists = fixed_lists(stored[taken])
        column = lists.take(pyarrow.array([order.get(place) for place in range(len(found))], pyarrow.int64()))
        return table.append_column(self.into, column).append_column(
            f"{self.into}_error", pyarrow.array(why, pyarrow.string())
        )

"""mteb (arXiv 2210.07316) on your own data: it takes a patched SentenceTransformer as it is; here is the task."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from slimformer.errors import DataError
from slimformer.evaluation.retrieval import RetrievalTask
from slimformer.integrations.lm_eval import reason


def mteb_task(task: RetrievalTask, *, name: str = "LocalRetrieval", language: str = "eng-Latn") -> Any:
    """A task object for `mteb.evaluate` from a folder in BEIR's layout; nothing is fetched for it.

    Args:
        task: As `read_retrieval` returns it, or a part of it.
        name: What mteb calls it in its results.
        language: Of the texts, in mteb's codes.

    Returns:
        An `mteb` retrieval task whose main score is nDCG@10. mteb asks for a model by the same interface whether it is
        patched or not: `mteb.evaluate(slimformer.patch(model, plan), [mteb_task(task)])`.

    Raises:
        DataError: If mteb is not installed.

    Example:
        >>> from slimformer.evaluation.retrieval import read_retrieval
        >>> import mteb  # doctest: +SKIP
        >>> task = mteb_task(read_retrieval("cranfield"))  # doctest: +SKIP
        >>> mteb.evaluate(model, [task], cache=None).task_results[0].get_score()  # doctest: +SKIP
    """
    try:
        base: Any = importlib.import_module("mteb.abstasks").AbsTaskRetrieval
        metadata: Any = importlib.import_module("mteb").TaskMetadata
    except ImportError as error:
        raise DataError(
            'mteb evaluates with a package that is not installed: pip install "slimformer[mteb]"'
        ) from error
    described = metadata(
        name=name,
        description=f"Retrieval on {task.source}.",
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=[language],
        main_score="ndcg_at_10",
        dataset={"path": f"local/{name}", "revision": "local"},
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    made = type(name, (base,), {"metadata": described})()
    # What mteb's own tasks hold before it converts them; loaded already, so that it fetches nothing.
    made.queries = {"test": dict(task.queries)}
    made.corpus = {"test": {document: {"text": text} for document, text in task.corpus.items()}}
    made.relevant_docs = {
        "test": {query: dict.fromkeys(sorted(documents), 1) for query, documents in task.relevant.items()
                 if query in task.queries}
    }  # fmt: skip
    made.data_loaded = True
    return made


def mteb_scores(model: Any, tasks: Sequence[Any]) -> dict[str, float]:
    """The main score of tasks that mteb knows, or that `mteb_task` makes.

    Args:
        model: A SentenceTransformer, patched or not.
        tasks: Names, such as `"STSBenchmark"`, or tasks.

    Raises:
        DataError: If mteb is not installed, knows no such task, or cannot get at its data.
    """
    try:
        mteb: Any = importlib.import_module("mteb")
    except ImportError as error:
        raise DataError(
            'Tasks for embeddings are run by mteb, which is not installed: pip install "slimformer[mteb]"'
        ) from error
    scores = {}
    for task in tasks:
        try:
            known = mteb.get_task(task) if isinstance(task, str) else task
            found = mteb.evaluate(model, [known], cache=None, show_progress_bar=False)
            scores[known.metadata.name] = float(found.task_results[0].get_score())
        # Its own errors and those of the libraries that fetch data share no base class.
        except Exception as error:
            raise DataError(
                f"mteb cannot run {task}: {reason(error)}. Its documentation lists what it knows; the data of a task "
                "come from the Hub, or from the folder that HF_HOME names."
            ) from error
    return scores

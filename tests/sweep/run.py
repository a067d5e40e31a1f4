"""Outcomes of many classes, in this process or several."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import transformers

from sweep.classes import Family, families, variants
from sweep.outcomes import Result, outcome_of


def results_of(names: Sequence[str], jobs: int = 1) -> Iterator[Result]:
    """The outcomes of the families of these names, as they come."""
    if jobs == 1:
        quiet()
        yield from map(_outcome, names)
        return
    # A process that dies ends the sweep, where a pool of multiprocessing would wait for it.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), quiet) as pool:
        for done in as_completed([pool.submit(_outcome, name) for name in names]):
            yield done.result()


def quiet() -> None:
    """One thread, and nothing said but results."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("slimformer").setLevel(logging.ERROR)


def _outcome(name: str) -> Result:
    return outcome_of(every()[name])


def every() -> dict[str, Family]:
    """All families and their variants, by name."""
    return {**families(), **variants()}

"""Before anything else of the tests: one thread, kernels in Triton's interpreter where there is no GPU, what runs.

Both have to be asked for before torch and Triton are imported, which libraries that some tests use do by themselves.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from itertools import combinations
from typing import Any

# Matrices this small only wait for a second thread, above all where something else runs on its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

_FULL = "full(size=None): only with --full; where a size is given, without it as few combinations of parameters as "
_FULL += "show every `size` of their values together"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every combination that is marked full")
    parser.addoption(
        "--repository", action="store_true", help="run what checks the repository, not the library"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _FULL)
    config.addinivalue_line("markers", "repository: only with --repository; benchmarks, tables and the like")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups: dict[tuple[str, int], list[pytest.Item]] = {}
    left_out = []
    for item in items:
        marker = None if config.getoption("--full") else item.get_closest_marker("full")
        unasked = item.get_closest_marker("repository") and not config.getoption("--repository")
        if unasked or (marker is not None and not marker.args):
            left_out.append(item)
        elif marker is not None:
            function = item.nodeid.partition("[")[0]
            groups.setdefault((function, marker.args[0]), []).append(item)
    for (_, size), group in groups.items():
        taken = _covering([_shown(item, size) for item in group])
        left_out += [item for place, item in enumerate(group) if place not in taken]
    if left_out:
        gone = set(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in gone]


def _shown(item: Any, size: int) -> set[Any]:
    """The groups of `size` parameter values that a test shows together, by their places in its name and fixtures."""
    values = [(name, _name(value)) for name, value in sorted(item.callspec.params.items())]
    return set(combinations(values, min(size, len(values))))


def _name(value: object) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _covering(shown: list[set[Any]]) -> set[int]:
    """Places of few sets that together hold what all do.

    It is always the one that adds most and, among equals, that shows what was shown least.
    """
    missing: set[Any] = set().union(*shown)
    times: Counter[Any] = Counter()
    taken: set[int] = set()

    def worth(place: int) -> tuple[int, int, int]:
        return len(shown[place] & missing), -sum(times[one] for one in shown[place]), -place

    while missing:
        best = max(range(len(shown)), key=worth)
        taken.add(best)
        missing -= shown[best]
        times.update(shown[best])
    return taken

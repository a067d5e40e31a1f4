"""Ray itself: found or asked for, started where none runs, and how many workers it has room for."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slimformer.errors import DataError, SlimformerError

# What lies between reading, embedding and writing, in bytes; more waits in front of the readers.
_STORE = 2**30
# Of a core, for a process that mostly waits for a disk.
READER_CPUS = 0.1


def import_ray() -> Any:
    """Ray, with its data library.

    Raises:
        SlimformerError: If it is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise SlimformerError(
            "Several workers run on Ray with its data library, which is not installed or lacks a package "
            f'({error.name or error}): pip install "slimformer[ray]"'
        ) from error
    return importlib.import_module("ray")


def cores_here() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_anywhere(name: Any) -> Any:
    """A folder or file by its whole path, since workers have folders of their own; anything else as it is.

    Example:
        >>> from_anywhere("owner/name"), from_anywhere(".") == os.getcwd()
        ('owner/name', True)
    """
    there = isinstance(name, (str, os.PathLike)) and os.path.exists(name)
    return os.path.abspath(name) if there else name


@dataclass(frozen=True)
class Workers:
    """How many processes embed at the same time, and on what.

    Attributes:
        count: How many.
        threads: Threads of each, where it computes on a CPU.
        gpus: GPUs of each: 1 or 0.
    """

    count: int
    threads: int
    gpus: int

    def __post_init__(self) -> None:
        for name in ("count", "threads"):
            if getattr(self, name) < 1:
                raise DataError(f"Workers need at least 1 {name}, got {getattr(self, name)}.")

    @property
    def options(self) -> dict[str, Any]:
        """What Ray is told that each of them takes."""
        return {"num_gpus": 1, "num_cpus": 1} if self.gpus else {"num_cpus": self.threads}


def workers_on(cpus: int, gpus: int, count: int | None, threads: int | None, device: str) -> Workers:
    """One worker per GPU or, without any, per group of cores.

    Args:
        cpus: Cores that there are for them.
        gpus: GPUs that there are.
        count: Workers that are wanted; None for as many as fit.
        threads: Threads of each on a CPU; None for four, or half of the cores if these are fewer.
        device: "cpu", "cuda", or "auto" for GPUs where there are any.

    Raises:
        DataError: If a number is below 1, there are not as many cores or GPUs, or the device is another.

    Example:
        >>> workers_on(64, 0, None, None, "auto"), workers_on(64, 8, None, None, "auto")
        (Workers(count=16, threads=4, gpus=0), Workers(count=8, threads=4, gpus=1))
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DataError(
            f"A worker computes on cpu or cuda, got {device!r}. Ray gives each a GPU of its own; CUDA_VISIBLE_DEVICES "
            "says which there are."
        )
    on_gpus = gpus > 0 if device == "auto" else device == "cuda"
    if on_gpus and (gpus < 1 or (count or 1) > gpus):
        raise DataError(
            f"Workers have a GPU each, and Ray knows {gpus}. Ask for fewer --workers, or for --device cpu."
        )
    each = threads if threads is not None else max(1, min(4, cpus // 2))
    fitting = gpus if on_gpus else max(1, cpus // max(each, 1))
    workers = Workers(fitting if count is None else count, each, int(on_gpus))
    if not on_gpus and workers.count * each > cpus:
        raise DataError(
            f"{workers.count} workers of {each} threads take {workers.count * each} cores, and there is room for "
            f"{cpus}. Ask for fewer --workers or --threads."
        )
    return workers


@contextlib.contextmanager
def running_ray(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray, connected to a cluster, or started on this machine and shut down afterwards.

    Args:
        address: Of a cluster, as `ray.init` takes it; None starts one here, unless this process has one already.
        cpus: Of a new one, so many workers' threads fit.

    Raises:
        SlimformerError: If there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers that die are started again, which its core calls an error on standard error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # One more than workers take, for those that read.
        options = {"address": "local", "num_cpus": cpus + 1, "include_dashboard": False}
        options["object_store_memory"] = _STORE
    try:
        _answers(address)
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    # Addresses of several kinds fail in several ways.
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise SlimformerError(
            f"No Ray could be reached at {address or 'this machine'}: {error}. Give the address of a running "
            "cluster (--ray host:6379), or none for one on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _answers(address: str | None) -> None:
    """Raise OSError at once where nothing listens at an address; Ray itself asks for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def quiet_blocks_of_one_row(ray: Any) -> Iterator[None]:
    """Ray Data without bars, handing each row on as soon as it is made; datasets keep what they were made under."""
    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "target_max_block_size", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names if hasattr(context, name)}
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = False
    context.target_max_block_size = 1
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)

"""Judges of proposals on Ray: each worker holds a copy of the model, and all of them judge at the same time."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from slimformer.errors import SlimformerError
from slimformer.integrations.ray.cluster import Workers, cores_here, running_ray, workers_on
from slimformer.optimization.candidates import Candidate
from slimformer.optimization.judging import Judge
from slimformer.optimization.units import Proposal


class RayJudges:
    """Judges for `slimformer.optimize`, as a context manager: Ray is found or started, and ended where it was started.

    As many proposals are made at once as there are workers; `slimformer.optimization.judging.Here` makes the same ones
    in this process, as far as times are the same. A worker computes on the kind of device that the model lies on which
    is optimised: on a CPU, or each on a GPU of its own.

    Args:
        load: Makes the same model on a device that it is given, `"cpu"` or `"cuda"`, in every worker.
        address: Of a Ray cluster; None starts one on this machine.
        workers: How many; None for one per GPU or, without any, per group of cores.
        threads: Of each, on a CPU.

    Raises:
        SlimformerError: If Ray is not installed or cannot be reached, a worker cannot load the model, or one
            fails or dies, or they are given outside of their block.
        DataError: If there are fewer cores or GPUs than asked for.

    Example:
        >>> def load(device):
        ...     return AutoModelForCausalLM.from_pretrained("my-model").to(device)
        >>> with RayJudges(load, workers=2) as judges:  # doctest: +SKIP
        ...     plan = slimformer.optimize(model, tokenizer, goal="generate", judges=judges)
    """

    def __init__(
        self,
        load: Callable[[str], Any],
        *,
        address: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.load, self.address, self.workers, self.threads = load, address, workers, threads
        self._stack = contextlib.ExitStack()
        self._ray: Any = None
        self._actors: list[Any] = []

    def __enter__(self) -> RayJudges:
        cpus = max(cores_here(), (self.workers or 1) * (self.threads or 1))
        self._ray = self._stack.enter_context(running_ray(self.address, cpus))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._stack.close()
        self._ray = None

    def begin(self, judge: Judge) -> int:
        """Start the workers, and give each what it judges by."""
        if self._ray is None:
            raise SlimformerError(
                "RayJudges were given outside of their block, where there is no Ray. Write: with RayJudges(load) as "
                "judges: slimformer.optimize(..., judges=judges)"
            )
        # Those of an earlier call hold the cores or GPUs that these need.
        self._end()
        device = judge.losses.model.device.type
        there = self._ray.cluster_resources()
        group = workers_on(
            max(int(there.get("CPU", 1)) - 1, 1), int(there.get("GPU", 0)), self.workers, self.threads, device
        )
        sent = self._ray.put(_packed(judge, self._ray.cloudpickle))
        worker = self._ray.remote(_Worker).options(**group.options)
        self._actors = [worker.remote(self.load, device, _threads(group)) for _ in range(group.count)]
        for failed in self._answers([actor.begin.remote(sent) for actor in self._actors]):
            if failed:
                raise SlimformerError(failed)
        return group.count

    def judged(self, proposals: Sequence[Proposal]) -> Iterator[Candidate]:
        """Each by a worker of its own, given back in the order of the proposals."""
        asked = [
            self._actors[number % len(self._actors)].judged.remote(proposal)
            for number, proposal in enumerate(proposals)
        ]
        for candidate, kind, failed in self._answers(asked):
            if failed:
                raise torch.OutOfMemoryError(failed) if kind == "full" else SlimformerError(failed)
            yield candidate

    def _end(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def _answers(self, asked: Sequence[Any]) -> Iterator[Any]:
        for answer in asked:
            try:
                yield self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise SlimformerError(
                    f"A worker that judges proposals failed with {type(cause).__name__}: {cause}"
                ) from cause
            except self._ray.exceptions.RayError as error:
                said = " ".join(str(error).split())
                raise SlimformerError(
                    "A worker that judges proposals has died or cannot be reached "
                    f"({type(error).__name__}: {said[:300]}). Where its memory was full, ask for fewer workers. What "
                    "was judged is kept, and the same call goes on from there, where a checkpoint was given."
                ) from error


class _Worker:
    """A process with one model; what goes wrong on purpose goes back as a value, so that it is said in one line."""

    def __init__(self, load: Callable[[str], Any], device: str, threads: int | None) -> None:
        self.load, self.device, self.host = load, device, socket.gethostname()
        self.judge: Judge | None = None
        if threads is not None:
            torch.set_num_threads(threads)

    def begin(self, sent: bytes) -> str:
        """Load the model; what went wrong, empty where nothing did."""
        try:
            material = torch.load(io.BytesIO(sent), map_location=self.device, weights_only=False)
            self.judge = material.on(self.load(self.device))
        except torch.OutOfMemoryError as error:
            return f"A worker's device is too full for the model: {error} (on {self.host})"
        except SlimformerError as error:
            return f"{error} (on {self.host})"
        return ""

    def judged(self, proposal: Proposal) -> tuple[Candidate | None, str, str]:
        """The candidate, or what went wrong."""
        if self.judge is None:
            return None, "", f"A worker was not told what it judges by (on {self.host})"
        try:
            return self.judge.judged(proposal), "", ""
        except torch.OutOfMemoryError as error:
            return None, "full", f"{error} (on {self.host})"
        except SlimformerError as error:
            return None, "", f"{error} (on {self.host})"


def _packed(judge: Judge, pickler: Any) -> bytes:
    """What a judge has beside its model, to be read on whatever device a worker has."""
    packed = io.BytesIO()
    torch.save(judge.material(), packed, pickle_module=pickler)
    return packed.getvalue()


def _threads(group: Workers) -> int | None:
    return None if group.gpus else group.threads

"""The one training loop: small modules beside a frozen model, on accelerate."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from slimformer.errors import CalibrationError
from slimformer.text.progress import Stages
from slimformer.training.checkpoint import Checkpoint, History, Interrupted, InterruptsBetweenSteps
from slimformer.training.row_order import RowOrder

Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast.

    Attributes:
        steps: Updates of the parameters.
        rows: Rows of text per process and forward pass.
        accumulate: Forward passes per update.
        learning_rate: Its peak, after a linear warm-up and before a cosine decay to zero; `"auto"` is what a trainer
            knows to work or finds by a range test.
        warmup: The fraction of the steps that warm up.
        weight_decay: AdamW's.
        clip: The largest norm of the gradient.
        precision: What the trained module computes in: `"no"` for float32, `"bf16"` or `"fp16"` mixed; `"auto"` is
            `"bf16"` where repair finds a bfloat16 model on a GPU, else `"no"`.
        keep_every: Steps between checkpoints.
        seed: Decides the order of the rows and the initial weights.

    Raises:
        CalibrationError: If a number is not one of those allowed.
    """

    steps: int = 400
    rows: int = 1
    accumulate: int = 1
    learning_rate: float | Literal["auto"] = "auto"
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Precision = "auto"
    keep_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate", "keep_every"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if name == "learning_rate" and value == "auto":
                continue
            if isinstance(value, str) or not (value > 0 and math.isfinite(value)):
                allowed = "a number above 0, or 'auto'" if name == "learning_rate" else "above 0"
                raise CalibrationError(f"{name} must be {allowed}, got {value!r}.")
        if not 0 <= self.warmup <= 1:
            raise CalibrationError(f"warmup must be a fraction from 0 to 1, got {self.warmup!r}.")
        if self.precision not in get_args(Precision):
            raise CalibrationError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}."
            )

    @property
    def rows_read(self) -> int:
        """How many rows all processes of a training read."""
        # As launchers say it, since nothing has been started yet.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return self.steps * self.rows * self.accumulate * processes


def seeded(settings: TrainingSettings, seed: int | None) -> TrainingSettings:
    """The settings with another seed; None leaves their own.

    Example:
        >>> seeded(TrainingSettings(), 3).seed
        3
    """
    return settings if seed is None else replace(settings, seed=seed)


@dataclass(frozen=True)
class EarlyStop:
    """Training ends once text that it does not read is no longer predicted better, and goes back to its best step.

    Attributes:
        measure: The figure on that text after so many steps; the lower, the better.
        every: Steps between measurements.
        patience: So many measurements in a row that are no better than the best end it.
        worst: A figure so many times that before the first step ends it, too.
    """

    measure: Callable[[int], float]
    every: int = 25
    patience: int = 4
    worst: float = math.inf

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name} must be at least 1, got {getattr(self, name)!r}.")


class Diverged(CalibrationError):
    """A training whose figures are no finite numbers any more.

    Attributes:
        history: What happened before.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block in which no parameter of a model wants a gradient, so that none is computed on the way to what does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with frozen(layer):
        ...     layer.weight.requires_grad
        False
        >>> layer.weight.requires_grad
        True
    """
    wanting = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def fit(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: Tensor,
    settings: TrainingSettings,
    *,
    identity: Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
    stages: Stages | None = None,
    after_step: Callable[[int], Any] | None = None,
    early_stop: EarlyStop | None = None,
    schedule: Callable[[Any, int], Any] | None = None,
    deadline: float = math.inf,
) -> History:
    """Train `module` in place.

    Under `accelerate launch` every process reads its own share of the rows, and gradients are averaged.

    Args:
        module: What is trained, on the device where it is to run.
        loss: From the module, perhaps wrapped, and a batch `[rows, tokens]` to a scalar.
        rows: Text `[rows, tokens]` on the CPU, taken in an order that the seed decides.
        settings: How long and how fast.
        identity: What must be equal for a checkpoint to be taken over.
        folder: Where checkpoints are kept; the same call resumes from them. None keeps none.
        stages: Where a progress bar is shown.
        after_step: Called with the number of every finished step; what it returns, unless None, goes into the history.
        early_stop: When to end before the last step. The module is then what it was after its best step.
        schedule: Makes the schedule of learning rates from the optimizer and the number of steps; left out, a linear
            warm-up and a cosine decay.
        deadline: No step begins later, by `time.monotonic`.

    Raises:
        Diverged: If the loss, a gradient or a figure on held-out text is no finite number.
        CalibrationError: If accelerate is not installed, the learning rate is no number, or memory runs out.
    """
    accelerator = _accelerator(module, settings)
    if settings.learning_rate == "auto":
        raise CalibrationError(
            "This training takes a learning rate. Give a number above 0 in place of 'auto'."
        )
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    # The accelerator moves the schedule on once per process.
    steps = settings.steps * accelerator.num_processes
    if schedule is None:
        rates = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup * steps), steps)
    else:
        rates = schedule(optimizer, steps)
    wrapped, optimizer, rates = accelerator.prepare(module, optimizer, rates)
    kept = Checkpoint(folder, {**identity, "processes": accelerator.num_processes}, accelerator)
    history = kept.resume()
    processes = accelerator.process_index, accelerator.num_processes
    order, done = (
        RowOrder(rows, settings.rows, settings.accumulate, settings.seed, processes),
        len(history.losses),
    )
    watch = _Watch(module, early_stop, history, kept, accelerator)
    remaining = range(done, settings.steps)
    # A training of the same module that ended within a step leaves its gradients.
    optimizer.zero_grad()
    module.train()
    try:
        with InterruptsBetweenSteps() as interrupts:
            watch.look(0)
            for step in remaining if stages is None else stages.track(remaining, "training"):
                interrupts.check()
                if watch.over or _late(deadline, accelerator):
                    break
                total = 0.0
                for part in range(settings.accumulate):
                    batch = rows[order.of(step, part)].to(accelerator.device)
                    # Processes need each other's gradients once per step only.
                    apart = part + 1 < settings.accumulate
                    with (
                        accelerator.no_sync(wrapped) if apart else contextlib.nullcontext(),
                        torch.enable_grad(),
                    ):
                        with accelerator.autocast():
                            value = loss(wrapped, batch) / settings.accumulate
                        accelerator.backward(value)
                    total += float(value.detach())
                if not math.isfinite(total):
                    raise Diverged(
                        f"The loss is {total} at step {step + 1}. {kept.place()}Try a lower learning rate, or "
                        "precision='no'.",
                        history,
                    )
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
                if settings.precision != "fp16" and not math.isfinite(float(norm)):
                    raise Diverged(
                        f"The gradient is {float(norm)} at step {step + 1}. {kept.place()}Try a lower learning rate, "
                        "or precision='no'.",
                        history,
                    )
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
                history.losses.append(total)
                measured = None if after_step is None else after_step(step + 1)
                if measured is not None:
                    history.measured[str(step + 1)] = measured
                watch.look(step + 1)
                if (step + 1) % settings.keep_every == 0:
                    kept.write(history)
            interrupts.check()
            watch.look(len(history.losses), last=True)
            if len(history.losses) > done:
                kept.write(history)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"Memory ran out with {settings.rows} row(s) of {rows.shape[-1]} tokens at a time. {kept.place()}"
            f"{_smaller(settings, rows.shape[-1])}"
        ) from error
    except Interrupted as interruption:
        kept.write(history)
        raise KeyboardInterrupt from interruption
    watch.go_back()
    module.eval()
    return history


def _late(deadline: float, accelerator: Any) -> bool:
    """Whether time is over in any process, so that all of them stop at one step."""
    late = time.monotonic() > deadline
    if deadline == math.inf or accelerator.num_processes == 1:
        return late
    anywhere = torch.tensor(float(late), device=accelerator.device)
    return float(accelerator.reduce(anywhere, "sum")) > 0


def _smaller(settings: TrainingSettings, tokens: int) -> str:
    if settings.rows == 1:
        return f"Try rows of {tokens // 2} tokens, or a smaller dtype for the model."
    parts = math.ceil(settings.rows / (settings.rows // 2))
    return (
        f"Try rows={settings.rows // 2} with accumulate={settings.accumulate * parts}, which trains the same; else "
        "shorter rows, or a smaller dtype for the model."
    )


def processes_meet(model: nn.Module) -> None:
    """Let the processes of a launcher know each other before they train, for what they do together before."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _accelerate().PartialState(cpu=next(model.parameters()).device.type == "cpu")


def _accelerate() -> Any:
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise CalibrationError(
            "Training needs accelerate, which is not installed. Install it with `pip install slimformer[training]`."
        ) from error


def _accelerator(module: nn.Module, settings: TrainingSettings) -> Any:
    accelerate = _accelerate()
    accelerate.utils.set_seed(settings.seed)
    device = next(module.parameters()).device
    if accelerate.PartialState(cpu=device.type == "cpu").num_processes == 1:
        # It remembers the precision of the first training in a process, and refuses another.
        accelerate.state.AcceleratorState._reset_state()
    try:
        # Nothing here has buffers to send, and gradients need no copy beside those that are sent.
        several = accelerate.utils.DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True
        )
        return accelerate.Accelerator(
            mixed_precision="no" if settings.precision == "auto" else settings.precision,
            cpu=device.type == "cpu",
            kwargs_handlers=[several],
        )
    except ValueError as error:
        raise CalibrationError(
            f"precision={settings.precision!r} does not work on {device}: {error}. Use precision='no'."
        ) from error


class _Watch:
    """The figure on held-out text, and the module as it was when that was best."""

    def __init__(
        self,
        module: nn.Module,
        early_stop: EarlyStop | None,
        history: History,
        kept: Checkpoint,
        accelerator: Any,
    ) -> None:
        self.module, self.early_stop, self.history = module, early_stop, history
        self.kept, self.accelerator = kept, accelerator

    @property
    def over(self) -> bool:
        """Whether the last measurements are all no better than the best."""
        if self.early_stop is None or not self.history.held_out:
            return False
        figures = list(self.history.held_out.values())
        # What starts from nothing lost has no multiple of it.
        if figures[0] > 0 and figures[-1] > self.early_stop.worst * figures[0]:
            return True
        return (
            sum(int(step) > self.history.best for step in self.history.held_out) >= self.early_stop.patience
        )

    def look(self, step: int, last: bool = False) -> None:
        """Measure, if it is time to."""
        found = self.early_stop
        if found is None or (step % found.every and not last) or str(step) in self.history.held_out:
            return
        measured = torch.tensor(found.measure(step), device=self.accelerator.device)
        # One figure for all processes, so that all of them stop.
        value = float(self.accelerator.reduce(measured, "mean"))
        if not math.isfinite(value):
            raise Diverged(
                f"Held-out text gives {value} after step {step}. {self.kept.place()}Try a lower learning rate, or "
                "precision='no'.",
                self.history,
            )
        self.history.held_out[str(step)] = value
        if self.history.best == step:
            state = self.module.state_dict()
            self.kept.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def go_back(self) -> None:
        """Give the module what it had at the best step."""
        if self.kept.best is not None:
            self.module.load_state_dict(self.kept.best)

"""Repairs that are interrupted, that fail, and that several processes share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.test_repair import repaired, strong
from tests.training.test_training import TEXTS
from torch import Tensor, nn
from typer.testing import CliRunner

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.cli import app
from slimformer.errors import CalibrationError
from slimformer.training.distillation import Distillation
from slimformer.training.loop import TrainingSettings
from tiny_checkpoints import tiny_checkpoint


def test_an_interrupted_repair_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = strong("llama"), Plan([LayerDrop(attention=[1, 3])])
    settings = TrainingSettings(steps=8, rows=2, learning_rate=1e-3, keep_every=100)
    whole = repaired(model, plan, settings, rounds=2, every=2)
    keys, calls, own = set(vars(model)), 0, Distillation.loss

    def pressed(self: Distillation, module: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 11:
            signal.raise_signal(signal.SIGINT)
        return own(self, module, batch)

    monkeypatch.setattr(Distillation, "loss", pressed)
    with pytest.raises(KeyboardInterrupt):
        repaired(model, plan, settings, rounds=2, every=2, checkpoint=tmp_path)
    assert set(vars(model)) == keys
    assert slimformer.status(model) == {}
    monkeypatch.undo()
    again = repaired(model, plan, settings, rounds=2, every=2, checkpoint=tmp_path)
    assert again.provenance["repair"] == whole.provenance["repair"]
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model, plan = strong("llama"), Plan([LayerDrop(attention=[1])])
    wild = TrainingSettings(steps=30, rows=2, learning_rate=1e30, clip=1e9, keep_every=1)
    with pytest.raises(CalibrationError, match=r"The last good checkpoint is in .*round-1"):
        repaired(model, plan, wild, checkpoint=tmp_path)
    assert slimformer.status(model) == {}
    assert (tmp_path / "round-1" / "state" / "training.json").exists()


def test_two_processes_train_what_one_does_with_twice_the_rows(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama")
    Plan([LayerDrop(attention=[1], mlp=[2])]).save_pretrained(tmp_path / "plan")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))

    def arguments(name: str, rows: int) -> list[str]:
        options = (
            f"--plan plan -o {name} --data text.txt --data copying=0.5 --steps 6 --length 32 --minutes 0 "
            f"--set rows={rows} --set every=3 --set rank=2 --set panel=null"
        )
        given = (
            str(tmp_path / part) if part in ("plan", "text.txt", name) else part for part in options.split()
        )
        return ["repair", model, *given, "--device", "cpu"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
    }
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "from slimformer.cli import main; main()", *arguments("two", 1)],
            env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert CliRunner().invoke(app, arguments("one", 2)).exit_code == 0
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 0, said[-2000:]
    one, two = (Plan.from_pretrained(tmp_path / name) for name in ("one", "two"))
    curves = [plan.provenance["repair"][0]["held_out"] for plan in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    figures = [plan.measured["repair"]["divergence_after"] for plan in (one, two)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)

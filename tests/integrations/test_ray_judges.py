"""Proposals judged on Ray: the candidates that this process finds, and one line where a worker cannot go on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.optimization.conftest import TEXTS, strong

import slimformer
from command_line import refused, run, wrong
from embedding_data import TEXTS as SENTENCES
from slimformer import Plan
from slimformer.errors import CalibrationError, DataError, SlimformerError
from slimformer.optimization.judging import Here
from slimformer.optimization.proposing import search
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytest.importorskip("ray.data")

import slimformer.integrations.ray.cluster as cluster  # noqa: E402
from slimformer.integrations.ray import RayJudges  # noqa: E402

QUICK: dict[str, Any] = {
    "goal": "memory",
    "data": TEXTS,
    "minutes": 3,
    "prompt": 32,
    "repair": False,
    "max_loss": 0.9,
}


@pytest.fixture(scope="module", autouse=True)
def running() -> Any:
    """One Ray for all: starting it takes longer than any of them."""
    with cluster.running_ray(None, 2):
        yield


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST", 4)


def load(device: str) -> Any:
    return strong().to(device)


def optimized(judges: Any, **more: Any) -> Plan:
    return slimformer.optimize(strong(), tiny_tokenizer(), judges=judges, **{**QUICK, **more})


def test_two_workers_find_the_candidates_of_one_process() -> None:
    here = optimized(Here(2))
    with RayJudges(load, workers=2, threads=1) as judges:
        there = optimized(judges)
    assert there.methods == here.methods
    found, expected = (plan.measured["optimize"]["candidates"] for plan in (there, here))
    assert [entry["units"] for entry in found] == [entry["units"] for entry in expected]
    for entry, same in zip(found, expected, strict=True):
        assert entry["lost"] == pytest.approx(same["lost"], abs=1e-6)
        assert (entry["dense"], entry["cost"]) == (same["dense"], same["cost"])


def test_the_same_judges_serve_a_second_call() -> None:
    # There is room for two workers, so that those of the first call have to be gone.
    with RayJudges(load, workers=2, threads=1) as judges:
        first, second = optimized(judges), optimized(judges)
    assert second.methods == first.methods


def test_judges_outside_of_their_block_say_how_they_are_given() -> None:
    with pytest.raises(SlimformerError, match="with RayJudges"):
        optimized(RayJudges(load, workers=1, threads=1))


def test_an_encoder_is_judged_there_too() -> None:
    def encoder(device: str) -> Any:
        return strong("bert").to(device)

    options = {**QUICK, "goal": "encode", "data": SENTENCES * 3}
    del options["prompt"]
    with RayJudges(encoder, workers=1, threads=1) as judges:
        plan = slimformer.optimize(strong("bert"), tiny_tokenizer(), judges=judges, **options)
    assert len(plan.measured["optimize"]["candidates"]) > 1


def other(device: str) -> Any:
    return strong(num_hidden_layers=3).to(device)


def absent(device: str) -> Any:
    raise CalibrationError("There is no folder my-model")


def missing(device: str) -> Any:
    raise OSError("my-model is no folder")


def dies(device: str) -> Any:
    os._exit(1)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (other, "given another model"),
        (absent, r"There is no folder my-model \(on "),
        (missing, "failed with OSError: my-model is no folder"),
        (dies, "A worker that judges proposals has died"),
    ],
)
def test_a_worker_that_cannot_judge_says_why(loader: Callable[[str], Any], said: str) -> None:
    with pytest.raises(SlimformerError, match=said), RayJudges(loader, workers=1, threads=1) as judges:
        optimized(judges)


def test_what_was_judged_before_a_worker_died_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mortal(device: str) -> Any:
        model, calls = strong().to(device), []
        forward = model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > 60 and (tmp_path / "mortal").exists():
                os._exit(1)
            return forward(*args, **kwargs)

        model.forward = counted
        return model

    (tmp_path / "mortal").touch()
    with (
        pytest.raises(SlimformerError, match="the same call goes on"),
        RayJudges(mortal, workers=1, threads=1) as judges,
    ):
        optimized(judges, checkpoint=tmp_path / "kept")
    (tmp_path / "mortal").unlink()
    assert (tmp_path / "kept" / "calibration.json").exists()
    assert optimized(None, checkpoint=tmp_path / "kept").methods == optimized(None).methods


def test_more_workers_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(DataError, match="Ask for fewer"), RayJudges(load, workers=64, threads=1) as judges:
        optimized(judges)


def test_the_command_judges_on_workers(tmp_path: Path) -> None:
    llama = tiny_checkpoint(tmp_path / "llama", "llama")
    command = ["optimize", llama, "-o", tmp_path / "plan", "--for", "memory", "--prompt", 48, "--minutes", 3,
               "--max-loss", "60%", "--device", "cpu", "--set", "repair=false"]  # fmt: skip
    run(*command, "--ray", "local", "--set", "workers=2", "--set", "threads=1")
    assert Plan.from_pretrained(tmp_path / "plan").measured["optimize"]["won"] is True
    assert "workers does not apply" in wrong(*command, "--force", "--set", "workers=2")


def test_an_address_without_a_cluster_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where this process has no Ray.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        said = refused("optimize", "my-model", "-o", tmp_path / "p", "--for", "memory", "--ray", address)
    assert f"No Ray could be reached at {address}" in said

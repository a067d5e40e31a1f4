"""`slimformer calibrate eliminate` and `route`, and the names that they had before."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import refused, run, wrong
from slimformer import MixtureOfDepths, Plan, TokenElimination
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers enough to choose some to route, and positions for a prompt that may lose tokens."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "deep", "llama", num_hidden_layers=6, max_position_embeddings=512
    )
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def test_eliminate_chooses_a_layer_and_a_fraction(deep: str, tmp_path: Path) -> None:
    sizes = (
        "--length",
        300,
        "--set",
        "answer=16",
        "--set",
        "texts=2",
        "--set",
        "layers=2,4",
        "--set",
        "keep=0.5",
    )
    shown = run(
        "calibrate", "eliminate", deep, "-o", tmp_path / "p", "--max-loss", 10, *sizes, "--set", "window=32"
    )
    plan = Plan.from_pretrained(tmp_path / "p")
    assert plan.methods == (TokenElimination({2: 0.5}, window=32),)
    assert [(point["layer"], point["keep"]) for point in plan.provenance["curve"]] == [(2, 0.5), (4, 0.5)]
    assert "0.5" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


PREDICTOR = ("--schedule", "3=0.5", "--steps", 2, "--length", 128)
SIZES = {"size": 8, "rank": 4}


def test_eliminate_trains_predictors_and_the_old_name_does_the_same(deep: str, tmp_path: Path) -> None:
    settings = [word for name, value in SIZES.items() for word in ("--set", f"{name}={value}")]
    run("calibrate", "eliminate", deep, "-o", tmp_path / "new", "--predictor", *PREDICTOR, *settings)
    (method,) = Plan.from_pretrained(tmp_path / "new").methods
    assert (method.schedule, method.scorer) == ({3: 0.5}, "predictor")
    options = [word for name, value in SIZES.items() for word in (f"--{name}", value)]
    old = run("train-predictor", deep, "-o", tmp_path / "old", *PREDICTOR, *options, "--seed=0", "--hold-out")
    assert "train-predictor is deprecated: slimformer calibrate eliminate --predictor" in old.stderr
    assert (
        Plan.from_pretrained(tmp_path / "old").to_dict() == Plan.from_pretrained(tmp_path / "new").to_dict()
    )


def test_route_chooses_layers_and_trains_routers_and_the_old_name_does_the_same(
    deep: str, tmp_path: Path
) -> None:
    sizes = ("--length", 48, "--steps", 3, "--number", 2, "--keep", 0.6)
    run(
        "calibrate", "route", deep, "-o", tmp_path / "new", *sizes, "--set", "shared=layer", "--set", "rows=2"
    )
    plan = Plan.from_pretrained(tmp_path / "new")
    (method,) = plan.methods
    assert (len(method.attention), method.keep, method.shared) == (2, 0.6, "layer")
    assert plan.measured["routers"]
    assert plan.provenance["layers_by"] == "skip_cost"
    assert (plan.provenance["arguments"]["rows"], plan.provenance["arguments"]["learning_rate"]) == (2, 5e-3)
    run("train-router", deep, "-o", tmp_path / "old", *sizes, "--shared", "layer", "--rows", 2)
    assert Plan.from_pretrained(tmp_path / "old").to_dict() == plan.to_dict()


def test_route_without_steps_only_chooses_the_layers(deep: str, tmp_path: Path) -> None:
    arguments = ("--steps", 0, "--metric", "effective_rank", "--kinds", "attention,mlp", "--length", 48)
    shown = run(
        "calibrate", "route", deep, "-o", tmp_path / "p", *arguments, "--number", 1, "--set", "texts=2"
    )
    (method,) = Plan.from_pretrained(tmp_path / "p").methods
    assert isinstance(method, MixtureOfDepths)
    assert len(method.attention) == 1
    assert method.attention == method.mlp
    assert f"attention {method.attention[0]}" in shown.stdout


def test_route_reads_its_text_twice_and_says_so_of_standard_input(deep: str, tmp_path: Path) -> None:
    assert "standard input can be read once" in refused(
        "calibrate", "route", deep, "-o", tmp_path / "p", "--data", "-"
    )


def test_old_names_say_what_they_no_longer_take(tmp_path: Path) -> None:
    assert "slimformer show PLAN --json" in wrong("train-router", "no/model", "-o", tmp_path / "p", "--json")
    assert "--per takes a value" in wrong("train-router", "no/model", "-o", tmp_path / "p", "--per")
    assert "heads does not apply" in wrong("train-router", "no/model", "-o", tmp_path / "p", "--heads", "sum")

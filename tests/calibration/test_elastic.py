"""Exits, widths and removals of embedding models are chosen by what a task measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from sentence_transformers import SentenceTransformer

import slimformer
from command_line import run
from embedding_data import GOLD, PAIRS, TEXTS, beir, pipeline, tsv
from slimformer import EarlyExit, LayerDrop, Plan
from slimformer.calibration.exit_heads import fit_exits
from slimformer.errors import CalibrationError, PlanError
from slimformer.evaluation.elastic_grid import Grid
from slimformer.evaluation.embedding_tasks import (
    NeighbourTask,
    PairTask,
)
from slimformer.evaluation.retrieval import RetrievalTask, read_retrieval
from slimformer.report import grid_picture, grid_table, plan_page
from tiny_models import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return pipeline(tmp_path / "model")


def test_the_front_is_what_nothing_smaller_reaches() -> None:
    grid = Grid("score", (1, 2, 3), (8, 4), ((0.5, 0.6), (0.6, 0.6), (0.9, 0.7)))
    assert grid.front() == [(1, 4), (3, 8), (3, 4)]
    assert grid.dense == 0.9
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    assert Grid.from_dict(None) is None
    for broken in (
        {"scores": [[1.0]]},
        {"layers": []},
        {"scores": [[float("nan")] * 2] * 3},
        {"layers": "abc"},
    ):
        assert Grid.from_dict({**grid.to_dict(), **broken}) is None


@pytest.mark.parametrize("kind", ["beir", "pairs", "text"])
def test_an_elastic_calibration_measures_every_exit_at_every_width(
    tmp_path: Path, model: SentenceTransformer, kind: str
) -> None:
    task = {"beir": lambda: read_retrieval(beir(tmp_path / "tiny")), "pairs": lambda: PairTask("pairs", PAIRS, GOLD),
            "text": lambda: NeighbourTask("text", TEXTS)}[kind]()  # fmt: skip
    dense = model.encode(TEXTS)
    plan = slimformer.calibrate(model, None, EarlyExit(2), data=task, dimensions=[8, 16])
    assert (model.encode(TEXTS) == dense).all()
    assert slimformer.status(model) == {}
    grid = Grid.from_dict(plan.provenance["elastic"])
    assert (grid.layers, grid.dimensions) == ((0, 1, 2, 3, 4), (32, 16, 8))
    (method,) = plan.methods
    assert method.layer == 2
    chosen = task.split()[0]
    expected = fit_exits(model, chosen.texts, [2])[2]
    torch.testing.assert_close(method.weights["head.weight"], expected.weights["head.weight"])
    judged, texts = chosen.apart()
    judged = judged.recorded(model)
    assert grid.scores[-1] == tuple(judged.scores(model, (32, 16, 8)))
    with slimformer.patched(model, fit_exits(model, texts, [1])[1]):
        assert grid.scores[1] == pytest.approx(judged.scores(model, (32, 16, 8)), abs=1e-6)


def test_an_interrupted_calibration_goes_on_from_what_it_has_measured(
    tmp_path: Path, model: SentenceTransformer
) -> None:
    class Interrupted(NeighbourTask):
        """Is stopped by hand at its third measurement; of two halves, both count."""

        seen: list[int] = []  # noqa: RUF012

        def scores(self, *arguments: Any) -> list[float]:
            self.seen.append(1)
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().scores(*arguments)

    task = Interrupted("text", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        slimformer.calibrate(model, None, EarlyExit(2), data=task, checkpoint=tmp_path)
    assert slimformer.status(model) == {}
    plan = slimformer.calibrate(model, None, EarlyExit(2), data=task, checkpoint=tmp_path)
    # Five rows, of which two were there.
    assert len(task.seen) == 3 + 3
    anew = slimformer.calibrate(model, None, EarlyExit(2), data=NeighbourTask("text", TEXTS))
    assert plan.provenance["elastic"] == anew.provenance["elastic"]
    assert len(task.seen) == 6
    slimformer.calibrate(model, None, EarlyExit(2), data=task, checkpoint=tmp_path, head=False)
    assert len(task.seen) == 11


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_a_generative_model_goes_the_same_way(tmp_path: Path, mode: str) -> None:
    model = pipeline(tmp_path, mode, "llama")
    plan = slimformer.calibrate(model, None, EarlyExit(2), data=NeighbourTask("text", TEXTS))
    grid = Grid.from_dict(plan.provenance["elastic"])
    # Positions are counted in the cache of an attention, so one layer runs at least.
    assert grid.layers == (1, 2, 3, 4)
    dense = model.encode(TEXTS)
    with slimformer.patched(model, plan):
        slim = model.encode(TEXTS)
    with slimformer.patched(model, EarlyExit(2)):
        bare = model.encode(TEXTS)
    assert abs(slim - dense).mean() < abs(bare - dense).mean()
    with pytest.raises(CalibrationError, match="no exit 0: allowed are 1 to 3"):
        slimformer.calibrate(model, None, EarlyExit(0), data=NeighbourTask("text", TEXTS))


def test_the_lowest_exit_within_the_loss_is_taken(model: SentenceTransformer) -> None:
    task = NeighbourTask("text", TEXTS)
    grid = Grid.from_dict(
        slimformer.calibrate(model, None, EarlyExit(1), data=task, head=False).provenance["elastic"]
    )
    lost = {index: 1 - row[0] / grid.dense for index, row in zip(grid.layers, grid.scores, strict=True)}
    assert len(set(lost.values())) > 2
    for loss in sorted(lost.values()):
        within = [index for index in grid.layers[:-1] if lost[index] <= loss + 1e-9]
        if within:
            plan = slimformer.calibrate(model, None, EarlyExit, data=task, max_loss=loss + 1e-9, head=False)
            assert plan.methods[0].layer == within[0]


def test_of_a_dense_figure_below_zero_no_fraction_can_be_lost(model: SentenceTransformer) -> None:
    gold = [-len(a.split()) for a, b in PAIRS]
    dense = PairTask("pairs", PAIRS, gold).scores(model)[0]
    worse = gold if dense < 0 else [-score for score in gold]
    with pytest.raises(CalibrationError, match="no fraction can be lost"):
        slimformer.calibrate(
            model,
            None,
            EarlyExit,
            data=PairTask("pairs", PAIRS, worse),
            max_loss=0.1,
            hold_out=False,
            layers=[1],
            fit_on=TEXTS,
        )


def test_without_a_head_any_pooling_will_do(tmp_path: Path) -> None:
    model = pipeline(tmp_path, "max")
    with pytest.raises(CalibrationError, match="pooling 'max'"):
        slimformer.calibrate(model, None, EarlyExit(2), data=NeighbourTask("text", TEXTS))
    plan = slimformer.calibrate(model, None, EarlyExit(2), data=NeighbourTask("text", TEXTS), head=False)
    assert plan.methods == (EarlyExit(2),)
    assert plan.methods[0].weights == {}


@pytest.mark.parametrize(("method", "options", "message"), [
    (EarlyExit, {}, r"either EarlyExit\(layer\) or max_loss, got neither"),
    (EarlyExit(1), {"max_loss": 0.1}, "got both"),
    (EarlyExit, {"max_loss": 1.0}, "fraction from 0 to below 1"),
    (EarlyExit(4), {}, "no exit 4: allowed are 0 to 3"),
    (EarlyExit(1), {"layers": [1, 9]}, "no exit 9"),
    (EarlyExit(1), {"layers": []}, "at least one exit"),
    (EarlyExit(1), {"dimensions": [33]}, "no dimension 33: allowed are 1 to 32"),
    (EarlyExit(1), {"dimensions": [8.5]}, "no dimension 8.5"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused(
    model: SentenceTransformer, method: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        slimformer.calibrate(model, None, method, data=NeighbourTask("text", TEXTS), **options)
    assert slimformer.status(model) == {}


def test_models_that_cannot_be_calibrated_are_refused(model: SentenceTransformer) -> None:
    with pytest.raises(CalibrationError, match="unpatch"):
        slimformer.calibrate(slimformer.patch(model), None, EarlyExit(1), data=NeighbourTask("text", TEXTS))
    with pytest.raises(CalibrationError, match="got BertModel"):
        slimformer.calibrate(tiny_model("bert"), None, EarlyExit(1), data=NeighbourTask("text", TEXTS))
    with pytest.raises(CalibrationError, match="SentenceTransformer, got BertModel"):
        RetrievalTask("none", {"q": "a"}, {"d": "b"}, {"q": {"d"}}).figures(tiny_model("bert"))


def test_a_loss_that_no_exit_keeps_to_names_what_there_is(model: SentenceTransformer) -> None:
    with pytest.raises(
        CalibrationError, match=r"No exit loses at most 0 of the dense .*full width: 0: 0\.\d+, 4: 1\."
    ):
        slimformer.calibrate(
            model, None, EarlyExit, data=NeighbourTask("text", TEXTS), max_loss=0.0, layers=[0], head=False
        )


def test_removals_are_chosen_by_the_task(tmp_path: Path, model: SentenceTransformer) -> None:
    task = read_retrieval(beir(tmp_path / "tiny"))
    plan = slimformer.calibrate(
        model, None, LayerDrop, data=task, kinds=("block",), drop=2, budget="standard", hold_out=False
    )
    dense, lost = task.scores(model)[0], {}
    for first in range(4):
        with slimformer.patched(model, LayerDrop(block=[first])):
            lost[first] = 1 - task.scores(model)[0] / dense
    steps = plan.provenance["steps"]
    assert lost[steps[0]["layer"]] == min(lost.values())
    assert steps[0]["divergence"] == pytest.approx(min(lost.values()), abs=1e-9)
    with slimformer.patched(model, plan):
        assert 1 - task.scores(model)[0] / dense == pytest.approx(steps[1]["divergence"], abs=1e-9)
    assert plan.provenance["divergence_name"] == "share lost of the dense nDCG@10"
    assert plan.provenance["data"].startswith(f"the texts of {task.source}, 40 texts")


def test_what_is_left_in_place_is_fitted_before_the_task_judges(model: SentenceTransformer) -> None:
    task = NeighbourTask("text", TEXTS)
    plan = slimformer.calibrate(
        model, None, LayerDrop(replace="filter"), task=task, drop=1, budget="standard"
    )
    assert plan.methods[0].weights.keys() == {
        f"attention.{plan.methods[0].attention[0]}.{part}" for part in ("weight", "bias")
    }
    assert plan.provenance["arguments"]["task"] == "text, four fifths"
    assert plan.provenance["steps"][0]["divergence"] < 1


def test_a_task_that_would_not_be_used_is_refused(model: SentenceTransformer) -> None:
    task = NeighbourTask("text", TEXTS)
    with pytest.raises(CalibrationError, match="Nothing is judged by the task"):
        slimformer.calibrate(model, None, LayerDrop, data=task, drop=1, selection="cosine")
    with pytest.raises(CalibrationError, match="SentenceTransformer, got BertModel"):
        slimformer.calibrate(tiny_model("bert"), model.tokenizer, LayerDrop, task=task, drop=1)
    limited = slimformer.calibrate(
        model, None, LayerDrop, task=task, selection="cosine", max_loss=0.9, drop=1
    )
    assert limited.provenance["steps"][0]["divergence"] <= 0.9


def test_the_command_calibrates_measures_and_shows(tmp_path: Path) -> None:
    folder, data, out = tmp_path / "model", beir(tmp_path / "tiny"), tmp_path / "plan"
    pipeline(folder).save_pretrained(str(folder))
    shown = run("calibrate", "exit", folder, "-o", out, "--layer", 2, "--data", data).stdout
    assert "▸ 2" in shown
    document = json.loads(run("show", out, "--json", "--html", tmp_path / "plan.html").stdout)
    assert document["per_layer_config"] == {str(index): {"skip": ["self_attn", "mlp"]} for index in (2, 3)}
    assert "Depth and width" in (tmp_path / "plan.html").read_text()
    figures = json.loads(run("eval", folder, "--plan", out, "--task", data, "--save", "--json").stdout)
    assert figures["data"].endswith("the held-out queries")
    model = SentenceTransformer(str(folder), device="cpu")
    held_out = read_retrieval(data).split()[1]
    assert figures["dense"] == pytest.approx(held_out.figures(model), abs=1e-6)
    assert figures["slim"] == pytest.approx(held_out.figures(slimformer.patch(model, str(out))), abs=1e-6)
    assert "nDCG@10" in run("show", out).stdout
    run("show", out, "--svg", tmp_path / "grid.svg")
    picture = ElementTree.fromstring((tmp_path / "grid.svg").read_text())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}title")) == 5 * 2
    result = run("eval", folder, "--plan", out, "--task", tsv(tmp_path / "pairs.tsv"))
    assert "Spearman" in result.stdout
    whole = tmp_path / "whole"
    run(
        *("calibrate", "exit", folder, "-o", whole, "--data", data),
        *("--max-loss", 0.99, "--set", "hold_out=false"),
    )
    assert "overestimated" in run("eval", folder, "--plan", whole, "--task", data).stderr


def test_the_command_drops_by_a_task_and_reports_on_the_rest(tmp_path: Path) -> None:
    folder, data, out = tmp_path / "model", beir(tmp_path / "tiny"), tmp_path / "plan"
    pipeline(folder).save_pretrained(str(folder))
    arguments = ("calibrate", "drop", folder, "--data", data, "--drop", 1, "--budget", "standard")
    shown = run(*arguments, "-o", out).stdout
    assert "attention" in shown
    figures = json.loads(run("eval", folder, "--plan", out, "--task", data, "--json").stdout)
    assert figures["data"].endswith("the held-out queries")
    words, neighbours = tmp_path / "words.txt", tmp_path / "neighbours"
    words.write_text("\n\n".join(TEXTS))
    run("calibrate", "drop", folder, "-o", neighbours, "--drop", 1, "--set", f"task={words}")
    assert "words.txt" in Plan.from_pretrained(neighbours).provenance["arguments"]["task"]


def test_the_command_reads_the_task_before_it_loads_a_model(tmp_path: Path) -> None:
    missing = run(
        "calibrate", "exit", "no/model", "-o", tmp_path / "p", "--layer", 1, "--data", tmp_path, code=1
    )
    assert "no qrels/test.tsv" in missing.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_page_shows_the_grid_and_takes_no_broken_one() -> None:
    grid = Grid("nDCG@10 <b>", (0, 1, 2), (8, 4), ((0.1, 0.1), (0.2, 0.1), (0.4, 0.3)))
    plan = Plan([EarlyExit(1)], {"model_type": "bert", "layers": 2}, {"elastic": grid.to_dict()})
    page = plan_page(plan)
    assert page.count("on the Pareto front</title>") == len(grid.front())
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.split("Depth and width")[1].split("</section>")[0]
    assert "2 of 4 sublayers dropped" in page
    assert grid_table(plan).row_count == 3
    broken = Plan([LayerDrop(mlp=[0])], provenance={"elastic": {"scores": "x"}})
    with pytest.raises(PlanError, match="no grid of depth and width"):
        grid_picture(broken)
    assert grid_table(broken) is None
    assert "Depth and width" not in plan_page(broken)

"""The benchmarks run through their command, no time passes without a check, and the tables are current."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import main
from benchmarks.frame import registry, results, tables, tiny
from benchmarks.frame.compare import Case, Unsupported, compare
from benchmarks.frame.registry import Settings
from benchmarks.frame.timing import Candidate, Effort, interleaved
from benchmarks.long_context.meeting_questions import likelihoods
from benchmarks.quality import gsm8k
from benchmarks.quality.accuracy import Question, _likelihoods, accuracy

import slimformer
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMOKE = Settings(CPU, smoke=True)
registry.load()


# Of the repository, not of the library: it runs with --repository alone.
pytestmark = pytest.mark.repository


def command(*arguments: object) -> tuple[int, str]:
    """The exit code of `python -m benchmarks`, and what it prints."""
    printed = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(printed):
            code = main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return code, printed.getvalue()


class Smoke:
    """The results of benchmarks that run as they are asked for, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: dict[str, str] = {}

    def of(self, name: str) -> Path:
        """The file of one benchmark."""
        if name not in self.printed:
            _, self.printed[name] = command("run", name, "--smoke", "--out", self.folder)
        return self.folder / f"{name}.json"

    def all(self) -> str:
        """What all of them print."""
        for name in registry.BENCHMARKS:
            self.of(name)
        return "".join(self.printed.values())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    return Smoke(tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_every_benchmark_runs_on_the_cpu_and_passes_its_checks(smoke: Smoke, name: str) -> None:
    content = results.read(smoke.of(name))
    assert content["benchmark"] == name
    assert content["complete"], smoke.printed[name]
    assert content["smoke"]
    states = {m["status"]: m["note"] for m in content["measurements"]}
    assert set(states) <= {"ok", "unsupported"}, states


def test_smoke_output_names_no_folder_of_this_machine(smoke: Smoke) -> None:
    written = smoke.all() + "".join(path.read_text() for path in smoke.folder.iterdir())
    assert str(ROOT) not in written
    assert str(smoke.folder) not in written
    assert str(Path.home()) + "/" not in written


def test_every_table_is_made_from_its_results(smoke: Smoke, tmp_path: Path) -> None:
    smoke.all()
    folder = smoke.folder
    marked = "".join(f"<!-- table: {name} -->\nto be replaced\n<!-- end -->\n" for name in registry.TABLES)
    filled = tables.updated(marked, folder)
    # Further seeds are no part of a smoke run, and engines are not installed everywhere.
    engines = find_spec("onnxscript") is not None and find_spec("onnxruntime") is not None
    assert filled.count("| :-- |") == len(registry.TABLES) - (1 if engines else 2)
    assert (
        tables.updated("<!-- table: real_quality_seeds -->\n<!-- end -->", folder).count("Not measured yet")
        == 1
    )
    assert "to be replaced" not in filled
    assert tables.updated(filled, folder) == filled
    assert tables.updated(marked, tmp_path).count("Not measured yet") == len(registry.TABLES)
    with pytest.raises(KeyError, match="no table is named other"):
        tables.updated("<!-- table: other -->\n<!-- end -->", folder)


def test_tables_in_the_documents_are_current() -> None:
    code, printed = command("tables", "--check")
    assert code == 0, printed


def test_committed_results_are_whole_and_real() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = results.read(path)
        assert path.stem == content["benchmark"]
        assert not content["smoke"]


def test_the_list_says_how_long_each_benchmark_takes_and_what_it_needs() -> None:
    code, printed = command("list")
    assert code == 0
    names = [line.split(":")[0] for line in printed.splitlines() if not line.startswith(" ")]
    assert names == list(registry.BENCHMARKS)
    starts = [printed.index(f"\n{name}: ") if number else 0 for number, name in enumerate(names)]
    found = dict(zip(names, (printed[a:b] for a, b in pairwise([*starts, None])), strict=True))
    assert "--model: a checkpoint folder, embedding model (all-MiniLM-L6-v2)" in found["encode_corpora"]
    assert "--data: a folder with c4_calib/c4_demo.jsonl, wikitext2/wiki.test.raw" in found["drop_table"]
    assert "--only: attention-8, attention-12, mlp-2, mlp-4" in found["repair"]
    hardware = {"GPU": "needs a GPU", "CPU": "runs on the CPU", "any": "runs on a GPU or the CPU"}
    for name, benchmark in registry.BENCHMARKS.items():
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if not file.exists():
            assert f"    {hardware[benchmark.on]}; took an unknown time\n" in f"{found[name]}\n"
            continue
        content = results.read(file)
        stopped = "" if content["complete"] else " until it was stopped"
        took = rf"took \d+ (s|min){stopped} on {re.escape(content['device'])}$"
        assert re.search(f"    {hardware[benchmark.on]}; {took}", found[name], re.MULTILINE)


def test_a_run_that_cannot_be_says_all_that_it_lacks(tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, printed = command("run", *arguments, "--out", tmp_path)
        assert code == 2
        return printed

    found = refused("nothing")
    assert "No benchmark is named nothing. There are: " in found
    assert "drop_table" in found
    found = refused("drop_table")
    assert "drop_table needs --model, a checkpoint folder: decoder (SmolLM2-135M)" in found
    assert "drop_table needs --data, a folder with c4_calib/c4_demo.jsonl, wikitext2/wiki.test.raw" in found
    found = refused("drop_table", "--model", tmp_path / "none", "--data", tmp_path)
    assert "none does not exist" in found
    assert "lacks c4_calib/c4_demo.jsonl, wikitext2/wiki.test.raw" in found
    found = refused("encode", "--smoke", "--texts", 3, "--only", "x", "--plans", tmp_path)
    assert found.splitlines() == [
        "encode takes no --texts.", "encode takes no --plans.", "encode takes no --only, got --only x.",
    ]  # fmt: skip
    assert "takes one of attention-8, attention-12, mlp-2, mlp-4" in refused(
        "repair", "--smoke", "--only", "x"
    )
    assert "needs --texts of at least 1, got 0" in refused("context_extension", "--smoke", "--texts", 0)
    assert "none is named: run NAME --only PART" in refused("--smoke", "--only", "2048")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_benchmark_of_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    code, printed = command("run", "mlp_rows", "--out", tmp_path)
    assert code == 2
    assert printed == (
        "mlp_rows needs a GPU, and PyTorch finds none; --smoke tries its code at tiny sizes on the CPU.\n"
    )


def test_the_package_is_a_command() -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "kernels"))
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks", "list"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines()


def case(error: float, run: object = None) -> Case:
    return Case(lambda: run, lambda: error, tolerance=1e-5)


def raises(failure: Exception) -> Case:
    def check() -> float:
        raise failure

    return Case(lambda: None, check, tolerance=1e-5)


def test_no_time_without_a_passed_check() -> None:
    cases = {
        "right": case(1e-6),
        "wrong": case(1e-2),
        "not a number": case(float("nan")),
        "broken": raises(ValueError("bad at /somewhere/secret/file.py")),
        "refused": raises(Unsupported("not this shape")),
    }
    found = {m.candidate: m for m in compare(SMOKE, {"size": 1}, cases, regime="eager", baseline="right")}
    assert {name: m.status for name, m in found.items()} == {
        "right": "ok", "wrong": "wrong", "not a number": "wrong", "broken": "failed", "refused": "unsupported",
    }  # fmt: skip
    assert [name for name, m in found.items() if m.milliseconds is not None] == ["right"]
    assert found["broken"].note == "ValueError: bad at …"
    results.validate(document(list(found.values())))


def test_a_candidate_that_fails_while_timed_costs_only_itself() -> None:
    calls = iter(range(100))

    def fails_later() -> None:
        if next(calls) > 1:
            raise RuntimeError("out of something")

    cases = {"good": case(0.0), "bad": Case(fails_later, lambda: 0.0, tolerance=1e-5)}
    good, bad = compare(SMOKE, {"size": 1}, cases, regime="eager", baseline="good")
    assert good.milliseconds is not None
    assert (bad.status, bad.note) == ("failed", "RuntimeError: out of something")


def test_ratios_refer_to_baseline_and_ideal() -> None:
    found = compare(
        SMOKE, {"size": 1}, {"a": case(0.0), "b": case(0.0)}, regime="eager", baseline="a",
        ideal=lambda name, medians: 2 * medians["b"] if name == "b" else None,
        values=lambda medians: {"b": {"both": len(medians)}},
    )  # fmt: skip
    first, second = found
    assert first.baseline_ratio == 1.0
    assert first.ideal_ratio is None
    assert second.ideal_ratio == 0.5
    assert second.values == {"both": 2}


def test_candidates_take_turns_and_prepare_first() -> None:
    calls: list[str] = []
    candidates = {
        name: Candidate(
            lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}")
        )
        for name in "ab"
    }
    timings = interleaved(candidates, CPU, regime="wall", effort=Effort(0.0, least=4, most=4))
    assert {timing.runs for timing in timings.values()} == {4}
    assert all(t.p20 <= t.p50 <= t.p80 for t in timings.values())
    timed = [call for call in calls if not call.startswith("prepare")][-8:]
    assert timed == ["a", "b", "b", "a"] * 2
    assert all(calls[i - 1] == f"prepare {call}" for i, call in enumerate(calls) if len(call) == 1)


def document(measurements: list[results.Measurement]) -> dict[str, object]:
    return results.document("any", CPU, measurements, smoke=True, complete=True, seconds=1.0)


def test_result_files_come_back_as_written(tmp_path: Path) -> None:
    content = document([results.Measurement({"size": 1}, "one", values={"figure": 1 / 3})])
    path = results.write(content, tmp_path)
    assert results.read(path) == json.loads(json.dumps(content))
    assert [p.name for p in tmp_path.iterdir()] == ["any.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"device": None}, "device"),
        ({"date": "yesterday"}, "yesterday"),
        ({"versions": {"torch": "2"}}, "python is missing"),
        ({"measurements": [{"candidate": "x"}]}, "expected the fields"),
    ],
)
def test_damaged_result_files_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        results.validate({**document([]), **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"status": "fine"}, "status"),
        ({"status": "wrong"}, "time without a passed check"),
        ({"milliseconds": None}, "neither a time nor a value"),
        ({"milliseconds": {"p20": 3.0, "p50": 2.0, "p80": 4.0, "runs": 1}}, "out of order"),
        ({"milliseconds": None, "status": "failed"}, "no reason"),
    ],
)
def test_measurements_that_prove_nothing_are_refused(change: dict[str, object], complaint: str) -> None:
    timing = results.Timing(1.0, 2.0, 3.0, 5)
    content = document([results.Measurement({"size": 1}, "one", milliseconds=timing)])
    results.validate(content)
    content["measurements"][0].update(change)
    with pytest.raises(ValueError, match=complaint):
        results.validate(content)


def test_results_of_parts_are_merged_and_the_last_of_a_point_counts(tmp_path: Path) -> None:
    for folder, figures in (("a", {"one": 1.0, "two": 2.0}), ("b", {"two": 3.0})):
        found = [
            results.Measurement({"size": 1}, name, values={"figure": of}) for name, of in figures.items()
        ]
        results.write(document(found), tmp_path / folder)
    os.utime(tmp_path / "a" / "any.json", (0, 0))
    code, printed = command("merge", "any", tmp_path, "--out", tmp_path)
    assert (code, printed) == (0, "any.json: 2 files, 2 measurements\n")
    content = results.read(tmp_path / "any.json")
    assert {m["candidate"]: m["values"]["figure"] for m in content["measurements"]} == {
        "one": 1.0,
        "two": 3.0,
    }
    assert content["seconds"] == 2.0
    other = {**content, "device": "another GPU"}
    results.write(other, tmp_path / "c")
    code, printed = command("merge", "any", tmp_path, "--out", tmp_path)
    assert code == 2
    assert "device: the results differ" in printed
    assert command("merge", "nothing", tmp_path)[0] == 2


def test_answers_behind_one_prefill_are_as_likely_as_by_themselves() -> None:
    model, prompt, answers = tiny_model("llama"), torch.arange(1, 40), [[5, 6, 7], [8], [9, 3]]

    def by_hand(answer: list[int]) -> float:
        ids = torch.cat([prompt, torch.tensor(answer)])[None]
        with torch.no_grad():
            told = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(told.gather(1, torch.tensor(answer)[:, None]).mean())

    assert likelihoods(model, prompt, answers).tolist() == pytest.approx(
        list(map(by_hand, answers)), abs=1e-5
    )
    method = slimformer.TokenElimination({1: 0.5}, least=16, block=1, window=4, sink=1)
    with slimformer.patched(model, method):
        together = likelihoods(model, prompt, answers).tolist()
        alone = [float(likelihoods(model, prompt, [answer])[0]) for answer in answers]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together != pytest.approx(likelihoods(model, prompt, answers).tolist(), abs=1e-5)


def test_batches_of_prompts_are_solved_as_each_by_itself() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=128), tiny.character_tokenizer()
    problems = [gsm8k.Problem(prompt, "1") for prompt in ("the cat sat on", "a", "no no yes")]
    written = gsm8k._written(model, tokenizer, [problem.prompt for problem in problems], 6)
    assert written == [gsm8k._written(model, tokenizer, [p.prompt], 6)[0] for p in problems]
    assert gsm8k.solved(model, tokenizer, problems, new_tokens=6) == [False] * 3


def test_questions_are_counted_as_one_forward_each_would() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    questions = [
        Question("the cat ", (" sat", " on a mat", " a"), 1),
        Question("a much longer context that ends in ", (" no", " yes and no"), 0),
        Question("one", (" dog",), 0),
    ]

    def by_hand(context: str, choice: str) -> float:
        ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            found = model(ids).logits[0].log_softmax(-1)
        return sum(float(found[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))

    asked = [(q.context, choice) for q in questions for choice in q.choices]
    values = [value for value, _ in _likelihoods(model, tokenizer, asked)]
    assert values == pytest.approx([by_hand(*one) for one in asked], abs=1e-4)
    right = [max(range(3), key=values.__getitem__) == 1, values[3] > values[4], False]
    assert accuracy(model, tokenizer, questions) == pytest.approx(sum(right) / 3)

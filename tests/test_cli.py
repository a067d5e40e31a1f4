"""The command line: its results on standard output, its reasons on standard error, its exit codes, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import slimformer
from slimformer import LayerDrop, Plan, TokenElimination
from slimformer.cli import app
from slimformer.cli.commands.demo_models import demo_embedder, demo_model
from slimformer.cli.loading import load_model
from slimformer.errors import SlimformerError
from slimformer.plans.plan import FILE, fingerprint
from slimformer.report import plan_page
from slimformer.text.held_out import split_texts
from slimformer.text.sources import load_texts
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer
from tiny_models import tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    folder = tmp_path / "plan"
    Plan([DROP], fingerprint(tiny_model("llama"))).save_pretrained(folder)
    return str(folder)


def run(*arguments: object, code: int = 0, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_calibrate_writes_a_plan_for_the_model_and_prints_it(llama: str, tmp_path: Path) -> None:
    result = run("calibrate", llama, "-o", tmp_path / "plan", "--drop", 2)
    plan = Plan.from_pretrained(tmp_path / "plan")
    (method,) = plan.methods
    assert len(method.attention) == 2
    for layer in method.attention:
        assert f"attention {layer}" in result.stdout
    assert slimformer.status(slimformer.patch(load_model(llama), plan))
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize(("kinds", "expected"), [
    ("mlp", {"mlp"}), ("block", {"block"}), ("attention,mlp", {"attention", "mlp"}),
])  # fmt: skip
def test_calibrate_drops_only_the_kinds_asked_for(
    llama: str, tmp_path: Path, kinds: str, expected: set[str]
) -> None:
    result = run("calibrate", llama, "-o", tmp_path / "p", "--drop", 1, "--kinds", kinds, "--json")
    (method,) = json.loads(result.stdout)["methods"]
    assert {kind for kind in ("attention", "mlp", "block") if method[kind]} <= expected


@pytest.mark.parametrize("replace", ["mean", "filter"])
def test_a_fitted_replacement_is_saved_with_the_plan_and_kept_with_the_figures(
    llama: str, tmp_path: Path, replace: str
) -> None:
    taps = ("--taps", 2) if replace == "filter" else ()
    run("calibrate", llama, "-o", tmp_path / "p", "--drop", 1, "--replace", replace, *taps)
    arguments = ("eval", llama, "--plan", tmp_path / "p", "--blocks", 2, "--json")
    first = json.loads(run(*arguments, "--save").stdout)
    assert json.loads(run(*arguments).stdout) == first
    assert {"mean": "the mean", "filter": "a causal filter of 2 taps"}[replace] in plan_page(
        Plan.from_pretrained(tmp_path / "p")
    )


def test_eval_warns_where_calibration_read_the_same_text_whole(llama: str, tmp_path: Path) -> None:
    run("calibrate", llama, "-o", tmp_path / "p", "--drop", 1, "--no-hold-out")
    result = run("eval", llama, "--plan", tmp_path / "p", "--blocks", 2, "--json")
    assert "overestimated" in result.stderr
    assert "held-out" not in json.loads(result.stdout)["data"]


def test_calibrate_reads_the_text_it_is_given(llama: str, tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i} says a little about nothing much." * 9 for i in range(99))
    (tmp_path / "own.txt").write_text(text)
    arguments = ("calibrate", llama, "--drop", 1, "--json", "--data")
    from_file = run(*arguments, tmp_path / "own.txt", "-o", tmp_path / "a")
    assert json.loads(from_file.stdout)["provenance"]["data"].startswith("file own.txt")
    from_input = run(*arguments, "-", "-o", tmp_path / "b", typed=text)
    assert json.loads(from_input.stdout)["provenance"]["data"].startswith("standard input")


def test_calibrate_refuses_too_little_text_and_keeps_nothing(llama: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Two words.")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("short.txt", "empty.txt"):
        assert "text" in refused(
            "calibrate", llama, "-o", tmp_path / "p", "--drop", 1, "--data", tmp_path / name
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_an_encoder_is_calibrated_and_measured(bert: str, tmp_path: Path) -> None:
    run("calibrate", bert, "-o", tmp_path / "p", "--drop", 1)
    quality = json.loads(run("eval", bert, "--plan", tmp_path / "p", "--json").stdout)
    assert 0 < quality["embedding_cosine"] < 1
    speed = json.loads(
        run("bench", bert, "--plan", tmp_path / "p", "--prompt-tokens", 8, "--repeats", 1, "--json").stdout
    )
    assert speed["decode_speedup"] is None


def test_an_output_folder_with_other_files_is_refused_and_untouched(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("one")
    for force in ([], ["--force"]):
        message = refused("calibrate", llama, "-o", folder, "--drop", 1, *force)
        assert "not empty and holds no plan" in message
    assert (folder / "chapter").read_text() == "one"
    assert "is a file" in refused("calibrate", llama, "-o", folder / "chapter", "--drop", 1)
    assert [path.name for path in folder.iterdir()] == ["chapter"]


def test_a_plan_in_the_output_folder_is_replaced_only_with_force(llama: str, plan: str) -> None:
    before = Path(plan, FILE).read_text()
    assert "--force" in refused("calibrate", llama, "-o", plan, "--drop", 1)
    assert Path(plan, FILE).read_text() == before
    run("calibrate", llama, "-o", plan, "--drop", 1, "--force")
    assert Path(plan, FILE).read_text() != before


def test_a_failed_save_keeps_the_old_plan_and_the_partial_results(
    llama: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path(plan, FILE).read_text()
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == FILE:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    assert "No space left" in refused("calibrate", llama, "-o", plan, "--drop", 1, "--force")
    assert Path(plan, FILE).read_text() == before
    assert any(Path(plan + ".slimformer-partial").iterdir())


# Interrupts itself while it replaces its partial results for the first time, as Ctrl-C may at any moment.
INTERRUPTED = """
import signal, sys
written = 0
def interrupt(event, arguments):
    global written
    if event == "os.rename" and ".slimformer-partial" in str(arguments[1]):
        written += 1
        if written == 2:
            signal.raise_signal(signal.SIGINT)
sys.addaudithook(interrupt)
from slimformer.cli import main
main()
"""


def test_ctrl_c_keeps_partial_results_and_the_same_command_resumes(llama: str, tmp_path: Path) -> None:
    folder, partial = tmp_path / "plan", tmp_path / "plan.slimformer-partial"
    command = ("calibrate", llama, "--drop", "3", "-o")
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    assert f"Partial results are in {partial}" in stopped.stderr
    assert any(partial.iterdir())
    assert not folder.exists()
    run(*command, folder)
    assert not partial.exists()
    run(*command, tmp_path / "whole")
    assert Plan.from_pretrained(folder).methods == Plan.from_pretrained(tmp_path / "whole").methods


def test_wrong_usage_ends_with_2(llama: str, plan: str, tmp_path: Path) -> None:
    assert "--drop" in run("calibrate", llama, "-o", tmp_path / "p", code=2).stderr
    run("calibrate", llama, "-o", tmp_path / "p", "--drop", 0, code=2)
    run("calibrate", llama, "-o", tmp_path / "p", "--drop", 1, "--kinds", "tail", code=2)
    run("calibrate", llama, "--drop", 1, code=2)
    run("eval", llama, code=2)
    run("demo", llama, "-o", tmp_path / "p", "--data", "-", code=2)
    run("show", plan, "--html", Path(plan) / FILE, code=2)
    Plan.from_pretrained(plan)


def test_a_model_that_cannot_be_loaded_is_named_with_what_was_tried(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("eval", "nobody/nothing", "--plan", plan)
    assert "the Hub id 'nobody/nothing', as there is no such folder" in message
    (tmp_path / "empty").mkdir()
    assert f"the folder {tmp_path / 'empty'}" in refused("bench", tmp_path / "empty", "--plan", plan)
    broken = Path(tiny_checkpoint(tmp_path / "broken", "llama"))
    (broken / "model.safetensors").write_bytes(b"damaged")
    assert "LlamaForCausalLM through AutoModelForCausalLM" in refused("bench", broken, "--plan", plan)


def test_an_unknown_device_is_refused(llama: str, plan: str) -> None:
    assert "no device 'abacus'" in refused("bench", llama, "--plan", plan, "--device", "abacus")


def test_what_is_no_plan_is_refused(llama: str, bert: str, plan: str, tmp_path: Path) -> None:
    pickled = tmp_path / "plan.bin"
    pickled.write_bytes(b"\x80\x04.")
    for command in (["show"], ["eval", llama, "--plan"], ["generate", llama, "Hi", "--plan"]):
        assert "pickle" in refused(*command, pickled)
    Path(plan, FILE).write_text(Path(plan, FILE).read_text()[:40])
    assert "damaged" in refused("show", plan)
    assert "No plan at" in refused("show", tmp_path)


def test_a_plan_for_another_model_is_refused_with_the_difference(bert: str, plan: str) -> None:
    for command in (["eval", bert], ["bench", bert, "--prompt-tokens", 8]):
        assert "model_type is 'llama', and this model's is 'bert'" in refused(*command, "--plan", plan)


def test_eval_and_bench_print_tables_or_json_and_save_on_demand(llama: str, plan: str) -> None:
    before = Path(plan, FILE).read_text()
    sizes = ("--blocks", 2, "--sequence-length", 32)
    assert "Perplexity" in run("eval", llama, "--plan", plan, *sizes).stdout
    assert Path(plan, FILE).read_text() == before
    quality = json.loads(run("eval", llama, "--plan", plan, *sizes, "--save", "--json").stdout)
    assert quality["tokens"] == 64
    assert quality["perplexity_slim"] != quality["perplexity_dense"]
    sizes = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1)
    assert "KV cache" in run("bench", llama, "--plan", plan, *sizes).stdout
    speed = json.loads(run("bench", llama, "--plan", plan, *sizes, "--save", "--json").stdout)
    assert speed["slim"]["cache_bytes"] * 4 == speed["dense"]["cache_bytes"] * 3
    saved = Plan.from_pretrained(plan)
    panel = quality.pop("panel")
    assert saved.measured == {"quality": quality, "panel": panel, "speed": speed}
    assert 0 < panel["capabilities"]["text"]["kept"] < 1
    assert saved.methods == (DROP,)
    shown = run("show", plan).stdout
    assert "Perplexity" in shown
    assert "KV cache" in shown


def test_eval_reads_only_held_out_text_where_the_plan_was_chosen_by_the_same_source(
    llama: str, tmp_path: Path
) -> None:
    source = load_texts(None)[1]
    Plan([DROP], provenance={"data": source}).save_pretrained(tmp_path)
    quality = json.loads(run("eval", llama, "--plan", tmp_path, "--blocks", 1, "--json").stdout)
    assert quality["data"] == f"the held-out part of {source}"


def test_held_out_text_and_calibration_text_have_nothing_in_common() -> None:
    for texts in (load_texts(None)[0], ["a b c d e f g h i j"], [str(i % 7) for i in range(40)], ["one"] * 3):
        kept, held_out = split_texts(texts)
        assert kept
        assert not set(kept) & set(held_out)


def test_show_says_what_a_plan_does_that_drops_nothing(tmp_path: Path) -> None:
    Plan([TokenElimination({3: 0.5}, window=128)]).save_pretrained(tmp_path)
    page = tmp_path / "plan.html"
    shown = run("show", tmp_path, "--html", page).stdout
    assert "schedule 3=0.5, window 128 " in shown
    assert "dropped" not in shown
    assert "schedule 3=0.5, window 128<" in page.read_text(encoding="utf-8")
    assert "Left in place" not in page.read_text(encoding="utf-8")


def test_show_prints_the_plan_as_table_json_and_page(plan: str, tmp_path: Path) -> None:
    assert "attention 1" in run("show", plan).stdout
    result = run("show", plan, "--json", "--html", tmp_path / "pages" / "plan.html")
    assert json.loads(result.stdout) == json.loads(Path(plan, FILE).read_text())
    page = (tmp_path / "pages" / "plan.html").read_text(encoding="utf-8")
    assert "attention 1: dropped" in page
    assert "MLP 2: dropped" in page
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["plan.html"]


def test_generate_prints_what_the_patched_model_says(llama: str, plan: str) -> None:
    arguments = ("generate", llama, "the end of it", "--max-new-tokens", 12)
    model, tokenizer = load_model(llama), tiny_tokenizer()
    ids = torch.tensor([tokenizer("the end of it")["input_ids"]])
    expected = []
    for methods in ([], [Plan.from_pretrained(plan)]):
        if methods:
            slimformer.patch(model, *methods)
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert run(*arguments).stdout.strip() == expected[0]
    assert run(*arguments, "--plan", plan).stdout.strip() == expected[1]
    assert (
        run("generate", llama, "-", "--max-new-tokens", 12, typed="the end of it").stdout.strip()
        == expected[0]
    )


def test_generate_refuses_an_encoder_and_an_empty_prompt(llama: str, bert: str) -> None:
    assert "cannot generate" in refused("generate", bert, "Hi")
    assert "no token" in refused("generate", llama, "")


def test_demo_reads_long_prompts_with_a_given_model(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    arguments = ("demo", llama, "-o", folder, "--prompts", 1)
    result = run(*arguments)
    for expected in ("Perplexity", "Facts recalled", "Prefill", "KV cache"):
        assert expected in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["plan.html", FILE]
    plan = Plan.from_pretrained(folder)
    (method,) = plan.methods
    assert method.schedule == {3: 0.2}
    speed = plan.measured["speed"]
    assert speed["slim"]["cache_bytes"] < speed["dense"]["cache_bytes"]
    assert "--force" in refused(*arguments)
    document = json.loads(run(*arguments, "--force", "--json").stdout)
    assert document["plan"]["measured"]["quality"] == plan.measured["quality"]
    assert document["batch"]["difference"] < 1e-5
    assert plan.measured["quality"]["facts_recalled_slim"] in ("0 of 1", "1 of 1")


def test_demo_refuses_what_predicts_no_tokens(bert: str, tmp_path: Path) -> None:
    assert "predicts no tokens" in refused("demo", bert, "-o", tmp_path / "demo")


def test_without_a_connection_the_demo_asks_for_a_model_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_model(tmp_path)
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_embedder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_repair_writes_a_plan_that_is_nearer_to_dense_and_says_so(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    Plan([LayerDrop(attention=[1], mlp=[2])]).save_pretrained(tmp_path / "plan")
    arguments = ("repair", model, "--plan", tmp_path / "plan", "--length", 32, "--steps", 6, "--every", 3)
    result = run(*arguments, "--what", "norms,lora", "--near", -1, "-o", tmp_path / "repaired")
    assert "won back" in result.stdout
    plan = Plan.from_pretrained(tmp_path / "repaired")
    assert [type(method).__name__ for method in plan.methods] == ["LayerDrop", "WeightDelta"]
    measured = plan.measured["repair"]
    assert measured["divergence_after"] <= measured["divergence_before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "repaired"]
    shown = run("show", tmp_path / "repaired", "--html", tmp_path / "page.html")
    assert "Repair" in shown.stdout
    assert "<h2>Repair</h2>" in (tmp_path / "page.html").read_text()
    # What it was measured on is left out of what it was trained on.
    assert (
        "held-out" in json.loads(run("eval", model, "--plan", tmp_path / "repaired", "--json").stdout)["data"]
    )


def test_repair_refuses_in_one_line(llama: str, plan: str, tmp_path: Path) -> None:
    repair = ("repair", llama, "--plan", plan, "-o", tmp_path / "out", "--length", 32)
    assert "what takes some of added, norms, lora" in refused(*repair, "--what", "all")
    assert "nothing to train of added" in refused(*repair, "--what", "added")
    assert "rounds must be from 1" in refused(*repair, "--rounds", 9)
    (tmp_path / "short.txt").write_text("Two words.")
    assert "Give more text" in refused(*repair, "--data", tmp_path / "short.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    (("calibrate", "--method", "narrow", "--keep", 0.5, "--replace", "filter", "--prompt", 9),
     "--replace goes with --method drop, not narrow; --prompt goes with --method elimination, not narrow"),
    (("calibrate", "--method", "narrow", "--keep", 0.5, "--drop", 2), "--drop goes with --method drop or arank"),
    (("calibrate", "--method", "temperature", "--seed", 1), "--seed goes with --method drop or elimination or arank"),
    (("calibrate", "--method", "elastic", "--layer", 1, "--budget", "quick"), "--budget goes with --method drop"),
    (("calibrate", "--method", "elimination", "--max-divergence", 1, "--selection", "greedy"), "--selection goes with"),
    (("calibrate", "--method", "arank", "--speedup", 2), "--speedup goes with --method drop, not arank"),
    (("calibrate", "--drop", 1, "--no-head"), "--head/--no-head goes with --method elastic, not drop"),
    (("calibrate", "--drop", 1, "--taps", 4), "--taps goes with --replace filter"),
    (("calibrate", "--drop", 1, "--replace", "mean", "--taps", 2), "--taps goes with --replace filter"),
    (("calibrate", "--drop", 1, "--text-field", "body"), "--text-field goes with a source of texts"),
    (("train-predictor", "--schedule", "1=0.5", "--text-field", "body"), "--text-field goes with a source"),
    (("train-router", "--text-field", "body"), "--text-field goes with a source of texts"),
    (("demo", "--text-field", "body"), "--text-field goes with a source of texts"),
    (("repair", "--plan", "p", "--what", "added", "--rank", 4), "--rank goes with --what lora"),
    (("repair", "--plan", "p", "--what", "added", "--near", 4), "--near goes with --what norms or lora"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")  # fmt: skip
def test_options_that_would_be_ignored_are_refused(
    options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    command, *rest = options
    result = run(command, "no/model", "-o", tmp_path / "plan", *rest, code=2)
    assert message in " ".join(result.stderr.replace("\u2502", " ").split())


def test_options_that_a_model_or_a_mode_has_no_use_for_are_refused(
    bert: str, plan: str, tmp_path: Path
) -> None:
    def wrong(*arguments: object) -> str:
        return " ".join(run(*arguments, code=2).stderr.replace("\u2502", " ").split())

    assert "--seed goes with a --temperature above 0" in wrong("generate", bert, "Hi", "--seed", 1)
    task = ("eval", bert, "--plan", plan, "--task", "x.tsv")
    for option in (("--blocks", 4), ("--data", "x"), ("--sequence-length", 9)):
        assert f"{option[0]} goes with text" in wrong(*task, *option)
    assert "--seed goes with text" in wrong(*task, "--no-panel", "--seed", 3)
    measured = ("eval", bert, "--plan", plan)
    assert "--lengths goes with the panel" in wrong(*measured, "--no-panel", "--lengths", 512)
    assert "--prompts-by goes with a file of --prompts" in wrong(*measured, "--prompts-by", "match")
    assert "--limit goes with --tasks" in wrong(*measured, "--limit", 3)
    assert "--lengths takes values separated by commas" in wrong(*measured, "--lengths", "1k")
    Plan([LayerDrop(attention=[1])]).save_pretrained(tmp_path / "any")
    bench = ("bench", bert, "--plan", tmp_path / "any", "--new-tokens", 4)
    assert "BertModel makes embeddings" in wrong(*bench)

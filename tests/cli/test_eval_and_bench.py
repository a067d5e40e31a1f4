"""`slimformer eval` and `slimformer bench`: figures beside the dense model, on text that calibration left alone."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import refused, run
from slimformer import LayerDrop, Plan
from slimformer.plans.plan import FILE
from slimformer.text.held_out import split_texts
from slimformer.text.sources import load_texts


def test_eval_warns_where_calibration_read_the_same_text_whole(llama: str, tmp_path: Path) -> None:
    run("calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 1, "--set", "hold_out=false")
    result = run("eval", llama, "--plan", tmp_path / "p", "--blocks", 2, "--json")
    assert "overestimated" in result.stderr
    assert "held-out" not in json.loads(result.stdout)["data"]


def test_eval_and_bench_print_tables_or_json_and_save_on_demand(llama: str, plan: str) -> None:
    before = Path(plan, FILE).read_text()
    sizes = ("--blocks", 2, "--sequence-length", 32)
    first = run("eval", llama, "--plan", plan, *sizes)
    assert "Perplexity" in first.stdout
    # Where bars show nothing, lines say what is going on, and where a file is left.
    assert "measuring quality ..." in first.stderr
    assert "measuring capabilities, --panel standard ..." in first.stderr
    assert f"kept in {llama} for next time" in first.stderr
    assert Path(plan, FILE).read_text() == before
    quality = json.loads(run("eval", llama, "--plan", plan, *sizes, "--save", "--json").stdout)
    assert quality["tokens"] == 64
    assert quality["perplexity_slim"] != quality["perplexity_dense"]
    sizes = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1)
    benched = run("bench", llama, "--plan", plan, *sizes).stdout
    assert "8 tokens read, 2 made, batch 1" in benched
    assert "KV cache" in benched
    speed = json.loads(run("bench", llama, "--plan", plan, *sizes, "--save", "--json").stdout)
    assert speed["slim"]["cache_bytes"] * 4 == speed["dense"]["cache_bytes"] * 3
    saved = Plan.from_pretrained(plan)
    panel = quality.pop("panel")
    assert saved.measured == {"quality": quality, "panel": panel, "speed": speed}
    assert 0 < panel["capabilities"]["text"]["kept"] < 1
    assert saved.methods == (LayerDrop(attention=[1], mlp=[2]),)
    shown = run("show", plan).stdout
    assert "Perplexity" in shown
    assert "KV cache" in shown


def test_eval_reads_only_held_out_text_where_the_plan_was_chosen_by_the_same_source(
    llama: str, tmp_path: Path
) -> None:
    source = load_texts(None)[1]
    Plan([LayerDrop(attention=[1], mlp=[2])], provenance={"data": source}).save_pretrained(tmp_path)
    quality = json.loads(run("eval", llama, "--plan", tmp_path, "--blocks", 1, "--json").stdout)
    assert quality["data"] == f"the held-out part of {source}"


def test_held_out_text_and_calibration_text_have_nothing_in_common() -> None:
    for texts in (load_texts(None)[0], ["a b c d e f g h i j"], [str(i % 7) for i in range(40)], ["one"] * 3):
        kept, held_out = split_texts(texts)
        assert kept
        assert not set(kept) & set(held_out)


def test_a_plan_for_another_model_is_refused_with_the_difference(bert: str, plan: str) -> None:
    for command in (["eval", bert], ["bench", bert, "--prompt-tokens", 8]):
        assert "model_type is 'llama', and this model's is 'bert'" in refused(*command, "--plan", plan)

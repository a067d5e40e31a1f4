"""What cannot be done ends with its reason and an exit code; options that would do nothing are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import refused, run, wrong
from slimformer import LayerDrop, Plan
from slimformer.plans.plan import FILE
from tiny_checkpoints import tiny_checkpoint


def test_wrong_usage_ends_with_2(llama: str, plan: str, tmp_path: Path) -> None:
    assert "--drop, --max-loss or --speedup" in wrong("calibrate", "drop", llama, "-o", tmp_path / "p")
    message = wrong("calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 1, "--kinds", "tail")
    assert "'--kinds': 'tail' is not one of 'attention', 'mlp'" in message
    assert "Say first what is chosen, one of drop, narrow" in wrong("calibrate", llama, "--drop", 1)
    run("calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 0, code=2)
    run("calibrate", "drop", llama, "--drop", 1, code=2)
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
    path = tmp_path / "absent" / "model"
    assert f"There is no folder {path}, and a Hub id looks like" in refused("eval", path, "--plan", plan)
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


@pytest.mark.parametrize(("options", "message"), [
    (("drop", "--drop", 1, "--layer", 1), "No such option: --layer"),
    (("drop", "--drop", 1, "--set", "length=9"), "length does not apply to LayerDrop. What does: "),
    (("drop", "--drop", 1, "--set", "drop=2"), "drop does not apply"),
    (("drop", "--drop", 1, "--set", "attention=[1]"), "attention does not apply to LayerDrop. What does: taps"),
    (("drop", "--drop", 1, "--set", "taps=4"), "taps=... goes with --replace filter"),
    (("drop", "--drop", 1, "--replace", "filter", "--set", "taps=many"), "taps=... takes a whole number, got 'many'"),
    (("drop", "--drop", 1, "--set", "selection=best"), "takes panel, greedy, cosine, got 'best'"),
    (("drop", "--drop", 1, "--set", "seed"), "NAME=VALUE"),
    (("drop", "--drop", 1, "--set", "seed=1", "--set", "seed=2"), "each name once"),
    (("drop", "--drop", 1, "--set", "text_field=body"), "text_field=... goes with a source of texts"),
    (("narrow", "--keep", 0.5, "--max-loss", 0.1), "either --keep or --max-loss"),
    (("narrow", "--keep", 0.5, "--set", "seed=1"), "seed does not apply to NarrowMlp"),
    (("exit",), "either --layer or --max-loss"),
    (("exit", "--layer", 1, "--drop", 1), "No such option: --drop"),
    (("temperature", "--set", "temperatures=warm"), "a list, such as a,b, of a number"),
    (("eliminate", "--schedule", "1=0.5"), "--schedule goes with --predictor"),
    (("eliminate", "--steps", 9), "--steps goes with --predictor"),
    (("eliminate", "--set", "size=9"), "size does not apply to TokenElimination"),
    (("eliminate", "--predictor"), "--predictor takes --schedule"),
    (("eliminate", "--predictor", "--schedule", "1=0.5", "--max-loss", 1), "--max-loss goes with"),
    (("eliminate", "--predictor", "--schedule", "half"), "entries such as 15=0.25"),
    (("route", "--set", "window=9"), "window does not apply to MixtureOfDepths"),
    (("route", "--set", "routing=best"), "takes threshold, top_k"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")  # fmt: skip
def test_options_of_calibrate_that_would_do_nothing_are_refused(
    options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    what, *rest = options
    assert message in wrong("calibrate", what, "no/model", "-o", tmp_path / "plan", *rest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    (("demo", "--text-field", "body"), "--text-field goes with a source of texts"),
    (("repair", "--plan", "p", "--set", "text_field=body"), "text_field=... goes with a source of texts"),
    (("repair", "--plan", "p", "--what", "added", "--set", "rank=4"), "rank=... goes with --what lora"),
    (("repair", "--plan", "p", "--what", "added", "--set", "near=4"), "near=... goes with --what norms or lora"),
    (("repair", "--plan", "p", "--set", "kinds=mlp"), "kinds does not apply to repair"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")  # fmt: skip
def test_options_that_would_be_ignored_are_refused(
    options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    command, *rest = options
    assert message in wrong(command, "no/model", "-o", tmp_path / "plan", *rest)


def test_options_that_a_model_or_a_mode_has_no_use_for_are_refused(
    bert: str, plan: str, tmp_path: Path
) -> None:
    assert "--seed goes with a --temperature above 0" in wrong("generate", bert, "Hi", "--seed", 1)
    task = ("eval", bert, "--plan", plan, "--task", "x.tsv")
    for option in (("--blocks", 4), ("--data", "x"), ("--sequence-length", 9)):
        assert f"{option[0]} goes with text" in wrong(*task, *option)
    assert "--seed goes with text" in wrong(*task, "--panel", "none", "--seed", 3)
    measured = ("eval", bert, "--plan", plan)
    assert "--lengths goes with the panel" in wrong(*measured, "--panel", "none", "--lengths", 512)
    assert "--prompts-by goes with a file of --prompts" in wrong(*measured, "--prompts-by", "match")
    assert "--limit goes with --tasks" in wrong(*measured, "--limit", 3)
    assert "--lengths takes values separated by commas" in wrong(*measured, "--lengths", "1k")
    Plan([LayerDrop(attention=[1])]).save_pretrained(tmp_path / "any")
    bench = ("bench", bert, "--plan", tmp_path / "any", "--new-tokens", 4)
    assert "BertModel makes embeddings" in wrong(*bench)

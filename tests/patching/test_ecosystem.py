"""What people hold a model in, load it with and quantise it by works with a patched one; plans travel as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, pipeline

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.errors import PlanError
from slimformer.plans.plan import FILE, WEIGHTS, fingerprint
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer
from tiny_models import dropped, tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])
IDS = torch.arange(3, 15)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_filter(bias: float = 0.1) -> LayerDrop:
    generator = torch.Generator().manual_seed(2)
    weights = {"attention.1.weight": torch.randn(32, 64, generator=generator) * 0.1,
               "attention.1.bias": torch.full((32,), bias)}  # fmt: skip
    return LayerDrop(attention=[1], replace="filter", taps=2, weights=weights)


def test_a_sentence_transformer_is_patched_in_place(tmp_path: Path) -> None:
    transformer = Transformer(tiny_checkpoint(tmp_path, "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    dense = model.encode(["a cat", "a longer text of some words"])
    assert slimformer.patch(model, DROP) is model
    assert dropped(model) == {1: ["attention"], 2: ["mlp"]}
    assert abs(model.encode(["a cat", "a longer text of some words"]) - dense).max() > 1e-4
    slimformer.unpatch(model)
    assert (model.encode(["a cat", "a longer text of some words"]) == dense).all()


def test_a_pipeline_is_patched_in_place() -> None:
    extract = pipeline("feature-extraction", model=tiny_model("bert"), tokenizer=tiny_tokenizer())
    dense = torch.tensor(extract("a cat"))
    with slimformer.patched(extract, DROP):
        assert (torch.tensor(extract("a cat")) - dense).abs().max() > 1e-4
    assert torch.equal(torch.tensor(extract("a cat")), dense)


def test_a_model_loaded_with_a_device_map_keeps_working(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, "llama"), device_map="auto")
    before = logits(model)
    with slimformer.patched(plain, DROP), slimformer.patched(model, DROP):
        torch.testing.assert_close(logits(model).cpu(), logits(plain))
    assert torch.equal(logits(model), before)


# Int4WeightOnlyConfig's packings need mslk, CUDA or XPU; the same 4-bit values unpacked run on any CPU.
QUANTISED = {"int8": Int8WeightOnlyConfig(), "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(16))}


@pytest.mark.parametrize("config", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_may_come_before_or_after_the_patch(config: AOBaseConfig) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    full = logits(model)
    quantize_(model, config)
    dense = logits(model)
    assert not torch.equal(dense, full)
    slim = logits(slimformer.patch(model, DROP))
    assert torch.isfinite(slim).all()
    assert (slim - dense).abs().max() > 1e-2
    quantize_(slimformer.patch(other, DROP), config)
    torch.testing.assert_close(logits(other), slim, atol=1e-4, rtol=0)
    for undone in (model, other):
        assert torch.equal(logits(slimformer.unpatch(undone)), dense)


@pytest.mark.parametrize("config", QUANTISED.values(), ids=QUANTISED)
def test_a_filter_stays_in_floating_point_beside_quantised_weights(config: AOBaseConfig) -> None:
    model = tiny_model("llama")
    quantize_(model, config)
    dense = logits(model)
    slim = logits(slimformer.patch(model, with_filter()))
    assert torch.isfinite(slim).all()
    assert (slim - dense).abs().max() > 1e-2
    weight = model.model.layers[1].slimformer_attention_weight
    assert type(weight) is torch.Tensor
    assert weight.dtype == torch.float32
    assert torch.equal(logits(slimformer.unpatch(model)), dense)


def test_a_plan_beside_the_checkpoint_is_applied_only_where_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    dense = logits(model)
    Plan([DROP], fingerprint(model)).save_pretrained(folder)
    with caplog.at_level("INFO", "slimformer"):
        assert torch.equal(logits(slimformer.patch(model)), dense)
    assert dropped(model) == {}
    assert f"in {folder}, and is not applied" in caplog.text
    assert 'slimformer.patch(model, "auto")' in caplog.text
    slimformer.patch(model, "auto")
    assert dropped(model) == {1: ["attention"], 2: ["mlp"]}
    for given in (folder, Path(folder), Path(folder) / FILE):
        slimformer.patch(slimformer.unpatch(model), given)
        assert dropped(model) == {1: ["attention"], 2: ["mlp"]}


def test_filters_survive_the_disk_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = Plan([DROP, with_filter()], fingerprint(model))
    plan.save_pretrained(tmp_path)
    read = Plan.from_pretrained(tmp_path)
    assert read.methods == plan.methods
    assert read.tensors().keys() == plan.tensors().keys()
    assert all(torch.equal(value, read.tensors()[name]) for name, value in plan.tensors().items())
    with slimformer.patched(model, plan):
        expected = logits(model)
    with slimformer.patched(model, read):
        assert torch.equal(logits(model), expected)


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    Plan([with_filter()]).save_pretrained(tmp_path / "one")
    Plan([with_filter(bias=0.2)]).save_pretrained(tmp_path / "two")
    file = tmp_path / "one" / WEIGHTS
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], (tmp_path / "two" / WEIGHTS).read_bytes()):
        file.write_bytes(content)
        with pytest.raises(PlanError, match=rf"{WEIGHTS} is damaged, or belongs to another plan"):
            Plan.from_pretrained(tmp_path / "one")
    file.write_bytes(whole)
    assert Plan.from_pretrained(tmp_path / "one").methods == (with_filter(),)
    file.unlink()
    with pytest.raises(PlanError, match=rf"{WEIGHTS} cannot be read"):
        Plan.from_pretrained(tmp_path / "one")


def test_a_full_disk_keeps_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plan([with_filter()]).save_pretrained(tmp_path)
    whole = with_filter().tensors()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(PlanError, match="No space left"):
            Plan([with_filter(bias=0.2)]).save_pretrained(tmp_path)
    read = Plan.from_pretrained(tmp_path).methods[0].tensors()
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", FILE, WEIGHTS]

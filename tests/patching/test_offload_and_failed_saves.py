"""Replacements compute where offloaded models do, and a save that fails half-way leaves the old plan whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.errors import PlanError
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model

IDS = torch.arange(3, 15)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_weights(replace: str, bias: float = 0.1) -> LayerDrop:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)) * 0.1
    weights = {"attention.1.weight": weight, "attention.1.bias": torch.full((32,), bias)}
    return LayerDrop(attention=[1], replace=replace, taps=2, weights=weights)


@pytest.mark.parametrize("replace", ["mean", "filter"])
@pytest.mark.parametrize("where", ["cpu_offload", "disk"])
def test_replacements_compute_in_offloaded_models(tmp_path: Path, replace: str, where: str) -> None:
    plain = tiny_model("llama")
    if where == "cpu_offload":
        model = tiny_model("llama")
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
        model = AutoModelForCausalLM.from_pretrained(
            tiny_checkpoint(tmp_path, "llama"),
            device_map={**dict.fromkeys(parts, "cpu"), **layers},
            offload_folder=tmp_path / "offload",
        )
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    dense, method = logits(model), with_weights(replace)
    with slimformer.patched(plain, method), slimformer.patched(model, method):
        torch.testing.assert_close(logits(model), logits(plain))
    assert torch.equal(logits(model), dense)


def test_a_save_that_fails_between_its_two_files_keeps_the_old_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plan([with_weights("filter")]).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def fails_second(*names: str) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(*names)

    monkeypatch.setattr("os.replace", fails_second)
    with pytest.raises(PlanError, match="Input/output error"):
        Plan([with_weights("filter", bias=0.2)]).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(Plan.from_pretrained(tmp_path).tensors()["0.attention.1.bias"], torch.full((32,), 0.1))

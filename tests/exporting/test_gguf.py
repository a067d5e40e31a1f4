"""A GGUF file holds what a plan leaves, in llama.cpp's terms, or the reason is named; tests/serving runs llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.cli import app
from slimformer.errors import ExportError
from slimformer.methods.weight_delta import WeightDelta
from tiny_checkpoints import BPE, bpe_checkpoint, tiny_checkpoint

GENERATOR = torch.Generator().manual_seed(5)


def written(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of a file."""
    reader = GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Channel i of the first half of every head beside channel i of the second."""
    parts = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return torch.stack([parts[:, 0], parts[:, 1]], 2).reshape(rows.shape)


def test_whole_blocks_keep_the_architecture_of_the_model(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "llama")
    delta = {"2.self_attn.q_proj.weight.left": (32, 2), "2.self_attn.q_proj.weight.right": (2, 32)}
    weights = {name: torch.randn(shape, generator=GENERATOR) for name, shape in delta.items()}
    plan = [LayerDrop(block=[1]), WeightDelta(weights)]
    done = slimformer.export(folder, plan, tmp_path / "slim", to="gguf")
    assert (done.format, done.layers) == ("gguf", (3, 4))
    assert not {"config.json", "tokenizer.json", "model.safetensors"} & {
        path.name for path in done.folder.iterdir()
    }
    fields, tensors = written(done.folder)
    said = {name.removeprefix("llama."): fields[name] for name in fields if name.startswith("llama.")}
    assert said.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert said == {
        "context_length": 128, "embedding_length": 32, "block_count": 3, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
        "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 10000.0, "vocab_size": 380,
    }  # fmt: skip
    assert (fields["general.architecture"], fields["general.name"]) == ("llama", "slim")
    model = slimformer.patch(AutoModelForCausalLM.from_pretrained(folder), *plan)
    own = dict(model.named_parameters())
    assert torch.equal(tensors["token_embd.weight"], own["model.embed_tokens.weight"])
    assert torch.equal(tensors["blk.2.ffn_down.weight"], own["model.layers.3.mlp.down_proj.weight"])
    assert torch.equal(
        tensors["blk.1.attn_q.weight"], interleaved(own["model.layers.2.self_attn.q_proj.weight"], 4)
    )
    assert torch.equal(
        tensors["blk.0.attn_k.weight"], interleaved(own["model.layers.0.self_attn.k_proj.weight"], 2)
    )


def test_parts_of_layers_become_layers_of_deci(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "qwen2")
    matrix, bias, mean = (torch.randn(shape, generator=GENERATOR) for shape in ((32, 32), 32, 32))
    plan = [
        LayerDrop(attention=[0], mlp=[1]),
        LayerDrop(
            attention=[2], replace="filter", weights={"attention.2.weight": matrix, "attention.2.bias": bias}
        ),
        LayerDrop(mlp=[3], replace="mean", weights={"mlp.3.bias": mean}),
    ]
    slimformer.export(folder, plan, tmp_path / "slim", to="gguf")
    fields, tensors = written(tmp_path / "slim")
    # An MLP; an attention; a linear layer with a bias behind it; an MLP; an attention with a mean behind it.
    assert fields["deci.block_count"] == 5
    # The first layer has heads, and a linear layer of zeros, so that llama.cpp learns how wide they are.
    assert fields["deci.attention.head_count"] == [4, 4, 4, 0, 4]
    assert fields["deci.attention.head_count_kv"] == [0, 2, 0, 0, 2]
    assert fields["deci.feed_forward_length"] == [48, 32, 32, 48, 32]
    own = load_file(Path(folder) / "model.safetensors")
    assert not tensors["blk.0.attn_output.weight"].any()
    assert torch.equal(tensors["blk.0.ffn_up.weight"], own["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(
        tensors["blk.1.attn_q.bias"], interleaved(own["model.layers.1.self_attn.q_proj.bias"], 4)
    )
    assert torch.equal(tensors["blk.2.attn_norm.weight"], own["model.layers.2.input_layernorm.weight"])
    assert torch.equal(tensors["blk.2.attn_output.weight"], matrix)
    assert torch.equal(tensors["blk.2.ffn_down.bias"], bias)
    assert torch.equal(
        tensors["blk.3.ffn_norm.weight"], own["model.layers.2.post_attention_layernorm.weight"]
    )
    assert torch.equal(tensors["blk.4.attn_v.weight"], own["model.layers.3.self_attn.v_proj.weight"])
    assert torch.equal(tensors["blk.4.ffn_down.bias"], mean)
    assert not any(
        tensors[f"blk.{i}.ffn_{name}.weight"].any() for i in (1, 2, 4) for name in ("up", "gate", "down")
    )


def test_norms_that_multiply_with_one_more_are_written_with_it(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "gemma3_text", num_hidden_layers=7, query_pre_attn_scalar=8)
    slimformer.export(folder, LayerDrop(block=[6]), tmp_path / "slim", to="gguf")
    fields, tensors = written(tmp_path / "slim")
    own = load_file(Path(folder) / "model.safetensors")
    for there, here in (("attn_q_norm", "self_attn.q_norm"), ("post_ffw_norm", "post_feedforward_layernorm")):
        assert torch.equal(tensors[f"blk.1.{there}.weight"], own[f"model.layers.1.{here}.weight"] + 1)
    assert torch.equal(tensors["output_norm.weight"], own["model.norm.weight"] + 1)
    assert (fields["gemma3.attention.sliding_window"], fields["gemma3.rope.freq_base"]) == (16, 1e6)


@pytest.mark.parametrize(
    ("dtype", "kind", "error"), [("f32", 0, 0.0), ("f16", 1, 1e-3), ("bf16", 32, 1e-2), ("q8_0", 7, 2e-2)]
)
def test_weights_are_written_in_the_type_asked_for(
    dtype: Any, kind: int, error: float, tmp_path: Path
) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "qwen3", intermediate_size=64)
    slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim", to="gguf", dtype=dtype)
    fields, tensors = written(tmp_path / "slim")
    assert fields["general.file_type"] == kind
    own = load_file(Path(folder) / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert (tensors["blk.0.ffn_down.weight"] - own).norm() <= error * own.norm()
    assert (tensors["blk.0.ffn_down.weight"] - own).norm() > error / 100 * own.norm() or error == 0


@pytest.mark.parametrize("split", BPE)
def test_tokens_special_tokens_and_the_chat_template_come_along(split: str, tmp_path: Path) -> None:
    folder = Path(bpe_checkpoint(tmp_path / "whole", "llama", split))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim", to="gguf")
    fields = written(tmp_path / "slim")[0]
    known = json.loads((folder / "tokenizer.json").read_text())["model"]
    said = {name.removeprefix("tokenizer.ggml."): field for name, field in fields.items()}
    assert len(said["tokens"]) == len(said["token_type"])
    assert all(said["tokens"][number] == name for name, number in known["vocab"].items())
    assert (said["bos_token_id"], said["eos_token_id"], said["padding_token_id"]) == (1, 2, 0)
    assert (said["add_bos_token"], said["add_eos_token"]) == (True, False)
    assert said["token_type"][:3] == [3, 3, 3]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    if split.startswith("pieces"):
        assert (said["model"], said["add_space_prefix"]) == ("llama", "space" in split)
        scores = [said["scores"][said["tokens"].index("".join(pair))] for pair in known["merges"]]
        assert scores == sorted(scores, reverse=True)
    else:
        assert (said["model"], said["pre"]) == ("gpt2", split)
        assert said["merges"] == [" ".join(pair) for pair in known["merges"]]


WINDOWS = {"query_pre_attn_scalar": 8}


@pytest.mark.parametrize(
    ("name", "overrides", "plan", "named"),
    [
        ("phi3", {}, LayerDrop(block=[1]), "and this is phi3"),
        ("qwen3", {}, LayerDrop(attention=[1]), "deci, has the layers of llama, mistral, qwen2"),
        ("mistral", {"sliding_window": 16}, LayerDrop(block=[1]), "no sliding windows"),
        ("gemma2", WINDOWS, LayerDrop(block=[1]), "one layer of 2 has full attention"),
        ("gemma2", {}, LayerDrop(block=[2, 3]), "the root of 256"),
        ("llama", {"hidden_act": "gelu"}, LayerDrop(block=[1]), "this model has gelu"),
        ("llama", {}, LayerDrop(attention=[0, 1, 2, 3]), "at least one attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            LayerDrop(block=[1]),
            "scaled by dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, overrides: dict[str, Any], plan: LayerDrop, named: str, tmp_path: Path
) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", name, **overrides)
    with pytest.raises(ExportError, match=named):
        slimformer.export(folder, plan, tmp_path / "slim", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def changed(folder: Path, **parts: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"].update(parts.pop("model", {}))
    (folder / "tokenizer.json").write_text(json.dumps({**content, **parts}))


def test_tokenizers_that_llama_cpp_would_not_cut_alike_are_refused(tmp_path: Path) -> None:
    def refused(split: str, named: str, **parts: Any) -> None:
        folder = Path(bpe_checkpoint(tmp_path / "whole", "llama", split))
        changed(folder, **parts)
        with pytest.raises(ExportError, match=named):
            slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim", to="gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]

    refused("gpt-2", "splits texts in a way", pre_tokenizer={"type": "Whitespace"})
    refused("gpt-2", "splits texts in a way", model={"ignore_merges": True})
    refused("gpt-2", "normalises texts", normalizer={"type": "Lowercase"})
    refused("pieces", "treats spaces in a way", normalizer=None)
    folder = Path(bpe_checkpoint(tmp_path / "whole", "llama", "pieces"))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    twice = next(pair for pair in merges if sum("".join(pair) == "".join(other) for other in merges) > 1)
    refused("pieces", "which llama.cpp would", model={"merges": [pair for pair in merges if pair != twice]})
    refused("pieces", "in an order", model={"merges": [*(pair for pair in merges if pair != twice), twice]})
    whole = tiny_checkpoint(tmp_path / "words", "llama")
    with pytest.raises(ExportError, match="of the kind WordLevel"):
        slimformer.export(whole, LayerDrop(block=[1]), tmp_path / "slim", to="gguf")
    (tmp_path / "words/tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        slimformer.export(tmp_path / "words", LayerDrop(block=[1]), tmp_path / "slim", to="gguf")


def test_a_type_that_is_none_or_has_no_use_is_refused(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "llama")
    with pytest.raises(ExportError, match="takes one of f32, f16, bf16, q8_0, got 'int4'"):
        slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim", to="gguf", dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="leave it out"):
        slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim", to="vllm", dtype="f16")
    large = WeightDelta({"0.self_attn.v_proj.weight.left": torch.full((16, 1), 1e5),
                         "0.self_attn.v_proj.weight.right": torch.ones(1, 32)})  # fmt: skip
    with pytest.raises(ExportError, match="numbers too large for f16"):
        slimformer.export(folder, [LayerDrop(block=[1]), large], tmp_path / "slim", to="gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "llama")
    program = (
        "import sys\n"
        "sys.modules['gguf'] = None\n"
        "import slimformer\n"
        "try:\n"
        "    slimformer.export(sys.argv[1], slimformer.LayerDrop(block=[1]), sys.argv[2], to='gguf')\n"
        "except slimformer.errors.ExportError as error:\n"
        "    print(error)\n"
    )
    run = [sys.executable, "-c", program, folder, str(tmp_path / "slim")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "pip install 'slimformer[gguf]'" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_command_writes_it_and_says_how_it_is_served_and_quantised(tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "llama")
    Plan([LayerDrop(block=[1])]).save_pretrained(tmp_path / "plan")
    command = [
        "export",
        folder,
        "--plan",
        str(tmp_path / "plan"),
        "-o",
        str(tmp_path / "slim"),
        "--to",
        "gguf",
    ]
    result = CliRunner().invoke(app, [*command, "--dtype", "f16"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"llama-server -m {tmp_path}/slim/model.gguf" in said
    assert f"llama-quantize {tmp_path}/slim/model.gguf {tmp_path}/slim/model-Q4_K_M.gguf Q4_K_M" in said
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0

"""An exported checkpoint computes what the patched model computes, and what no format holds is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from typer.testing import CliRunner

import slimformer
from embedding_data import TEXTS, pipeline
from real_models import minilm
from slimformer import EarlyExit, LayerDrop, Plan, TempScale
from slimformer.cli import app
from slimformer.errors import ExportError, PlanError, UnsupportedModelError
from slimformer.exporting.configs import register_configs
from slimformer.methods.weight_delta import WeightDelta
from slimformer.plans.plan import fingerprint
from tiny_checkpoints import tiny_checkpoint
from tiny_models import DECODERS, ENCODERS, tiny_model

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 60, (2, 20), generator=GENERATOR)
MIXED = {"gemma2", "gemma3_text", "modernbert"}


def outputs(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)[0]
    return found


def delta(name: str = "self_attn.q_proj.weight", layer: int = 2) -> WeightDelta:
    at, norm = f"{layer}.{name}", f"{layer}.input_layernorm.weight"
    parts = {f"{at}.left": (32, 2), f"{at}.right": (2, 32), f"{norm}.added": (32,)}
    return WeightDelta({key: torch.randn(shape, generator=GENERATOR) for key, shape in parts.items()})


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("methods", [[LayerDrop(block=[1])], [EarlyExit(layer=3)]], ids=["drop", "exit"])
def test_an_exported_checkpoint_computes_what_the_patched_model_does(
    name: str, methods: list[Any], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", name)
    slimformer.export(folder, methods, tmp_path / "slim")
    model = tiny_model(name)
    slim = type(model).from_pretrained(tmp_path / "slim").eval()
    slimformer.patch(model, *methods)
    torch.testing.assert_close(outputs(slim), outputs(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(MIXED))
def test_types_of_layers_follow_those_that_are_left(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, num_hidden_layers=8)
    types = model.config.layer_types
    assert len(set(types)) == 2
    slimformer.export(model, LayerDrop(block=[1, 5]), tmp_path / "slim")
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert config.layer_types == [types[i] for i in (0, 2, 3, 4, 6, 7)]
    slim = type(model).from_pretrained(tmp_path / "slim").eval()
    slimformer.patch(model, LayerDrop(block=[1, 5]))
    torch.testing.assert_close(outputs(slim), outputs(model), atol=1e-6, rtol=1e-6)


def test_what_repair_changed_is_in_the_weights(tmp_path: Path) -> None:
    plan = Plan([LayerDrop(attention=[1], mlp=[1]), delta()], fingerprint(tiny_model("llama")))
    plan.save_pretrained(tmp_path / "plan")
    done = slimformer.export(
        tiny_checkpoint(tmp_path / "whole", "llama"), tmp_path / "plan", tmp_path / "slim"
    )
    assert done.layers == (3, 4)
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    model = slimformer.patch(tiny_model("llama"), plan)
    assert torch.equal(
        slim.model.layers[1].self_attn.q_proj.weight, model.model.layers[2].self_attn.q_proj.weight
    )
    torch.testing.assert_close(outputs(slim), outputs(model), atol=1e-6, rtol=1e-6)


def test_a_patched_model_in_memory_is_exported_with_its_own_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    slimformer.patch(model, LayerDrop(block=[3]), delta())
    slimformer.export(model, [LayerDrop(block=[3]), delta(layer=0)], tmp_path / "slim")
    slimformer.unpatch(model)
    own = model.model.layers[2].self_attn.q_proj.weight
    assert torch.equal(
        load_file(tmp_path / "slim/model.safetensors")["model.layers.2.self_attn.q_proj.weight"], own
    )
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_shards_are_read_and_written_one_after_the_other(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    slimformer.export(str(tmp_path / "whole"), LayerDrop(block=[1]), tmp_path / "slim", shard_bytes=30_000)
    index = json.loads((tmp_path / "slim/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "slim").glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    total = 0
    for name in shards:
        with safe_open(tmp_path / "slim" / name, "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in list(file.keys()))
    assert total == index["metadata"]["total_size"]
    slim = type(model).from_pretrained(tmp_path / "slim").eval()
    slimformer.patch(model, LayerDrop(block=[1]))
    torch.testing.assert_close(outputs(slim), outputs(model), atol=1e-6, rtol=1e-6)


def test_what_lies_beside_the_weights_comes_along_but_neither_code_nor_the_plan(tmp_path: Path) -> None:
    whole = Path(tiny_checkpoint(tmp_path / "whole", "llama"))
    for name in ("LICENSE", "chat_template.jinja", "modeling_own.py", "pytorch_model.bin"):
        (whole / name).write_text("text")
    Plan([LayerDrop(block=[0])]).save_pretrained(whole)
    slimformer.export(str(whole), LayerDrop(block=[1]), tmp_path / "slim")
    written = {path.name for path in (tmp_path / "slim").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    beside = {"LICENSE", "README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert written == weights | beside
    assert AutoTokenizer.from_pretrained(tmp_path / "slim")("a cat").input_ids
    assert (tmp_path / "slim").stat().st_mode & 0o755 == 0o755


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_pipeline_of_sentence_transformers_stays_one(where: str, tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model")
    model.save_pretrained(str(tmp_path / "whole"))
    given = model if where == "memory" else str(tmp_path / "whole")
    slimformer.export(given, LayerDrop(block=[1, 2]), tmp_path / "slim")
    slim = SentenceTransformer(str(tmp_path / "slim"), device="cpu")
    slimformer.patch(model, LayerDrop(block=[1, 2]))
    torch.testing.assert_close(
        torch.tensor(slim.encode(TEXTS)), torch.tensor(model.encode(TEXTS)), atol=1e-6, rtol=1e-6
    )


def test_all_minilm_with_four_layers_is_what_the_patch_makes_of_it(tmp_path: Path) -> None:
    folder = minilm()
    slimformer.export(str(folder), LayerDrop(block=[2, 4]), tmp_path / "slim")
    slim = SentenceTransformer(str(tmp_path / "slim"), device="cpu")
    model = SentenceTransformer(str(folder), device="cpu")
    slimformer.patch(model, LayerDrop(block=[2, 4]))
    texts = TEXTS[:8]
    torch.testing.assert_close(
        torch.tensor(slim.encode(texts)), torch.tensor(model.encode(texts)), atol=1e-6, rtol=1e-5
    )


def test_the_text_decoder_of_a_vision_language_model_is_found_in_its_config(tmp_path: Path) -> None:
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": 8, "patch_size": 4}  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    slimformer.export(model, LayerDrop(block=[1]), tmp_path / "slim")
    slim = type(model).from_pretrained(tmp_path / "slim").eval()
    assert (slim.config.text_config.num_hidden_layers, slim.config.vision_config.num_hidden_layers) == (3, 4)
    slimformer.patch(model, LayerDrop(block=[1]))
    torch.testing.assert_close(outputs(slim), outputs(model), atol=1e-6, rtol=1e-6)


def taps(replace: Any, count: int) -> LayerDrop:
    weights = {"attention.1.weight": torch.zeros(32, 32 * count), "attention.1.bias": torch.zeros(32)}
    return LayerDrop(attention=[1], replace=replace, taps=count, weights=weights)


@pytest.mark.parametrize(
    ("methods", "named"),
    [
        ([LayerDrop(block=[1]), slimformer.TokenElimination({2: 0.5})], "TokenElimination"),
        ([LayerDrop(block=[1]), TempScale(tau=0.9)], "TempScale"),
        ([LayerDrop(attention=[1])], "attention 1 dropped"),
        ([LayerDrop(mlp=[1, 2], block=[2])], "mlp 1 dropped"),
        ([taps("mean", 1)], "attention 1 replaced"),
        ([taps("filter", 2)], "reads 2 tokens"),
        ([LayerDrop(block=[0, 1, 2, 3])], "leaves no layer"),
    ],
)
def test_what_an_ordinary_checkpoint_cannot_hold_is_named(
    methods: list[Any], named: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "llama")
    with pytest.raises(ExportError, match=named):
        slimformer.export(folder, methods, tmp_path / "slim")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def refilled(model: PreTrainedModel, folder: Path, layers: list[int]) -> PreTrainedModel:
    """The model with the tensors of an export, whose layers are these, and NaN for all that it lacks."""
    tensors = load_file(folder / "model.safetensors")
    for new, old in sorted(enumerate(layers), reverse=True):
        for name in [name for name in tensors if name.startswith(f"model.layers.{new}.")]:
            tensors[f"model.layers.{old}.{name.split('.', 3)[3]}"] = tensors.pop(name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.get(name, torch.full_like(parameter, torch.nan)))
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_layers_of_which_a_part_is_left_become_nemotron_nas(name: str, tmp_path: Path) -> None:
    wide = {"intermediate_size": 512, "tie_word_embeddings": False}
    plan = Plan([LayerDrop(attention=[1], mlp=[2], block=[3]), delta()])
    folder = tiny_checkpoint(tmp_path / "whole", name, num_hidden_layers=5, **wide)
    done = slimformer.export(folder, plan, tmp_path / "slim")
    assert (done.format, done.layers) == ("nemotron-nas", (4, 5))
    register_configs()
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    blocks = config.block_configs
    assert [block.attention.no_op for block in blocks] == [False, True, False, False]
    assert [block.ffn.no_op for block in blocks] == [False, False, True, False]
    assert config.num_attention_heads // blocks[0].attention.n_heads_in_group == 2
    assert int(2 * blocks[0].ffn.ffn_mult * config.hidden_size / 3) == 512
    assert config.qkv_bias == (name == "qwen2")
    model = refilled(tiny_model(name, num_hidden_layers=5, **wide), tmp_path / "slim", [0, 1, 2, 4])
    own = slimformer.patch(tiny_model(name, num_hidden_layers=5, **wide), plan)
    torch.testing.assert_close(
        outputs(slimformer.patch(model, *plan.methods[:1])), outputs(own), atol=1e-6, rtol=1e-6
    )
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "slim")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_means_and_filters_are_held_for_the_plugin_in_vllm(name: str, tmp_path: Path) -> None:
    drop = [taps("filter", 1), LayerDrop(mlp=[2], replace="mean", weights={"mlp.2.bias": torch.ones(32)})]
    folder = tiny_checkpoint(tmp_path / "whole", name, tie_word_embeddings=False)
    done = slimformer.export(folder, [*drop, LayerDrop(attention=[0])], tmp_path / "slim", to="vllm")
    assert done.format == "slimformer"
    register_configs()
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert config.model_type == f"slimformer_{name}"
    left = [tuple(layer.values()) for layer in config.slimformer_layers]
    assert left == [("dropped", "kept"), ("filter", "kept"), ("kept", "mean"), ("kept", "kept")]
    tensors = load_file(tmp_path / "slim/model.safetensors")
    assert torch.equal(tensors["model.layers.1.slimformer_attention.weight"], torch.zeros(32, 32))
    assert torch.equal(tensors["model.layers.2.slimformer_mlp.bias"], torch.ones(32))
    # The norm in front of a filter is read, and that of what is dropped is not.
    assert "model.layers.1.input_layernorm.weight" in tensors
    assert "model.layers.0.input_layernorm.weight" not in tensors
    assert not any(".layers.2.mlp." in key or ".layers.1.self_attn." in key for key in tensors)


@pytest.mark.parametrize(
    ("name", "plan", "to", "named"),
    [
        ("qwen3", [LayerDrop(attention=[1])], "checkpoint", "qwen3 has others.*to='vllm' holds it"),
        ("llama", [LayerDrop(attention=[1])], "checkpoint", "48 wide"),
        ("olmo2", [LayerDrop(attention=[1])], "vllm", "not olmo2"),
        ("llama", [LayerDrop(attention=[0, 1, 2, 3])], "vllm", "at least one attention"),
        ("llama", [LayerDrop(block=[1])], "tflite", "takes one of checkpoint, vllm"),
    ],
)
def test_a_plan_that_no_format_holds_is_refused_with_the_reasons(
    name: str, plan: list[Any], to: Any, named: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", name)
    with pytest.raises(ExportError, match=named):
        slimformer.export(folder, plan, tmp_path / "slim", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = Plan([LayerDrop(block=[1])], fingerprint(tiny_model("qwen3")))
    with pytest.raises(PlanError, match="made for another model"):
        slimformer.export(tiny_checkpoint(tmp_path / "whole", "llama"), plan, tmp_path / "slim")
    with pytest.raises(PlanError, match="has 4 layers"):
        slimformer.export(str(tmp_path / "whole"), LayerDrop(block=[4]), tmp_path / "slim")


def test_checkpoints_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny_model("llama").save_pretrained(whole, max_shard_size="20KB")
    shard = sorted(whole.glob("*.safetensors"))[1]
    content = shard.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ExportError, match=match):
            slimformer.export(str(whole), LayerDrop(block=[1]), tmp_path / "slim")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]

    shard.unlink()
    refused("lacks 1 of its")
    shard.write_bytes(content[:-8])
    refused("cannot be read")
    save_file({"other": torch.zeros(1)}, shard)
    refused(f"{shard.name} lacks")


def test_pickles_are_refused_and_not_read(tmp_path: Path) -> None:
    whole = Path(tiny_checkpoint(tmp_path / "whole", "llama"))
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(ExportError, match="are pickles"):
        slimformer.export(str(whole), LayerDrop(block=[1]), tmp_path / "slim")


def test_a_layer_that_the_checkpoint_does_not_hold_is_named(tmp_path: Path) -> None:
    whole = Path(tiny_checkpoint(tmp_path / "whole", "llama"))
    tensors = load_file(whole / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.2." not in k}, whole / "model.safetensors")
    with pytest.raises(ExportError, match="none of layer 2"):
        slimformer.export(str(whole), LayerDrop(block=[1]), tmp_path / "slim")


def test_attentions_that_depend_on_their_depth_are_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ExportError, match="depth"):
        slimformer.export(model, LayerDrop(block=[1]), tmp_path / "slim")


def test_layers_that_are_called_several_times_are_refused(tmp_path: Path) -> None:
    config = AlbertConfig(vocab_size=64, hidden_size=32, embedding_size=16, intermediate_size=48, num_attention_heads=4,
                          num_hidden_layers=4)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="several times"):
        slimformer.export(AlbertModel(config), LayerDrop(block=[1]), tmp_path / "slim")


def test_a_folder_is_replaced_only_by_force_and_only_if_it_is_an_export(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "llama")
    (tmp_path / "slim").mkdir()
    slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "slim")
    with pytest.raises(ExportError, match="there already"):
        slimformer.export(folder, LayerDrop(block=[1, 2]), tmp_path / "slim")
    slimformer.export(folder, LayerDrop(block=[1, 2]), tmp_path / "slim", force=True)
    assert AutoConfig.from_pretrained(tmp_path / "slim").num_hidden_layers == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="holds other files"):
        slimformer.export(folder, LayerDrop(block=[1]), tmp_path / "mine", force=True)
    with pytest.raises(ExportError, match="own folder"):
        slimformer.export(folder, LayerDrop(block=[1]), f"{folder}/slim")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "slim", "whole"]


def test_a_disk_that_is_full_leaves_nothing_and_the_earlier_export(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "llama")
    slimformer.export(folder, LayerDrop(block=[1, 2]), tmp_path / "slim")
    program = (
        "import resource, signal, sys, slimformer\n"
        "from slimformer.errors import ExportError\n"
        "slimformer.export\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    slimformer.export(sys.argv[1], slimformer.LayerDrop(block=[1]), sys.argv[2], force=True)\n"
        "except ExportError as error:\n"
        "    print(error)\n"
    )
    run = [sys.executable, "-c", program, folder, str(tmp_path / "slim")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "could not be written" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim", "whole"]
    assert AutoConfig.from_pretrained(tmp_path / "slim").num_hidden_layers == 2


def test_the_command_writes_it_and_says_what_is_left(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "llama")
    Plan([LayerDrop(block=[1])]).save_pretrained(tmp_path / "plan")
    command = ["export", folder, "--plan", str(tmp_path / "plan"), "-o", str(tmp_path / "slim")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "3 of 4 layers" in result.output
    assert AutoConfig.from_pretrained(tmp_path / "slim").num_hidden_layers == 3
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "--force" in again.output

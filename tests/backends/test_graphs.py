"""ONNX Runtime and OpenVINO compute what the patched encoder computes, and what no graph holds is refused.

`make test-onnx` runs these in an environment of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

import slimformer
from embedding_data import TEXTS, pipeline
from slimformer import EarlyExit, LayerDrop, MixtureOfDepths, Plan, TokenElimination
from slimformer.cli import app
from slimformer.errors import ExportError
from slimformer.methods.weight_delta import WeightDelta
from tiny_checkpoints import tiny_checkpoint
from tiny_models import ENCODERS, tiny_model

pytest.importorskip("onnxscript")
GRAPH = "onnx/model.onnx"
ROUTER = {"mlp.1.weight": torch.zeros(32), "mlp.1.bias": -torch.ones(1)}
IDS = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(20) < torch.tensor([[20], [7], [1]])).long()


def computed(graph: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first output of a graph in ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    wanted = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: given[name].numpy() for name in wanted})[0])


def in_openvino(graph: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same in OpenVINO, which reads ONNX."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    names = [port.any_name for port in compiled.inputs]
    return torch.from_numpy(compiled({name: given[name].numpy() for name in names})[0])


@pytest.mark.parametrize("engine", [computed, in_openvino], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_graph_computes_what_the_patched_model_does(name: str, engine: Any, tmp_path: Path) -> None:
    methods = [LayerDrop(block=[1]), EarlyExit(layer=3)]
    done = slimformer.export(tiny_checkpoint(tmp_path / "whole", name), methods, tmp_path / "slim", to="onnx")
    assert (done.format, done.layers, done.cosine) == ("onnx", (2, 4), None)
    model = slimformer.patch(tiny_model(name), *methods)
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).last_hidden_state
    found = engine(tmp_path / "slim" / GRAPH, IDS, MASK)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=2e-6, rtol=1e-5)
    assert not list((tmp_path / "slim").rglob("*.safetensors"))
    assert (tmp_path / "slim/tokenizer.json").is_file()
    assert (
        json.loads((tmp_path / "slim/config.json").read_text())[
            "num_hidden_layers" if name != "distilbert" else "n_layers"
        ]
        == 2
    )


def test_what_repair_changed_is_in_the_graph(tmp_path: Path) -> None:
    name = "2.attention.self.query.weight"
    parts = {f"{name}.left": torch.randn(32, 2), f"{name}.right": torch.randn(2, 32)}
    plan = Plan([LayerDrop(block=[1]), WeightDelta(parts)])
    slimformer.export(tiny_model("bert"), plan, tmp_path / "slim", to="onnx")
    model = slimformer.patch(tiny_model("bert"), plan)
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
    found = computed(tmp_path / "slim" / GRAPH, IDS, torch.ones_like(IDS))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                        num_attention_heads=4, num_labels=3)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    slimformer.export(model, LayerDrop(block=[2]), tmp_path / "slim", to="onnx")
    slimformer.patch(model, LayerDrop(block=[2]))
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    found = computed(tmp_path / "slim" / GRAPH, IDS, MASK)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_pipeline_stays_one_and_tells_what_int8_costs(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "bert")
    done = slimformer.export(model, LayerDrop(block=[1]), tmp_path / "slim", to="onnx", quantize="avx2")
    assert (tmp_path / "slim/modules.json").is_file()
    assert json.loads((tmp_path / "slim/1_Pooling/config.json").read_text())
    assert [path.name for path in (tmp_path / "slim/onnx").iterdir()] == ["model.onnx"]
    assert done.cosine is not None
    assert 0.9 < done.cosine[1] < done.cosine[0] < 1
    ids = torch.randint(4, 60, (1, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    rounded = computed(tmp_path / "slim" / GRAPH, ids, mask).mean(1)
    slimformer.patch(model, LayerDrop(block=[1]))
    with torch.no_grad():
        exact = model[0].auto_model(ids, attention_mask=mask).last_hidden_state.mean(1)
    assert 0.9 < float(torch.cosine_similarity(rounded, exact)) < 1 - 1e-7
    assert TEXTS


@pytest.mark.parametrize("recipe", ["arm64", "avx2", "avx512", "avx512_vnni"])
def test_recipes_are_those_of_their_processors(recipe: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    slimformer.export(tiny_model("bert"), LayerDrop(block=[1]), tmp_path / "slim", to="onnx", quantize=recipe)
    graph = onnx.load(tmp_path / "slim" / GRAPH).graph
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    # Six linear layers in each of three layers.
    assert len(products) == 18
    kinds = {entry.name: entry.data_type for entry in graph.initializer}
    wanted = onnx.TensorProto.UINT8 if recipe == "avx2" else onnx.TensorProto.INT8
    assert {kinds[node.input[1]] for node in products} == {wanted}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("llama", "LlamaForCausalLM generates"),
        (ViTModel(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                            image_size=32, patch_size=16)), "reads pixel_values"),
    ],
)  # fmt: skip
def test_what_is_no_encoder_of_text_is_refused(model: Any, named: str, tmp_path: Path) -> None:
    given = tiny_model(model) if isinstance(model, str) else model
    with pytest.raises(ExportError, match=named):
        slimformer.export(given, LayerDrop(block=[1]), tmp_path / "slim", to="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (TokenElimination({1: 0.5}), "TokenElimination decides while the model runs"),
        (MixtureOfDepths(mlp=[1], weights=ROUTER), "MixtureOfDepths decides while the model runs"),
        (LayerDrop(attention=[1]), "attention 1 dropped"),
    ],
)
def test_plans_that_no_graph_holds_are_refused(method: Any, named: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "bert")
    with pytest.raises(ExportError, match=named):
        slimformer.export(folder, method, tmp_path / "slim", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.architectures = ["BertForSequenceClassification"]
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"lacks 2 tensors .* such as classifier"):
        slimformer.export(str(tmp_path / "whole"), LayerDrop(block=[1]), tmp_path / "slim", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def in_a_process(program: str, *arguments: str) -> str:
    run = [sys.executable, "-c", program, *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("quantize", [None, "avx2"])
@pytest.mark.parametrize("room", [20_000, 150_000])
def test_a_disk_that_is_full_leaves_nothing_and_the_earlier_export(
    quantize: str | None, room: int, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "bert")
    slimformer.export(folder, LayerDrop(block=[1, 2]), tmp_path / "slim", to="onnx")
    program = (
        "import resource, signal, sys, slimformer\n"
        "import onnx, onnxscript, onnxruntime\n"
        "from slimformer.errors import ExportError\n"
        "slimformer.export\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try:\n"
        "    drop = slimformer.LayerDrop(block=[1])\n"
        f"    slimformer.export(sys.argv[1], drop, sys.argv[2], to='onnx', force=True, quantize={quantize!r})\n"
        "except ExportError as error:\n"
        "    print(error)\n"
    )
    assert "could not be written" in in_a_process(program, folder, str(tmp_path / "slim"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim", "whole"]
    assert json.loads((tmp_path / "slim/config.json").read_text())["num_hidden_layers"] == 2


def test_an_existing_folder_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim/letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="holds other files"):
        slimformer.export(tiny_model("bert"), LayerDrop(block=[1]), tmp_path / "slim", to="onnx", force=True)
    assert [path.name for path in (tmp_path / "slim").iterdir()] == ["letter.txt"]


def test_the_command_says_what_int8_costs(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "bert")
    Plan([LayerDrop(block=[1])]).save_pretrained(tmp_path / "plan")
    command = [
        "export",
        folder,
        "--plan",
        str(tmp_path / "plan"),
        "-o",
        str(tmp_path / "slim"),
        "--to",
        "onnx",
    ]
    result = CliRunner().invoke(app, [*command, "--quantize", "avx2"])
    assert result.exit_code == 0, result.output
    assert "3 of 4 layers" in result.output
    assert "In int8 the mean token vectors of texts keep a cosine of" in " ".join(result.output.split())

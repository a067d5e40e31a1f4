"""Exported pipelines of real checkpoints embed as the patched pipeline does, in every backend of sentence-transformers.

`make test-onnx` runs these. The library's own backends need an older transformers than slimformer: the Python of
their environment is named by BACKENDS_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import slimformer
from real_models import minilm, mpnet
from slimformer import LayerDrop
from slimformer.text.sources import load_texts

pytest.importorskip("onnxscript")
PROGRAM = Path(__file__).with_name("embed.py")
MODELS: dict[str, tuple[Callable[[], Path], list[int]]] = {
    "minilm": (minilm, [4]),
    "mpnet": (mpnet, [2, 5, 8]),
}
# Of different lengths, so that there is padding.
TEXTS = [text[: 40 * (1 + number % 9)] for number, text in enumerate(load_texts(None, limit=24)[0])]

Pair = tuple[str, np.ndarray]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Pair:
    """The folder of a checkpoint and the patched pipeline's embeddings."""
    fetch, blocks = MODELS[request.param]
    folder = str(fetch())
    pipeline = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    slimformer.patch(pipeline, LayerDrop(block=blocks))
    return request.param, pipeline.encode(TEXTS, batch_size=8)


def exported(name: str, folder: Path, **options: Any) -> Path:
    fetch, blocks = MODELS[name]
    slimformer.export(str(fetch()), LayerDrop(block=blocks), folder, **options)
    return folder


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return (found * expected).sum(1) / norms


def embedded(folder: Path, backend: str, *options: str) -> np.ndarray:
    """What a backend of sentence-transformers makes of the texts."""
    python = os.environ.get("BACKENDS_PYTHON")
    if not python:
        pytest.skip("BACKENDS_PYTHON names no environment with sentence-transformers' backends")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(PROGRAM), str(folder), backend, *options]
    done = subprocess.run(
        command, input=json.dumps(TEXTS), capture_output=True, text=True, env={**own, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_embeds_as_the_patched_pipeline_does(model: Pair, engine: str, tmp_path: Path) -> None:
    name, expected = model
    graph = exported(name, tmp_path / "slim", to="onnx") / "onnx/model.onnx"
    assert cosines(in_engine(graph, engine, name), expected).min() >= 0.99999


def in_engine(graph: Path, engine: str, name: str) -> np.ndarray:
    """The embeddings that the pipeline makes of a graph's token vectors."""
    runtime = pytest.importorskip(engine)
    pipeline = SentenceTransformer(str(MODELS[name][0]()), device="cpu")
    found = []
    if engine == "onnxruntime":
        session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
    else:
        session = runtime.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [port.any_name for port in session.inputs]
    for start in range(0, len(TEXTS), 8):
        features = pipeline.preprocess(TEXTS[start : start + 8])
        given = {key: features[key].numpy() for key in names}
        vectors = session.run(None, given)[0] if engine == "onnxruntime" else session(given)[0]
        features["token_embeddings"] = torch.from_numpy(vectors)
        for module in list(pipeline)[1:]:
            features = module(features)
        found.append(features["sentence_embedding"].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_a_checkpoint_works_with_every_backend(model: Pair, backend: str, tmp_path: Path) -> None:
    name, expected = model
    found = embedded(exported(name, tmp_path / "slim"), backend)
    assert cosines(found, expected).min() >= 0.99999


def test_a_graph_is_opened_by_the_backend_for_onnx(model: Pair, tmp_path: Path) -> None:
    name, expected = model
    found = embedded(exported(name, tmp_path / "slim", to="onnx"), "onnx")
    assert cosines(found, expected).min() >= 0.99999


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_checkpoint_in_int8_loses_little(
    model: Pair, backend: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    name, expected = model
    found = cosines(embedded(exported(name, tmp_path / "slim"), backend, "--int8"), expected)
    record_property("cosine", (float(found.mean()), float(found.min())))
    print(f"{name} in {backend} int8: cosine {found.mean():.4f} on average, {found.min():.4f} at least")
    # What is said of MiniLM; of mpnet int8 keeps much less, and nothing is promised.
    assert name != "minilm" or found.mean() >= 0.98


def test_a_graph_in_int8_loses_what_was_said(model: Pair, tmp_path: Path) -> None:
    name, expected = model
    fetch, blocks = MODELS[name]
    done = slimformer.export(
        str(fetch()), LayerDrop(block=blocks), tmp_path / "slim", to="onnx", quantize="avx2"
    )
    assert done.cosine is not None
    found = cosines(in_engine(tmp_path / "slim/onnx/model.onnx", "onnxruntime", name), expected)
    print(f"{name} as a graph in int8: cosine {found.mean():.4f} on average, {found.min():.4f} at least")
    assert abs(found.mean() - done.cosine[0]) < 0.02

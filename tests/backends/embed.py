"""Embeds texts with a backend of sentence-transformers, in the environment that its backends need: a program.

    python embed.py FOLDER {torch,onnx,openvino} [--int8] < TEXTS > VECTORS

Texts and vectors are JSON. With `--int8` the folder is rounded by the library's own function first, in a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.backend import (
    export_dynamic_quantized_onnx_model,
    export_static_quantized_openvino_model,
)

# A processor with instructions for bfloat16 else computes in it.
EXACT = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}


def loaded(folder: str, backend: Any, int8: bool, texts: list[str]) -> SentenceTransformer:
    options: dict[str, Any] = dict(EXACT) if backend == "openvino" else {}
    model = SentenceTransformer(folder, device="cpu", backend=backend, model_kwargs=options)
    if not int8:
        return model
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        if backend == "onnx":
            export_dynamic_quantized_onnx_model(model, "avx2", place)
            name = "onnx/model_quint8_avx2.onnx"
        else:
            data = Path(place) / "data"
            data.mkdir()
            (data / "train.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            given = {"dataset_name": str(data), "dataset_config_name": "default", "dataset_split": "train"}
            export_static_quantized_openvino_model(model, None, place, column_name="text", **given)
            name = "openvino/openvino_model_qint8_quantized.xml"
        options["file_name"] = name
        return SentenceTransformer(place, device="cpu", backend=backend, model_kwargs=options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("backend", choices=("torch", "onnx", "openvino"))
    parser.add_argument("--int8", action="store_true")
    arguments = parser.parse_args()
    texts = json.load(sys.stdin)
    # What libraries print on the way is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        model = loaded(arguments.folder, arguments.backend, arguments.int8, texts)
        vectors = model.encode(texts, batch_size=8, show_progress_bar=False)
    json.dump(vectors.tolist(), sys.stdout)


if __name__ == "__main__":
    main()

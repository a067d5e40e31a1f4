"""An embedding model without some layers in PyTorch, ONNX Runtime and OpenVINO, int8 too: texts per second, quality.

Beside them stands model2vec, if it is installed: one vector per word of the vocabulary, distilled from the same model.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput

import slimformer
from benchmarks.embeddings.encode import encoded
from benchmarks.embeddings.inputs import embedder, lines, retrieval_task
from benchmarks.embeddings.judged import judged_alone_and_with
from benchmarks.frame import tables
from benchmarks.frame.compare import against, compare
from benchmarks.frame.inputs import C4, CRANFIELD, LOSSLESS, STS_TEST, UNPATCHED, WIKI_TEST, WIKI_TRAIN, kept
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort, Regime
from slimformer import LayerDrop, Plan
from slimformer.evaluation.embedding_tasks import PairTask
from slimformer.evaluation.similarity_task import read_sts
from slimformer.model.anatomy import find_anatomy
from slimformer.plans.plan import fingerprint
from slimformer.training.loop import TrainingSettings

WHOLE, FEWER = "all layers", "fewer layers"
STATIC = "model2vec, 256 numbers"
# A batch as texts come, and batches of neighbours in length, as `encode` makes them of a whole corpus.
ARRIVAL, SORTED = "arrival", "sorted"
ONNX, OPENVINO, TORCH, WORDS, QUALITY = "onnx", "openvino", "torch-int8", "model2vec", "quality"
PARTS = [ONNX, OPENVINO, TORCH, WORDS, QUALITY]
WIKI, DOLLY, ALPACA = (
    "c4_calib/wiki_demo.txt",
    "instructions/dolly_hhrlhf_train_small.jsonl",
    "instructions/alpaca_en_demo.json",
)
# By the number of layers: what is dropped. Of twelve: the greedy order of `calibrate drop --kinds block`, which takes
# 2 5 4 6 3 1, spread out a little, so that no gap is as long.
BLOCKS: dict[int, tuple[int, ...]] = {3: (1,), 6: (2, 4), 12: (1, 3, 4, 5, 6, 8)}
# Of the table: documents and queries by the same engine, one of the two by the unpatched model, and similarity.
FIGURES = {"cranfield": ".3f", "dense queries": ".3f", "dense documents": ".3f", "sts": ".1f"}
_TEXTS, _ROUNDED_ON = 48, 64
_PACKAGES = {ONNX: ("onnxscript", "onnxruntime"), OPENVINO: ("onnxscript", "openvino", "nncf")}
_WORDS = (12, 25, 50, 90, 140, 200)
_EFFORT = Effort(milliseconds=0.0, least=5, most=5, warm_ups=1)

Engines = dict[str, nn.Module]


@benchmark(
    "encoder_engines",
    "Cranfield through encode: PyTorch, ONNX Runtime and OpenVINO, whole and without some layers, float32 and int8",
    on="CPU",
    model="embedding model",
    data=(CRANFIELD, STS_TEST, C4, WIKI, WIKI_TRAIN, WIKI_TEST, DOLLY, ALPACA),
    parts=PARTS,
    takes=("plans", "texts"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Repair on other text than what judges; every engine's vectors are compared with those of the same layers."""
    parts = settings.chosen(PARTS)
    wanted = {name for part in parts for name in _PACKAGES.get(part, ())}
    absent = sorted(name for name in wanted if find_spec(name) is None)
    if absent:
        yield Measurement({}, "engines", status="unsupported", note=f"not installed: {', '.join(absent)}")
        return
    model = embedder(settings)
    blocks = BLOCKS[len(find_anatomy(model).layers)]
    plan, seconds = kept(settings.plans / "engines", partial(_repaired, settings, model, blocks))
    # A plan that was kept from an earlier run may leave out others.
    at = {"model": settings.model.name, "dropped": ", ".join(map(str, plan.dropped("attention")))}
    own = model[0].model
    samples = lines(settings, WIKI_TEST)[: settings.pick(_ROUNDED_ON, 4)]
    task = retrieval_task(settings)
    count = settings.texts or settings.pick(_TEXTS, 4)
    orders = {ARRIVAL: [task.texts[:count]], SORTED: neighbours(task.texts, count)}
    timed = orders[ARRIVAL][0]
    # Of one thread the processor's own time is taken: a machine that others use gives the same figures.
    regime: Regime = "processor" if torch.get_num_threads() == 1 else "wall"
    with tempfile.TemporaryDirectory() as folder:
        engines: Engines = {}
        for layers, found in ((WHOLE, LayerDrop()), (FEWER, plan)):
            if TORCH in parts:
                engines[f"{layers}: PyTorch, int8"] = _in_int8(settings, Path(folder), layers, found, own)
            if ONNX in parts:
                engines |= _onnx(settings, Path(folder), layers, found, own.config)
            if OPENVINO in parts:
                engines |= _openvino(settings, Path(folder), layers, found, model, samples)

        def restored(*methods: Plan) -> None:
            model[0].model = own
            slimformer.unpatch(model)
            if methods:
                slimformer.patch(model, *methods)

        def through(engine: nn.Module) -> None:
            restored()
            model[0].model = engine

        ways: dict[str, Callable[[], object]] = {
            UNPATCHED: restored,
            LOSSLESS: partial(slimformer_patched, model, own),
            f"{FEWER}: PyTorch": partial(restored, plan),
        }
        ways |= {name: partial(through, engine) for name, engine in engines.items()}
        right: dict[tuple[str, str], Tensor] = {}
        for layers, way in ((WHOLE, ways[UNPATCHED]), (FEWER, ways[f"{FEWER}: PyTorch"])):
            way()
            for order, calls in orders.items():
                right[layers, order] = encoded(model, calls)
        static = _distilled(settings) if WORDS in parts else None
        for order, calls in orders.items():
            cases = {
                name: against(
                    None if "int8" in name else right[FEWER if name.startswith(FEWER) else WHOLE, order],
                    partial(encoded, model, calls),
                    1e-4,
                    prepare=way,
                )
                for name, way in ways.items()
            }
            if static is not None:
                cases[STATIC] = against(None, partial(encoded, static, calls), prepare=restored)
            point: Parameters = {**at, "order": order, "texts": sum(map(len, calls))}
            yield from compare(settings, point, cases, regime=regime, baseline=UNPATCHED, effort=_EFFORT)
        if QUALITY not in parts:
            restored()
            return
        pairs, gold = read_sts(settings.data / STS_TEST)
        sts = PairTask("STS-B test", pairs, gold)
        judge = judged_alone_and_with(task, sts)
        judged = [
            name
            for name in ways
            if name in (UNPATCHED, f"{FEWER}: PyTorch") or name.endswith(("Runtime, int8", "PyTorch, int8"))
        ]
        for name in judged:
            ways[name]()
            values = judge(model)
            rounded = encoded(model, [timed])
            exact = right[FEWER if name.startswith(FEWER) else WHOLE, ARRIVAL]
            values["cosine"] = float(torch.cosine_similarity(rounded, exact).mean())
            if name == f"{FEWER}: PyTorch":
                values["repair seconds"] = seconds
            yield Measurement({**at, "judged": "yes"}, name, values=values)
        restored()
        if static is not None:
            # Another space: its vectors are compared with its own alone.
            yield Measurement(
                {**at, "judged": "yes"}, STATIC, values=judged_alone_and_with(task, sts)(static)
            )


def neighbours(texts: Sequence[str], count: int) -> list[list[str]]:
    """Four batches of texts that are neighbours in length, from short ones to long ones, `count` texts in all.

    Example:
        >>> neighbours(["a" * n for n in range(16)], 4)[0]
        ['aa']
    """
    ordered, each = sorted(texts, key=len), max(count // 4, 1)
    starts = (int(len(ordered) * (2 * part + 1) / 8) for part in range(4))
    return [ordered[start : start + each] for start in starts]


def slimformer_patched(model: Any, own: nn.Module) -> None:
    """The pipeline's own model, patched without a plan."""
    model[0].model = own
    slimformer.patch(model)


class Graph(nn.Module):
    """A graph in an engine, in the place of a pipeline's model.

    Attributes:
        config: The model's own.
    """

    def __init__(self, config: Any, names: Sequence[str], call: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.config, self.names, self.call = config, names, call

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Token vectors `[texts, tokens, hidden]`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        found = self.call({name: given[name].numpy() for name in self.names})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(found))


class Words:
    """A distilled model of vectors per word, with what evaluators call of a pipeline."""

    similarity_fn_name = "cosine"

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode(self, texts: Sequence[str], convert_to_tensor: bool = False, **_: Any) -> Any:
        """Vectors `[texts, 256]`."""
        found = self.inner.encode(list(texts))
        return torch.from_numpy(found) if convert_to_tensor else found

    encode_document = encode_query = encode


def _distilled(settings: Settings) -> Words | None:
    """model2vec's own distillation of the model, kept beside the plans; None where the package is not installed."""
    if find_spec("model2vec") is None or settings.smoke:
        return None
    package, distill = import_module("model2vec"), import_module("model2vec.distill").distill
    folder = settings.plans / "model2vec"
    if not folder.is_dir():
        distill(str(settings.model), pca_dims=256, device="cpu").save_pretrained(str(folder))
    return Words(package.StaticModel.from_pretrained(str(folder)))


def _in_int8(settings: Settings, folder: Path, layers: str, plan: Any, own: nn.Module) -> nn.Module:
    """PyTorch's dynamic quantisation of the linear layers, weights per output channel."""
    exact = copy.deepcopy(own)
    if layers == FEWER:
        target = folder / "checkpoint"
        slimformer.export(str(settings.model), plan, target, to="checkpoint")
        exact = AutoModel.from_pretrained(target, dtype=torch.float32).eval()
    quantization: Any = torch.ao.quantization
    recipe = {nn.Linear: quantization.per_channel_dynamic_qconfig}
    found: nn.Module = quantization.quantize_dynamic(exact, recipe, dtype=torch.qint8)
    return found


def _graph(settings: Settings, folder: Path, layers: str, plan: Any, quantize: str | None) -> Path:
    """The file of a plan's graph, exported once."""
    target = folder / f"{layers}-{quantize}".replace(" ", "-")
    if not target.is_dir():
        slimformer.export(str(settings.model), plan, target, to="onnx", quantize=quantize)
    return target / "onnx" / "model.onnx"


def _onnx(settings: Settings, folder: Path, layers: str, plan: Any, config: Any) -> Engines:
    """ONNX Runtime with a plan's graph in float32 and in int8."""
    onnxruntime = import_module("onnxruntime")
    found: Engines = {}
    for name, quantize in (("", None), (", int8", "int8")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        graph = _graph(settings, folder, layers, plan, quantize)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        found[f"{layers}: ONNX Runtime{name}"] = Graph(config, names, partial(_in_onnxruntime, session))
    return found


def _openvino(
    settings: Settings, folder: Path, layers: str, plan: Any, model: Any, samples: Sequence[str]
) -> Engines:
    """OpenVINO with a plan's graph in float32 and in int8."""
    openvino, nncf = (import_module(name) for name in ("openvino", "nncf"))
    core, graph = openvino.Core(), _graph(settings, folder, layers, plan, None)
    # A processor with instructions for bfloat16 else computes in it.
    exact = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    whole = core.read_model(graph)
    names = [port.any_name for port in whole.inputs]
    rounded = nncf.quantize(
        core.read_model(graph),
        nncf.Dataset([_inputs(model, text, names) for text in samples]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    found: Engines = {}
    for name, read in (("", whole), (", int8", rounded)):
        compiled = core.compile_model(read, "CPU", exact)
        found[f"{layers}: OpenVINO{name}"] = Graph(
            model[0].model.config, names, partial(_in_openvino, compiled)
        )
    return found


def _in_onnxruntime(session: Any, given: dict[str, Any]) -> Any:
    return session.run(None, given)[0]


def _in_openvino(compiled: Any, given: dict[str, Any]) -> Any:
    return compiled(given)[0]


def _inputs(model: Any, text: str, names: Sequence[str]) -> dict[str, Any]:
    features = model.preprocess([text])
    zeros = torch.zeros_like(features["input_ids"])
    return {name: features.get(name, zeros).numpy() for name in names}


def _repaired(settings: Settings, model: Any, blocks: tuple[int, ...]) -> Plan:
    steps = 110 if len(blocks) > 2 else 300
    training = TrainingSettings(
        steps=settings.pick(steps, 2),
        rows=settings.pick(32, 2),
        precision=settings.pick("bf16", "no"),
        keep_every=10_000,
    )
    return slimformer.repair(
        model,
        Plan([LayerDrop(block=blocks)], fingerprint(model[0].model)),
        data=other_texts(settings),
        near=None,
        rank=settings.pick(64, 2),
        length=settings.pick(128, 64),
        every=settings.pick(25, 2),
        patience=99,
        settings=training,
    )


def other_texts(settings: Settings) -> list[str]:
    """Pieces of 12 to 200 words of web pages, encyclopedias and answers, and questions: nothing of what judges."""
    random = Random(0)

    def pieces(text: str) -> Iterator[str]:
        words = text.split()
        while words:
            size = random.choice(_WORDS)
            yield " ".join(words[:size])
            words = words[size:]

    def read(name: str) -> list[str]:
        return (settings.data / name).read_text(encoding="utf-8").splitlines()

    found = [piece for line in read(C4) for piece in pieces(str(json.loads(line)["text"]))]
    for text in (*read(WIKI), *lines(settings, WIKI_TRAIN)):
        found += pieces(text)
    for row in map(json.loads, read(DOLLY)):
        question = str(row["prompt"]).rpartition("### Instruction:\n")[2].partition("\n\n### Response")[0]
        found += [question, *list(pieces(str(row["response"])))[:2]]
    for row in json.loads(os.linesep.join(read(ALPACA))):
        found += [f"{row['instruction']} {row['input']}", *list(pieces(str(row["output"])))[:2]]
    found = [text for text in found if len(text.split()) > 3]
    random.shuffle(found)
    return found


@table("encoder_engines")
def engines(content: dict[str, Any]) -> str:
    """For every model one row per engine: its speed in two orders beside the unpatched pipeline, and quality."""
    parts = [_of_model(content, name) for name in tables.distinct(content, "model")]
    return "\n\n".join(part for part in parts if part)


def _of_model(content: dict[str, Any], model: str) -> str:
    of_model: dict[str, Any] = {"model": model}
    dense, rows = tables.find(content, UNPATCHED, judged="yes", **of_model), []
    for name in tables.candidates(content):
        judged = tables.find(content, name, judged="yes", **of_model)
        times = {order: tables.find(content, name, order=order, **of_model) for order in (ARRIVAL, SORTED)}
        if any(timed is None or timed["status"] != "ok" for timed in times.values()):
            continue
        cells = [name]
        for timed in times.values():
            if timed is not None:
                texts, median = timed["parameters"]["texts"], timed["milliseconds"]["p50"]
                cells += [f"{tables.number(1000 * texts / median)} ({tables.gain(timed)})"]
        for figure, form in FIGURES.items():
            of_dense = figure if figure == "sts" else "cranfield"
            value, whole = tables.figure(judged, figure), tables.figure(dense, of_dense)
            known = value is not None and whole is not None
            cells.append(f"{value:{form}} ({tables.change(value or 0.0, whole or 0.0)})" if known else "")
        cells.append(
            tables.shown(tables.figure(judged, "cosine"), ".4f") if "int8" in name and judged else ""
        )
        rows.append(cells)
    dropped = tables.distinct(content, "dropped", where=lambda at: at.get("model") == model)
    head = [
        f"{model}, layers {', '.join(map(str, dropped))} dropped",
        "texts per second, as they come",
        "by length",
        "Cranfield, nDCG@10",
        "with dense queries",
        "with dense documents",
        "STS-B test, Spearman × 100",
        "cosine to float32",
    ]
    return tables.markdown(head, rows) if rows else ""

"""A plan from anywhere is applied whole or refused with a reason: no file and no weight ends in another error."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import slimformer
from slimformer import EarlyExit, LayerDrop, MixtureOfDepths, Plan, SelfExtend, TempScale, TokenElimination
from slimformer.decisions.registry import registered
from slimformer.errors import PlanError, SlimformerError
from slimformer.methods.absolute_positions import GroupedPositions
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.methods.narrow_mlp import NarrowMlp
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale
from slimformer.methods.weight_delta import WeightDelta
from slimformer.plans.plan import FILE, WEIGHTS
from slimformer.report import (
    comparison_table,
    curve_table,
    grid_table,
    methods_table,
    narrow_table,
    plan_page,
    plan_table,
    predictor_table,
    repair_table,
    router_table,
    temperature_table,
)
from tiny_models import tiny_model

FUZZ = settings(max_examples=25, derandomize=True, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 2**31, "²", "LayerDrop", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def learned(hidden: int = 32) -> dict[str, Any]:
    """One method of every kind that has weights, for a width."""
    router = {"attention.1.weight": torch.ones(hidden), "attention.1.bias": torch.zeros(1)}
    narrow = {"1.up.weight": (2, hidden), "1.up.bias": (2,), "1.down.weight": (hidden, 2),
              "1.linear.weight": (hidden, hidden), "1.linear.bias": (hidden,)}  # fmt: skip
    delta = {"1.mlp.up_proj.weight.left": torch.ones(48, 1),
             "1.mlp.up_proj.weight.right": torch.ones(1, hidden)}  # fmt: skip
    head = {"head.weight": torch.zeros(hidden, hidden), "head.bias": torch.zeros(hidden)}
    return {
        "filter": LayerDrop(attention=[1], replace="filter", taps=2, weights={
            "attention.1.weight": torch.zeros(hidden, 2 * hidden), "attention.1.bias": torch.zeros(hidden)}),
        "mean": LayerDrop(mlp=[1], replace="mean", weights={"mlp.1.bias": torch.zeros(hidden)}),
        "router": MixtureOfDepths(attention=[1], weights=router),
        "predictor": TokenElimination({1: 0.5}, scorer="predictor",
                                      weights=BlockPredictor(hidden, 4, 2).tensors(1)),
        "head": EarlyExit(2, head),
        "narrow": NarrowMlp({1: 2}, {name: torch.zeros(shape) for name, shape in narrow.items()}),
        "delta": WeightDelta(delta),
    }  # fmt: skip


def example_plan() -> Plan:
    """A plan of many methods, as others may be made from it by changing something."""
    others = [TempScale(0.9), LogNScale(64), SelfExtend(2, 16), GroupedPositions(2),
              RopeScaling("yarn", 2.0, parameters={"beta_fast": 32})]  # fmt: skip
    made = [*learned().values(), LayerDrop(attention=[0], mlp=[2], block=[3]), *others]
    return Plan(made, {"layers": 4}, {"data": "notes"}, {"quality": {"dense": 1.0}})


def write(folder: Path, document: object, weights: bytes | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
        if isinstance(document, dict):
            document = {**document, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    (folder / FILE).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


NAMES = sorted(registered())


def read(folder: Path) -> Plan | None:
    """The plan, or None where it is refused; any other error than a PlanError is a failure."""
    try:
        return Plan.from_pretrained(folder)
    except PlanError:
        return None


@pytest.mark.filterwarnings("ignore::slimformer.errors.SlimformerWarning")
@FUZZ
@given(document=JSON, methods=st.lists(
    st.fixed_dictionaries({"method": st.sampled_from(NAMES)}).flatmap(lambda entry: st.fixed_dictionaries(
        entry and {"method": st.just(entry["method"])},
        optional={f.name: JSON for f in dataclasses.fields(registered()[entry["method"]])},
    )), max_size=2))  # fmt: skip
def test_any_json_is_a_plan_or_refused(tmp_path: Path, document: Any, methods: list[Any]) -> None:
    read(write(tmp_path / "plain", document))
    plan = read(write(tmp_path / "plan", {"format": 1, "methods": methods, "provenance": document}))
    if plan is not None:
        assert read(write(tmp_path / "again", plan.to_dict())).methods == plan.methods


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, entry in inside for place in places(entry, (*way, key)))]


@pytest.mark.filterwarnings("ignore::slimformer.errors.SlimformerWarning")
@FUZZ
@given(data=st.data())
def test_a_changed_plan_is_applied_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(example_plan().methods))
    plan, model = Plan([method], {"layers": 4}), _model(type(method) in (GroupedPositions, NarrowMlp))
    document, tensors = json.loads(json.dumps(plan.to_dict())), plan.tensors()
    way = data.draw(st.sampled_from(places(document)[1:]))
    within = document
    for key in way[:-1]:
        within = within[key]
    within[way[-1]] = data.draw(JSON)
    if tensors and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        tensors[name] = torch.full(shape, data.draw(st.sampled_from([0, 1])), dtype=dtype)
    changed = read(write(tmp_path / "plan", document, safetensors.torch.save(tensors) if tensors else None))
    if changed is not None:
        try:
            with slimformer.patched(model, changed), torch.no_grad():
                assert model(torch.arange(3, 13)[None])[0].isfinite().all()
        except SlimformerError:
            pass
        assert slimformer.status(model) == {}


_MODELS: dict[str, Any] = {}


def _model(encoder: bool) -> Any:
    name = "bert" if encoder else "llama"
    return _MODELS.setdefault(name, tiny_model(name))


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["0.attention.1.weight", "0.attention.1.bias", "__metadata__", "x"]), JSON
        | st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "C64", "U64", "I64", "BOOL", "Q7", ""]),
            "shape": st.lists(st.sampled_from([0, 1, 4, 32, 2**31, 2**63 - 1]), max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 4, 16, 128, 2**40]), min_size=2, max_size=2),
        }), max_size=3),
    length=st.none() | st.sampled_from([0, 8, 2**31, 2**63]), behind=st.binary(max_size=16) | st.just(bytes(128)),
)  # fmt: skip
def test_any_safetensors_header_is_read_or_refused(
    tmp_path: Path, header: dict[str, Any], length: int | None, behind: bytes
) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + behind
    entry = {"method": "LayerDrop", "attention": [1], "replace": "mean"}
    plan = read(write(tmp_path / "plan", {"format": 1, "methods": [entry]}, content))
    assert plan is None or plan.methods[0].weights["attention.1.bias"].isfinite().all()


SAID = {
    "provenance": ["arank", "arguments", "curve", "data", "divergence_name", "elastic", "held_out", "layers_by",
                   "narrow", "repair", "repaired_with", "similarity", "steps", "temperature", "tokens"],
    "measured": ["quality", "routers", "speed", "task", "predictors"],
    "fingerprint": ["model_type", "layers"],
}  # fmt: skip
INNER = ["best", "curve", "dense", "divergence", "dimensions", "keep", "keep_of", "kind", "layer", "layers", "lengths",
         "name", "points", "score", "scores", "slim", "spread", "tau", "attention", "mlp", "held_out"]  # fmt: skip


@FUZZ
@given(said=st.fixed_dictionaries({
    part: st.fixed_dictionaries({}, optional=dict.fromkeys(names, JSON | st.dictionaries(
        st.sampled_from(INNER), JSON | st.lists(st.floats() | st.integers(0, 9), max_size=3), max_size=5) | st.lists(
        st.dictionaries(st.sampled_from(INNER), JSON, max_size=4), max_size=3))) for part, names in SAID.items()
}))  # fmt: skip
def test_what_a_plan_says_of_itself_is_shown_or_left_out(said: dict[str, Any]) -> None:
    plan = Plan([LayerDrop(mlp=[1]), learned()["router"]], **said)
    assert "<html" in plan_page(plan)
    console = Console(file=io.StringIO(), width=100)
    for table in (plan_table, methods_table, router_table, predictor_table, curve_table, grid_table,
                  temperature_table, narrow_table, repair_table):  # fmt: skip
        console.print(table(plan))
    console.print(comparison_table(plan.measured, "measured"))


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 100_000, "damaged"), ('{"a":' * 50 + "1" + "}" * 50, "nests deeper than 32"),
    ("\ud800".encode("utf-8", "surrogatepass"), "damaged"), ("1" * 5000, "damaged|not a plan"),
    ('{"format": true, "methods": []}', "no format number"), ('{"format": 0, "methods": []}', "no format number"),
    ('{"format": 1, "methods": {}}', "no list of objects"), ('{"format": 1}', "'methods'"),
    ('{"format": 1, "methods": [], "provenance": [["a", 1]]}', "provenance is list"),
], ids=range(9))  # fmt: skip
def test_a_document_that_is_no_plan_says_why(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=message):
        Plan.from_pretrained(tmp_path)


def test_files_that_are_larger_than_any_plan_are_not_read(tmp_path: Path) -> None:
    Plan([learned()["mean"]]).save_pretrained(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 2**34 + 1)
    with pytest.raises(PlanError, match="17,179,869,185 bytes, and a plan's has at most 17,179,869,184"):
        Plan.from_pretrained(tmp_path)
    os.truncate(tmp_path / FILE, 2**24 + 1)
    with pytest.raises(PlanError, match="16,777,217 bytes, and a plan's has at most 16,777,216"):
        Plan.from_pretrained(tmp_path)
    if hasattr(os, "mkfifo"):
        (tmp_path / FILE).unlink()
        os.mkfifo(tmp_path / FILE)
        with pytest.raises(PlanError, match="it is no file"):
            Plan.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", learned())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: str, value: float) -> None:
    method = learned()[kind]
    broken = {name: tensor.clone() for name, tensor in method.weights.items()}
    next(reversed(broken.values())).view(-1)[-1] = value
    with pytest.raises(PlanError, match="NaN or infinite"):
        dataclasses.replace(method, weights=broken)
    plan = Plan([method])
    tensors = {f"0.{name}": tensor for name, tensor in broken.items()}
    with pytest.raises(PlanError, match="NaN or infinite"):
        Plan.from_pretrained(write(tmp_path, plan.to_dict(), safetensors.torch.save(tensors)))


@pytest.mark.parametrize(("kind", "message"), [
    ("filter", "The filter of attention 1 is for a hidden size of 24, and LlamaModel has 32"),
    ("mean", "The mean of mlp 1 is for a hidden size of 24"),
    ("router", "The router of attention 1 is for a hidden size of 24"),
    ("predictor", "The predictor of layer 1 is for a hidden size of 24"),
    ("head", "The head of EarlyExit is for a hidden size of 24"),
    ("narrow", "The narrow MLP of layer 1 is for a hidden size of 24, and BertModel has 32"),
    ("delta", r"1\.mlp\.up_proj\.weight has the shape \(48, 24\), and the model's parameter \(48, 32\)"),
])  # fmt: skip
def test_what_was_learned_for_another_width_is_refused_when_patching(kind: str, message: str) -> None:
    model = tiny_model("bert" if kind == "narrow" else "llama")
    before = sorted(vars(model))
    with pytest.raises(PlanError, match=message):
        slimformer.patch(model, learned(hidden=24)[kind])
    assert sorted(vars(model)) == before
    assert slimformer.status(slimformer.patch(model, learned()[kind]))


def test_a_small_file_cannot_ask_for_a_huge_product() -> None:
    huge = {
        "1.mlp.up_proj.weight.left": torch.ones(10**6, 1),
        "1.mlp.up_proj.weight.right": torch.ones(1, 10**6),
    }
    with pytest.raises(PlanError, match=r"has the shape \(1000000, 1000000\)"):
        slimformer.patch(tiny_model("llama"), WeightDelta(huge))
    parts = BlockPredictor(32, 4, 2).tensors(1)
    parts["1.query.first.weight"] = torch.ones(10**12, 0)
    with pytest.raises(PlanError, match="do not fit each other"):
        TokenElimination({1: 0.5}, scorer="predictor", weights=parts)


@pytest.mark.parametrize("make", [
    lambda: LayerDrop(attention=3), lambda: LayerDrop(mlp="12"), lambda: LayerDrop(block=[2**40]),
    lambda: MixtureOfDepths(mlp=3), lambda: TokenElimination([0.5]), lambda: TokenElimination({"²": 0.5}),
    lambda: TokenElimination({1: 0.5}, kinds=[["mlp"]]), lambda: TokenElimination({1: 0.5}, revivable="false"),
    lambda: TokenElimination({1: 0.5}, seed="x"), lambda: TokenElimination({1: 10**400}, threshold=True),
    lambda: TempScale(10**400), lambda: TempScale(5e-324), lambda: RopeScaling("ntk", 10**400),
    lambda: RopeScaling("yarn", 2.0, parameters=["beta"]), lambda: RopeScaling("yarn", 2.0, parameters={"a": [{}]}),
    lambda: LogNScale(10**20), lambda: NarrowMlp([1], {}), lambda: EarlyExit(2**40),
    lambda: EarlyExit(1, [torch.ones(3)]), lambda: WeightDelta({"²²²²².mlp.x.added": torch.ones(3)}),
    lambda: EarlyExit(1, {"head.bias": torch.ones(3, dtype=torch.int64), "head.weight": torch.ones(3, 3)}),
], ids=range(21))  # fmt: skip
def test_fields_of_another_type_or_size_are_refused(make: Any) -> None:
    with pytest.raises(PlanError):
        make()

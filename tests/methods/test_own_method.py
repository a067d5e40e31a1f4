"""Somebody's own method: what the guide's page says of it runs, and what cannot be registered or saved is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.decisions.registry import name_of, registered
from slimformer.errors import PlanError
from slimformer.methods import Decision, Rows
from slimformer.patching import keep_ratios
from slimformer.plans.plan import FILE
from tiny_models import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own_method.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page defines, its code run from top to bottom in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("own_method")
    # Where dataclasses look their class up.
    monkeypatch.setitem(sys.modules, "own_method", module)
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), vars(module))
    return vars(module)


def test_the_page_runs_and_its_policy_has_thirty_lines(page: dict[str, Any]) -> None:
    assert len(BLOCKS[0].partition("\n\n\n")[2].strip().splitlines()) <= 30
    policy = page["QuietTokens"]
    assert registered()["quiet-tokens"] is policy
    assert name_of(policy([1], 0.5)) == "quiet-tokens"
    # Some tokens are computed, and some are not.
    model, ids = page["model"], page["ids"]
    slimformer.patch(model, policy(layers=[1, 2], least=0.15))
    with torch.no_grad():
        model(ids)
    assert all(0 < ratio < 1 for ratio in keep_ratios(model).values())
    with pytest.raises(PlanError, match="this model has the layers 0 to 3"):
        slimformer.patch(model, policy(layers=[9], least=0.15))


def test_a_prompt_and_decoding_agree_on_the_pages_policy(page: dict[str, Any]) -> None:
    model, ids = page["model"], page["ids"]
    slimformer.patch(model, page["QuietTokens"](layers=[1, 2], least=0.15))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :12], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 20)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 12:], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_takes_its_own_policy_along(page: dict[str, Any], tmp_path: Path) -> None:
    model, policy = page["model"], page["QuietTokens"](layers=[1], least=0.15)
    slimformer.patch(model, policy, LayerDrop(attention=[3])).save_pretrained(tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    slimformer.patch(loaded, "auto")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(page["ids"]).logits, model(page["ids"]).logits)


def test_where_the_class_is_not_defined_a_plan_says_how_to_register_it_and_imports_nothing(
    page: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "quiet-tokens.py").write_text("raise SystemExit('imported')")
    program = (
        "import sys; from slimformer import Plan; from slimformer.errors import PlanError; before = set(sys.modules)\n"
        "try: Plan.from_pretrained('plans/quiet')\n"
        "except PlanError as error: print(error, set(sys.modules) - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "uses the method 'quiet-tokens', which is not known here" in said
    assert "with @slimformer.register('quiet-tokens') above the class" in said
    assert "a plan imports nothing. set()" in said


def test_built_in_methods_are_registered_as_any_other() -> None:
    for name in (
        "LayerDrop",
        "TokenElimination",
        "MixtureOfDepths",
        "TempScale",
        "SelfExtend",
        "WeightDelta",
    ):
        assert registered()[name].__name__ == name
    with pytest.raises(TypeError, match="does not support item assignment"):
        registered()["LayerDrop"] = object


def no_mlp(self: Any, anatomy: Any) -> dict[Any, Decision]:
    return {(0, "mlp"): Decision(compute=False)}


def test_what_cannot_be_registered_is_refused() -> None:
    plain = type("Plain", (), {"decisions": no_mlp})
    with pytest.raises(PlanError, match="takes a dataclass"):
        slimformer.register("plain")(plain)
    with pytest.raises(PlanError, match=r"takes the name that plans save, as in .*got <class"):
        slimformer.register(plain)
    with pytest.raises(PlanError, match="is no method: it needs decisions"):
        slimformer.register("nothing")(dataclass(type("Nothing", (), {})))
    with pytest.raises(PlanError, match=r"'LayerDrop' is that of slimformer.methods.layer_drop.LayerDrop"):
        slimformer.register("LayerDrop")(dataclass(plain))
    assert not {"plain", "nothing"} & set(registered())


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    first, second = (dataclass(type("Cell", (), {"decisions": no_mlp})) for _ in range(2))
    for version in (first, second):
        slimformer.register("cell")(version)
    assert registered()["cell"] is second
    with pytest.raises(PlanError, match="Cell is not registered"):
        Plan([first()]).to_dict()


@slimformer.register("test-every-nth")
@dataclass(frozen=True)
class EveryNth:
    """Deliberately without `settings` and `tensors`: fields and weights are saved as they are."""

    apart: Mapping[str, int]
    odd: Any = None
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def decisions(self, anatomy: Any) -> dict[Any, Decision]:
        return {(int(layer), "mlp"): Decision(rows=(self.every(n),)) for layer, n in self.apart.items()}

    def every(self, n: int) -> Any:
        return lambda stream, x: Rows(x.shape[0], given_mask=stream.positions() % n == 0)


def test_fields_and_weights_survive_a_plan(tmp_path: Path) -> None:
    method = EveryNth({"1": 2}, [1, "a", None], {"w": torch.arange(3.0)})
    Plan([LayerDrop(mlp=[0]), method]).save_pretrained(tmp_path)
    loaded = Plan.from_pretrained(tmp_path).methods[1]
    assert loaded == method
    assert torch.equal(loaded.weights["w"], method.weights["w"])
    model, ids = tiny_model("llama"), torch.arange(3, 13)[None]
    slimformer.patch(model, loaded)
    with torch.no_grad():
        model(ids)
    assert keep_ratios(model) == {(1, "mlp"): 0.5}


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), torch.zeros(2)], ids=["set", "nan", "tensor"])
def test_a_field_that_json_cannot_hold_is_named_and_nothing_is_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"EveryNth\(odd=\.\.\.\) cannot be saved in a plan"):
        Plan([EveryNth({"1": 2}, value)]).save_pretrained(tmp_path / "plan")
    assert not (tmp_path / "plan" / FILE).exists()


def test_methods_are_imported_at_first_use_alone() -> None:
    names: Sequence[str] = slimformer.methods.__all__
    program = "import sys, slimformer, slimformer.methods; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert all(callable(getattr(slimformer.methods, name)) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        slimformer.methods.Nonsense  # noqa: B018

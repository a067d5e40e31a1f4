"""Scaled rotary positions are transformers' own for long texts, and nothing at all for short ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import slimformer
import slow_rows
from slimformer import LayerDrop, Plan, SelfExtend, TempScale, TokenElimination
from slimformer.errors import DataError, PlanError, UnsupportedModelError
from slimformer.methods.rope_scaling import RopeScaling
from slow_rows import arguments, error, one_thread, outputs  # noqa: F401

TRAINED = 32
# Two of the rotated channels of each tiny model are one pair.
LONGROPE = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4}
# What the method and a config say of the same thing.
SCALINGS: dict[str, tuple[RopeScaling, dict[str, Any]]] = {
    "ntk": (RopeScaling("ntk", 2.0), {"rope_type": "default", "rope_theta": 10000.0 * 2 ** (8 / 6)}),
    "ntk-3": (
        RopeScaling("ntk", 2.0, theta_factor=3.0), {"rope_type": "default", "rope_theta": 30000.0}
    ),
    "linear": (RopeScaling("linear", 2.0), {"rope_type": "linear", "factor": 2.0}),
    "dynamic": (RopeScaling("dynamic", 2.0), {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": (RopeScaling("yarn", 2.0), {"rope_type": "yarn", "factor": 2.0}),
    "yarn-fast": (
        RopeScaling("yarn", 4.0, parameters={"beta_fast": 8.0}),
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0},
    ),
    "llama3": (
        RopeScaling("llama3", 2.0),
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "longrope": (
        RopeScaling("longrope", 2.0, parameters=LONGROPE), {"rope_type": "longrope", "factor": 2.0, **LONGROPE}
    ),
}  # fmt: skip
CLOSE = 1e-5
YARN = RopeScaling("yarn", 2.0)


def small(name: str, **overrides: object) -> PreTrainedModel:
    """The small model, trained for 32 tokens."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    return slow_rows.small(name, **{"max_position_embeddings": TRAINED, **mixed, **overrides})


def configured(name: str, parameters: dict[str, Any], **more: object) -> PreTrainedModel:
    """The same model with the scaling in its config."""
    own = {"rope_theta": 10000.0, "original_max_position_embeddings": TRAINED, **parameters}
    if own["rope_type"] in ("default", "linear", "dynamic"):
        own.pop("original_max_position_embeddings")
    plain = small(name).config.rope_parameters
    own["rope_theta"] *= plain.get("full_attention", plain)["rope_theta"] / 10000.0
    mixed = {**plain, "full_attention": own} if "full_attention" in plain else own
    return small(name, rope_parameters=mixed, **more)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "modernbert", "gemma3_text"])
def test_long_texts_are_read_as_transformers_configures_it(name: str, scaling: str) -> None:
    method, parameters = SCALINGS[scaling]
    model, given = small(name), arguments(name, [(0, 64), (0, 64)], 64)
    dense, expected = outputs(model, given), outputs(configured(name, parameters), given)
    slimformer.patch(model, method)
    # Of a length in a tensor, as transformers' dynamic scaling has it, powers are rounded once more.
    assert error(outputs(model, given), expected) <= (1e-6 if scaling == "dynamic" else 0)
    assert error(expected, dense) > 1e-3


@pytest.mark.parametrize("scaling", ["linear", "ntk-3", "yarn"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "mixtral"])
def test_other_structures_too(name: str, scaling: str) -> None:
    method, parameters = SCALINGS[scaling]
    model, given = small(name), arguments(name, [(0, 61)], 61)
    slimformer.patch(model, method)
    # transformers computes no YaRN where a config's head_dim is None, as Mixtral's may be.
    assert torch.equal(outputs(model, given), outputs(configured(name, parameters, head_dim=8), given))


def test_phi3_takes_the_only_scaling_that_its_config_knows() -> None:
    model, given = small("phi3"), arguments("phi3", [(0, 61)], 61)
    slimformer.patch(model, SCALINGS["longrope"][0])
    assert torch.equal(outputs(model, given), outputs(configured("phi3", SCALINGS["longrope"][1]), given))


@pytest.mark.parametrize("name", ["phi", "gpt_neox"])
def test_partly_rotated_heads_are_scaled(name: str) -> None:
    model, given = small(name), arguments(name, [(0, 61)], 61)
    own = {**model.config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    expected = outputs(small(name, rope_parameters=own), given)
    slimformer.patch(model, RopeScaling("linear", 2.0))
    assert torch.equal(outputs(model, given), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_short_texts_are_bit_identical_whatever_ran_before(name: str, scaling: str) -> None:
    model, short = small(name), arguments(name, [(0, TRAINED), (0, TRAINED)], TRAINED)
    dense = outputs(model, short)
    slimformer.patch(model, SCALINGS[scaling][0])
    assert torch.equal(outputs(model, short), dense)
    outputs(model, arguments(name, [(0, 61), (5, 50)], 61))
    assert torch.equal(outputs(model, short), dense)


@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_an_embedding_ignores_batch_mates(name: str, scaling: str) -> None:
    model, texts = small(name), [(0, 20), (0, 40), (0, 61)]
    slimformer.patch(model, SCALINGS[scaling][0])
    given = arguments(name, texts, 61)
    together = outputs(model, given)
    for row, (_, length) in enumerate(texts):
        alone = outputs(model, {key: value[row : row + 1, :length] for key, value in given.items()})
        assert error(together[row : row + 1, :length], alone) <= CLOSE


def test_padding_in_front_without_position_ids_changes_nothing() -> None:
    model, given = slimformer.patch(small("llama"), YARN), arguments("llama", [(21, 40), (31, 30)], 61)
    given.pop("position_ids")
    together = outputs(model, given)
    for row, begin in enumerate((21, 31)):
        alone = outputs(model, {"input_ids": given["input_ids"][row : row + 1, begin:]})
        assert error(together[row : row + 1, begin:], alone) <= CLOSE


def test_steps_behind_a_long_prompt_equal_one_pass() -> None:
    model, given = slimformer.patch(small("llama"), YARN), arguments("llama", [(8, 53), (0, 61)], 61)
    mask, whole = given["attention_mask"], outputs(model, given, use_cache=False)
    cache, found = DynamicCache(config=model.config), []
    for start, end in ((0, 45), (45, 46), (46, 61)):
        step = {
            "input_ids": given["input_ids"][:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": given["position_ids"][:, start:end],
        }
        found.append(outputs(model, step, past_key_values=cache, use_cache=True))
    assert error(torch.cat(found, 1), whole, mask) <= CLOSE


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("scaling", ["dynamic", "yarn", "linear"])
def test_cached_keys_are_turned_where_a_text_outgrows_its_length(
    scaling: str, kind: type[Any], with_positions: bool
) -> None:
    model, given = (
        slimformer.patch(small("llama"), SCALINGS[scaling][0]),
        arguments("llama", [(7, 63), (20, 50)], 70),
    )
    if scaling != "dynamic":
        given = {name: value[:, :64] for name, value in given.items()}
    if not with_positions:
        given.pop("position_ids")
    end = given["input_ids"].shape[1]
    options = {"max_cache_len": 80} if kind is StaticCache else {}
    steps, whole = (kind(config=model.config, **options) for _ in range(2))
    outputs(model, given, past_key_values=whole, use_cache=True)
    bounds = [0, 30, 38, 39, 40, 41, 52, 53, *range(64, end)]
    for start, stop in zip(bounds, [*bounds[1:], end], strict=True):
        step = {name: value[:, start:stop] for name, value in given.items() if name != "attention_mask"}
        step["attention_mask"] = given["attention_mask"][:, :stop]
        outputs(model, step, past_key_values=steps, use_cache=True)
    mask = given["attention_mask"].bool()
    # Those of the first layer depend on nothing but tokens and angles.
    keys, expected = (cache.layers[0].keys[:, :, :end].transpose(1, 2)[mask] for cache in (steps, whole))
    assert error(keys, expected) <= CLOSE


def test_texts_that_outgrow_the_trained_length_are_continued_alike_alone_and_in_a_batch() -> None:
    model, given = slimformer.patch(small("llama"), YARN), arguments("llama", [(4, 24), (8, 20), (0, 28)], 28)
    given.pop("position_ids")
    options: dict[str, Any] = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    together = model.generate(**given, **options)[:, 28:]
    for row, begin in enumerate((4, 8, 0)):
        alone = model.generate(given["input_ids"][row : row + 1, begin:], **options)
        assert torch.equal(together[row], alone[0, -16:])


def test_it_composes_with_temperature_dropped_sublayers_and_elimination() -> None:
    methods = [
        TempScale(0.7),
        LayerDrop(attention=[1]),
        TokenElimination({2: 0.5}, least=8, window=3, sink=2),
    ]
    model, given = small("llama"), arguments("llama", [(8, 53), (0, 61)], 61)
    expected = outputs(
        slimformer.patch(configured("llama", SCALINGS["yarn"][1]), *methods), given, use_cache=False
    )
    slimformer.patch(model, *methods, YARN)
    assert error(outputs(model, given, use_cache=False), expected, given["attention_mask"]) <= CLOSE


def test_keys_of_eliminated_tokens_cannot_be_turned() -> None:
    model = slimformer.patch(small("llama"), TokenElimination({1: 0.5}, least=8, window=3, sink=2), YARN)
    given, cache = arguments("llama", [(0, 40)], 40), DynamicCache(config=model.config)
    outputs(model, {"input_ids": given["input_ids"][:, :30]}, past_key_values=cache, use_cache=True)
    with pytest.raises(PlanError, match="ShorterLayer cannot be turned again"):
        outputs(model, {"input_ids": given["input_ids"][:, 30:]}, past_key_values=cache, use_cache=True)


def test_undo_is_exact_and_plans_carry_it(tmp_path: Path) -> None:
    model, given = small("modernbert"), arguments("modernbert", [(0, 61), (0, 30)], 61)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    state, dense = dict(model.state_dict()), outputs(model, given)
    method = RopeScaling("longrope", 2.0, parameters=LONGROPE)
    scaled = outputs(slimformer.patch(model, method), given)
    assert list(model.state_dict()) == list(state)
    note = "text rows, RopeScaling('longrope', factor=2.0), up to 64 tokens"
    assert [layer["attention"] for layer in slimformer.status(model).values()] == [
        note,
        *["text rows"] * 2,
        note,
    ]
    Plan([method, LayerDrop(mlp=[1])]).save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).methods == (method, LayerDrop(mlp=[1]))
    assert torch.equal(outputs(slimformer.patch(model, Plan([method])), given), scaled)
    slimformer.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize(("settings", "message"), [
    ({"type": "magic", "factor": 2.0}, "one of ntk, linear"),
    ({"type": "yarn", "factor": 1.0}, "a number above 1, got 1.0"),
    ({"type": "yarn", "factor": float("nan")}, "a number above 1, got nan"),
    ({"type": "ntk", "factor": 2.0, "theta_factor": 0.5}, r"theta_factor=...\) takes a number above 1"),
    ({"type": "yarn", "factor": 2.0, "theta_factor": 3.0}, "belongs to type 'ntk'"),
    ({"type": "yarn", "factor": 2.0, "trained_length": 0}, "from 2 up"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        RopeScaling(**settings)


@pytest.mark.parametrize(("name", "methods", "kind", "message"), [
    ("bert", [YARN], UnsupportedModelError, "has no rotary_emb.*absolute_positions"),
    ("gemma2", [YARN], UnsupportedModelError, "SelfExtend leaves the latter alone"),
    ("llama", [YARN, SelfExtend(3, 8)], PlanError, "RopeScaling and SelfExtend both change positions"),
    ("llama", [RopeScaling("longrope", 2.0)], PlanError, "KeyError"),
    ("llama", [RopeScaling("longrope", 2.0, parameters={**LONGROPE, "long_factor": [1.0] * 3})], PlanError,
     "cannot compute"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    name: str, methods: list[Any], kind: type[Exception], message: str
) -> None:
    model = small(name)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        slimformer.patch(model, *methods)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


def test_models_that_are_scaled_already_and_texts_that_are_too_long_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="of the type 'yarn' by its config"):
        slimformer.patch(configured("llama", SCALINGS["yarn"][1]), YARN)
    model = slimformer.patch(small("llama"), RopeScaling("linear", 1.5))
    with pytest.raises(DataError, match=r"61 tokens, and the limit is 48.*RopeScaling\('linear', factor=2\)"):
        outputs(model, arguments("llama", [(0, 61)], 61))

"""Attention of selected queries: the kernel against its reference, and the reference against the definition."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from slimformer_kernels import KernelArgumentError, attention_rows, set_debug
from slimformer_kernels.attention_rows import attention_rows_op
from slimformer_kernels.attention_rows_reference import _padded, _seen, attention_rows_reference

# Keys of each sequence: whole, padded on the left, padded on the right, or behind each other without padding.
LAYOUTS = ["whole", "left", "right", "packed"]
# Which of its tokens a sequence asks for; "holes" leaves one sequence without a query.
KINDS = ["all", "some", "one", "holes", "last"]
RULES = {
    "causal": (True, None, None),
    "bidirectional": (False, None, None),
    "causal window": (True, 7, None),
    "bidirectional window": (False, 5, None),
    "softcap": (True, None, 2.0),
    "everything": (True, 9, 3.0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
kinds = pytest.mark.parametrize("kind", KINDS)
rules = pytest.mark.parametrize("rule", RULES)
# To compile takes seconds.
COMPILED = ("causal", "bidirectional window", "everything")
# NumPy says so in the interpreter; the infinities are meant, they stand for keys that are not seen.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.fixture
def dot_dtype(dtype, interpreted):
    """The dtypes whose products can be tested here."""
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    return dtype


def setting(layout, kind, heads, kv_heads, width, keys, device="cpu", dtype=torch.float32, index=torch.int64):
    """Query, key, value and the index tensors of three sequences, by the names of ``attention_rows``."""
    lengths = [keys, keys // 2 + 1, keys - 2] if layout != "whole" else [keys] * 3
    if layout == "packed":
        starts = [3, 3 + lengths[0], 3 + lengths[0] + lengths[1]]
        shape = (1, sum(lengths) + 5, kv_heads, width)
    else:
        starts = [keys - n if layout == "left" else 0 for n in lengths]
        shape = (3, keys, kv_heads, width)
    chosen = []
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = {"all": length, "one": 1, "last": 1}.get(kind, (length + 1) // 2)
        if kind == "holes" and b == 1:
            count = 0
        picked = (
            torch.randperm(length)[:count].sort().values if kind != "last" else torch.tensor([length - 1])
        )
        chosen.append(start + picked)
    counts = torch.tensor([len(c) for c in chosen])
    tensors = {
        "query": torch.randn(int(counts.sum()), heads, width).to(dtype),
        "key": torch.randn(shape).to(dtype),
        "value": torch.randn(shape).to(dtype),
        "positions": torch.cat(chosen).to(index),
        "query_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(index),
        "key_ranges": torch.tensor([[s, s + n] for s, n in zip(starts, lengths, strict=True)]).to(index),
    }
    return {name: t.to(device) for name, t in tensors.items()} | {"longest": int(counts.max())}


def arguments(given, rule, scale=0.3):
    causal, window, softcap = RULES[rule]
    return given | {"causal": causal, "scale": scale, "window": window, "softcap": softcap}


def order(given):
    """The arguments in the order of the operator."""
    names = ("query", "key", "value", "positions", "query_offsets", "key_ranges", "longest")
    return tuple(given[n] for n in (*names, "causal", "scale", "window", "softcap"))


def one_by_one(query, key, value, positions, query_offsets, key_ranges, causal, scale, window, softcap, **_):
    """The definition in float64, one query at a time, with the mask functions of transformers."""
    if window is None:
        sees = causal_mask_function if causal else lambda batch, head, q, k: True
    elif causal:
        sees = sliding_window_causal_mask_function(window)
    else:
        sees = sliding_window_bidirectional_mask_function(window)
    group = query.shape[1] // key.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b, (start, end) in enumerate(key_ranges.tolist()):
        home = b if key.shape[0] > 1 else 0
        for i in range(int(query_offsets[b]), int(query_offsets[b + 1])):
            position = positions[i].long()
            seen = [j for j in range(start, end) if bool(sees(0, 0, position, torch.tensor(j)))]
            if not seen:
                continue
            keys, values = (t[home, seen].double().repeat_interleave(group, 1) for t in (key, value))
            scores = torch.einsum("hd,jhd->hj", query[i].double(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values)
    return out


@pytest.mark.full(2)
@layouts
@kinds
@rules
def test_reference_is_the_definition(layout, kind, rule):
    given = arguments(setting(layout, kind, 4, 2, 8, 19), rule)
    expected = one_by_one(**given)
    torch.testing.assert_close(attention_rows(**given).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [r if r in COMPILED else pytest.param(r, marks=pytest.mark.full) for r in RULES]
)
def test_one_graph_without_values_on_the_host_gives_the_same(rule):
    torch.compiler.reset()
    compiled = torch.compile(attention_rows, fullgraph=True, backend="aot_eager", dynamic=True)
    for layout, kind in (("left", "some"), ("whole", "holes"), ("packed", "all")):
        given = arguments(setting(layout, kind, 4, 2, 8, 19), rule)
        torch.testing.assert_close(compiled(**given), attention_rows(**given))


@pytest.mark.full(2)
@rules
@kinds
@layouts
def test_padded_sequences_give_the_same_and_the_same_gradients(layout, kind, rule):
    given = setting(layout, kind, 4, 2, 8, 9)
    outside = torch.ones(given["key"].shape[:2], dtype=torch.bool)
    for b, (start, end) in enumerate(given["key_ranges"].tolist()):
        outside[b if len(outside) > 1 else 0, start:end] = False
    causal, window, softcap = RULES[rule]
    gradients, outs = [], []
    for padded in (False, True):
        inputs = [given[name].clone().requires_grad_() for name in ("query", "key", "value")]
        if padded:
            inputs[2].data[outside] = math.nan
            counts = given["query_offsets"].diff()
            ranges = given["key_ranges"].repeat_interleave(counts, 0)
            bounds = _seen(given["positions"], ranges[:, 0], ranges[:, 1], causal, window)
            numbers = (counts, int(counts.max()), int(given["key_ranges"].diff(dim=1).max()))
            out = _padded(*inputs, given["key_ranges"], *bounds, *numbers, 0.3, softcap)
        else:
            rules = (given["longest"], causal, 0.3, window, softcap)
            out = attention_rows_reference(
                *inputs, given["positions"], given["query_offsets"], given["key_ranges"], *rules
            )
        outs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(outs[1], outs[0])
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected)


@layouts
@pytest.mark.parametrize("rule", ["causal", "bidirectional window", "softcap"])
def test_reference_is_the_same_in_small_pieces(layout, rule, monkeypatch):
    given = arguments(setting(layout, "some", 4, 2, 8, 19), rule)
    expected = attention_rows(**given)
    module = importlib.import_module("slimformer_kernels.attention_rows_reference")
    for scores, queries in ((2**26, 3), (4 * 19 * 2, 256), (1, 256)):
        monkeypatch.setattr(module, "_REFERENCE_SCORES", scores)
        monkeypatch.setattr(module, "_REFERENCE_QUERIES", queries)
        torch.testing.assert_close(attention_rows(**given), expected)


@pytest.mark.full(2)
@layouts
@kinds
@rules
def test_kernel_matches_the_reference(layout, kind, rule, device, poisoned, check_close):
    given = arguments(setting(layout, kind, 4, 2, 16, 41, device), rule)
    with poisoned():
        got = attention_rows_op(*order(given))
    check_close(got, attention_rows_reference(**given))


@pytest.mark.full(2)
@pytest.mark.parametrize("rule", ["causal", "bidirectional", "everything"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "keys"), [(1, 1, 64, 1), (6, 2, 24, 150), (2, 1, 80, 130), (3, 3, 128, 65)]
)
def test_shapes_and_dtypes(heads, kv_heads, width, keys, rule, device, dot_dtype, poisoned, check_close):
    layout, kind = ("whole", "all") if keys < 3 else ("left", "some")
    given = setting(layout, kind, heads, kv_heads, width, keys, device, dot_dtype, torch.int32)
    given = arguments(given, rule, width**-0.5)
    with poisoned():
        got = attention_rows_op(*order(given))
    check_close(got, attention_rows_reference(**given))


@pytest.mark.parametrize("window", [1, 64, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_around_the_tile_size(window, causal, device, poisoned, check_close):
    given = setting("right", "all", 1, 1, 16, 300, device, torch.float16)
    given |= {"causal": causal, "scale": 0.3, "window": window, "softcap": None}
    with poisoned():
        got = attention_rows_op(*order(given))
    check_close(got, attention_rows_reference(**given))


def test_far_apart_queries_with_a_window(device, poisoned, check_close):
    given = setting("whole", "all", 1, 1, 16, 400, device)
    rows = torch.tensor([0, 1, 399, 400, 700, 1199], device=device)
    given["query"], given["positions"] = given["query"][rows], given["positions"][rows]
    given["query_offsets"], given["longest"] = torch.tensor([0, 3, 5, 6], device=device), 3
    for rule in ("causal window", "bidirectional window"):
        with poisoned():
            got = attention_rows_op(*order(arguments(given, rule)))
        check_close(got, attention_rows_reference(**arguments(given, rule)))


def test_cache_is_read_where_it_lies(device, poisoned, check_close):
    """New queries behind cached keys: a transposed view of [batch, kv_heads, keys, head_dim], longer than used."""
    cache = torch.randn(2, 2, 2, 90, 40, device=device)
    key, value = cache[0, :, :, :70, :32].transpose(1, 2), cache[1, :, :, :70, 3:35].transpose(1, 2)
    query = torch.randn(10, 4, 3 * 32, device=device)[..., 32:64]
    given = arguments(
        {
            "query": query,
            "key": key,
            "value": value,
            "positions": torch.arange(65, 70, device=device).repeat(2),
            "query_offsets": torch.tensor([0, 99, 5, 99, 10], device=device)[::2],
            "key_ranges": torch.tensor([[0, 12], [70, 70]], device=device).T,
            "longest": 5,
        },
        "causal",
    )
    with poisoned():
        got = attention_rows_op(*order(given))
    check_close(got, attention_rows_reference(**given))
    packed = given | {name: t.contiguous() for name, t in given.items() if isinstance(t, torch.Tensor)}
    check_close(got, attention_rows_reference(**packed))


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_that_sees_nothing_gets_zeros(causal, device, poisoned):
    given = setting("left", "all", 2, 1, 16, 20, device)
    # Padding queries on the left: none of the keys of their sequence lies before them.
    given["positions"] = given["positions"] - 15
    given["positions"][:20] = torch.arange(20, device=device)
    given["key_ranges"][0] = torch.tensor([6, 20], device=device)
    given["key_ranges"][2] = 4
    given |= {"causal": causal, "scale": 0.3, "window": None, "softcap": None}
    expected = attention_rows_reference(**given)
    with poisoned():
        got = attention_rows_op(*order(given))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool((got[:6] == 0).all()) is causal
    assert not got[-18:].any()
    assert bool(expected.isfinite().all())


def test_keys_outside_the_ranges_may_hold_anything(device, check_close):
    given = arguments(setting("packed", "some", 2, 1, 16, 40, device), "bidirectional")
    expected = attention_rows_reference(**given)
    for tensor in (given["key"], given["value"]):
        tensor[:, :3] = tensor[:, -2:] = math.nan
    check_close(attention_rows_op(*order(given)), expected)
    check_close(attention_rows_reference(**given), expected)


def test_no_queries_and_a_generous_bound(device, poisoned, check_close):
    given = arguments(setting("right", "some", 2, 1, 16, 40, device), "causal")
    expected = attention_rows_reference(**given)
    with poisoned():
        got = attention_rows_op(*order(given | {"longest": 200}))
    check_close(got, expected)
    nothing = given | {
        "query": given["query"][:0],
        "positions": given["positions"][:0],
        "query_offsets": torch.zeros(4, dtype=torch.long, device=device),
        "longest": 0,
    }
    assert attention_rows_op(*order(nothing)).shape == (0, 2, 16)
    assert attention_rows_reference(**nothing).shape == (0, 2, 16)


def test_large_scores_do_not_overflow(device, dot_dtype, check_close):
    given = arguments(setting("whole", "some", 1, 1, 16, 40, device, dot_dtype), "causal", 100.0)
    check_close(attention_rows_op(*order(given)), attention_rows_reference(**given))


def test_operator_changes_nothing(device, interpreted):
    given = arguments(setting("right", "some", 2, 1, 16, 20, device), "everything")
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    torch.library.opcheck(attention_rows_op.registered, order(given), **tests)


WRONG = {
    "query is four-dimensional": ({"query": torch.zeros(1, 2, 4, 8)}, "query has the wrong dimensions"),
    "query is transposed": ({"query": torch.zeros(6, 8, 4).mT}, "last dimension of query"),
    "query holds integers": ({"query": torch.zeros(6, 4, 8).int()}, "query must hold floating"),
    "key has no keys": ({"key": torch.zeros(2, 0, 2, 8)}, "key has the wrong dimensions.*at least one key"),
    "key has another dtype": ({"key": torch.zeros(2, 9, 2, 8).half()}, "different dtypes"),
    "value is shorter": ({"value": torch.zeros(2, 8, 2, 8)}, r"value.*\(2, 8, 2, 8\).*\(2, 9, 2, 8\)"),
    "heads do not divide": ({"query": torch.zeros(6, 3, 8)}, "multiple.*3 and 2"),
    "heads differ in width": ({"query": torch.zeros(6, 4, 16)}, "16 and 8"),
    "positions are floats": ({"positions": torch.zeros(6)}, r"positions must hold int.*positions\.long\(\)"),
    "positions are fewer": ({"positions": torch.zeros(5).long()}, r"positions.*\(5,\).*\(6,\)"),
    "offsets are fewer": ({"query_offsets": torch.tensor([0, 6])}, r"query_offsets.*\(2,\).*\(3,\)"),
    "ranges are flat": ({"key_ranges": torch.tensor([0, 9])}, "a start and an end per sequence"),
    "ranges are three": (
        {"key_ranges": torch.zeros(3, 2).long(), "query_offsets": torch.tensor([0, 2, 4, 6])},
        "2 sequences of keys and 3 ranges",
    ),
    "another device": ({"key_ranges": torch.zeros(2, 2).long().to("meta")}, "different devices"),
    "longest is negative": ({"longest": -1}, "longest must not be negative"),
    "scale is negative": ({"scale": -1.0}, "scale must be positive"),
    "window is zero": ({"window": 0}, "window must be positive"),
    "softcap is zero": ({"softcap": 0.0}, "softcap must be positive"),
}

WRONG_VALUES = {
    "offsets do not end": ({"query_offsets": torch.tensor([0, 3, 5])}, "query_offsets must ascend.*0 to 5"),
    "offsets descend": ({"query_offsets": torch.tensor([0, 7, 6])}, "query_offsets must ascend"),
    "longest is too small": ({"longest": 2}, "longest.*got 2.*at least 3"),
    "ranges point outside": ({"key_ranges": torch.tensor([[0, 9], [0, 10]])}, "key_ranges points outside"),
    "positions point outside": ({"positions": torch.tensor([0, 1, 2, 0, 1, 9])}, "0 to 9.*0 to 8"),
}


def good():
    return {
        "query": torch.zeros(6, 4, 8),
        "key": torch.zeros(2, 9, 2, 8),
        "value": torch.zeros(2, 9, 2, 8),
        "positions": torch.tensor([0, 1, 2, 0, 4, 8]),
        "query_offsets": torch.tensor([0, 3, 6]),
        "key_ranges": torch.tensor([[0, 9], [0, 9]]),
        "longest": 3,
        "causal": True,
        "scale": 1.0,
    }


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_refused(case):
    change, message = WRONG[case]
    with pytest.raises(KernelArgumentError, match=message):
        attention_rows(**good() | change)


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_debugging_checks_values(case):
    change, message = WRONG_VALUES[case]
    set_debug(True)
    try:
        attention_rows(**good())
        with pytest.raises(KernelArgumentError, match=message):
            attention_rows(**good() | change)
    finally:
        set_debug(False)

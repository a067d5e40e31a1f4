"""SelfExtend: the reference against the definition, pair by pair, and the kernel against the reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from slimformer_kernels import KernelArgumentError
from slimformer_kernels.self_extend import self_extend, self_extend_op
from slimformer_kernels.self_extend_decode import self_extend_decode_op
from slimformer_kernels.self_extend_reference import far_turns, self_extend_reference, turned_further

# Keys of each sequence: whole, padded on the left, padded on the right, or behind each other without padding.
LAYOUTS = ["whole", "left", "right", "packed"]
# Which of its tokens a sequence asks for; "holes" leaves one sequence without a query.
KINDS = ["all", "some", "one", "holes", "last"]
# Group, window, trained length, softcap: a group that divides the window, and groups that do not.
RULES = {
    "everything extended": (2, 4, 0, None),
    "odd": (3, 7, 0, None),
    "one group": (50, 5, 0, None),
    "smallest window": (3, 1, 0, None),
    "some extended": (3, 7, 23, None),
    "nothing extended": (3, 7, 500, None),
    "softcap": (2, 9, 11, 2.0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Every rule with every layout, and each kind with each of the two somewhere.
cases = pytest.mark.parametrize(("layout", "kind", "rule"), [
    (layout, KINDS[(2 * number + at) % len(KINDS)], rule)
    for at, layout in enumerate(LAYOUTS) for number, rule in enumerate(RULES)
])  # fmt: skip
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
# NumPy says so in the interpreter; the infinities are meant, they stand for keys that are not seen.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.fixture
def dot_dtype(dtype, interpreted):
    """The dtypes whose products can be tested here."""
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    return dtype


def setting(layout, kind, heads, kv_heads, width, keys, device="cpu", dtype=torch.float32, rotary=None):
    """The tensors of three sequences by the names of ``self_extend``, rotated to their places."""
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
    half = (width if rotary is None else rotary) // 2
    tensors = {
        "query": torch.randn(int(counts.sum()), heads, width).to(dtype),
        "key": torch.randn(shape).to(dtype),
        "value": torch.randn(shape).to(dtype),
        "inv_freq": 1.0 / 100.0 ** (torch.arange(half) / half),
        "positions": torch.cat(chosen),
        "query_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        "key_ranges": torch.tensor([[s, s + n] for s, n in zip(starts, lengths, strict=True)]),
    }
    return {name: t.to(device) for name, t in tensors.items()} | {"longest": int(counts.max())}


def arguments(given, rule, causal, scale=0.3):
    group, window, trained, softcap = RULES[rule]
    more = {"group": group, "window": window, "trained": trained, "softcap": softcap}
    return given | more | {"causal": causal, "scale": scale}


def order(given):
    """The arguments in the order of the operator."""
    where = [given[n] for n in ("positions", "query_offsets", "key_ranges")]
    rules = [given[n] for n in ("group", "window", "causal")]
    turns = far_turns(given["inv_freq"], given["group"], given["key"].shape[1], False)
    turned = turned_further(given["query"], given["key"], given["inv_freq"], turns, *where, *rules, False)
    numbers = [given[n] for n in ("longest", "causal", "scale", "window", "trained", "softcap")]
    return given["query"], given["key"], given["value"], *turned, *where, *numbers


def decode_order(given, dtype=torch.float32, interleaved=False):
    """The arguments in the order of the operator for a few queries."""
    turns = far_turns(given["inv_freq"], given["group"], given["key"].shape[1], interleaved, dtype)
    where = [given[n] for n in ("positions", "query_offsets", "key_ranges")]
    numbers = [given[n] for n in ("longest", "scale", "group", "window", "trained", "softcap")]
    inputs = [given[n] for n in ("query", "key", "value", "inv_freq")]
    return *inputs, *turns, *where, *numbers, interleaved


def relative(m, n, group, window):
    """The published rule, mirrored for keys ahead."""
    if abs(m - n) < window:
        return m - n
    shift = window - window // group
    return m // group - n // group + (shift if m > n else -shift)


def one_by_one(
    query, key, value, inv_freq, positions, query_offsets, key_ranges, causal, scale, group, window, **more
):
    """The definition in float64: a query is turned to the relative position of each key, which is not turned at all."""
    kv = query.shape[1] // key.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    theta, half = inv_freq.double(), inv_freq.shape[0]

    def turn(x, by):
        cos, sin = (by * theta).cos(), (by * theta).sin()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    for b, (start, end) in enumerate(key_ranges.tolist()):
        home = b if key.shape[0] > 1 else 0
        for i in range(int(query_offsets[b]), int(query_offsets[b + 1])):
            m = int(positions[i]) - start
            seen = range(min(m + 1, end - start) if causal else end - start)
            extended = m >= more["trained"] if causal else end - start > more["trained"]
            by = torch.tensor([relative(m, n, group, window) if extended else m - n for n in seen])[
                :, None, None
            ]
            back = -torch.tensor(list(seen))[:, None, None]
            keys = turn(key[home, start : start + len(seen)].double(), back).repeat_interleave(kv, 1)
            raw = turn(query[i].double(), -m).expand(len(seen), -1, -1)
            scores = (turn(raw, by) * keys).sum(-1).T * scale
            if more["softcap"] is not None:
                scores = more["softcap"] * torch.tanh(scores / more["softcap"])
            values = value[home, start : start + len(seen)].double().repeat_interleave(kv, 1)
            out[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_the_published_example(causal):
    """Ten tokens, window 4, groups of 2; scores are the sine of the relative position, and say which it is."""
    place, angle = torch.arange(10.0), 0.2
    turned = torch.stack([(place * angle).cos(), (place * angle).sin()], -1)[:, None]
    # A query a quarter turn ahead of the keys.
    query = torch.stack([turned[..., 1], -turned[..., 0]], -1)
    given = {
        "key": turned[None],
        "value": torch.eye(10)[None, :, None].expand(1, 10, 1, 10)[..., :2],
        "inv_freq": torch.tensor([angle]),
        "query_offsets": torch.tensor([0, 10]),
        "key_ranges": torch.tensor([[0, 10]]),
    }
    rules = {"causal": causal, "scale": 1.0, "group": 2, "window": 4, "longest": 10}
    weights = []
    for column in range(0, 10, 2):
        values = torch.zeros(1, 10, 1, 2)
        values[0, column, 0, 0] = values[0, column + 1, 0, 1] = 1.0
        weights.append(self_extend(query, **given | {"value": values}, **rules, positions=torch.arange(10)))
    logits = torch.cat(weights, -1)[:, 0].log()
    found = torch.asin((logits - logits.diagonal()[:, None]).clamp(-1, 1)) / angle
    assert found[9].round().tolist() == [6, 6, 5, 5, 4, 4, 3, 2, 1, 0]
    torch.testing.assert_close(found[9], found[9].round(), atol=1e-3, rtol=0)
    if not causal:
        assert found[0].round().abs().tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
        assert bool((found[0, 1:] < 0).all())


@pytest.mark.full(2)
@cases
@directions
def test_reference_is_the_definition(layout, kind, causal, rule):
    given = arguments(setting(layout, kind, 4, 2, 8, 29, rotary=6), rule, causal)
    torch.testing.assert_close(self_extend(**given).double(), one_by_one(**given), rtol=1e-4, atol=1e-5)


def test_interleaved_pairs_are_those_of_permuted_channels():
    given = arguments(setting("left", "all", 2, 1, 8, 29), "odd", True)
    order_of = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    expected = self_extend(**given)
    mixed = {name: given[name][..., order_of] for name in ("query", "key")}
    torch.testing.assert_close(self_extend(**given | mixed, interleaved=True), expected)


@layouts
@directions
def test_reference_is_the_same_in_small_pieces(layout, causal, monkeypatch):
    given = arguments(setting(layout, "some", 4, 2, 8, 41), "some extended", causal)
    expected = self_extend(**given)
    module = importlib.import_module("slimformer_kernels.self_extend_reference")
    for scores, queries in ((2**26, 3), (1, 128), (4 * 41 * 2, 128)):
        monkeypatch.setattr(module, "_REFERENCE_SCORES", scores)
        monkeypatch.setattr(module, "_REFERENCE_QUERIES", queries)
        torch.testing.assert_close(self_extend(**given), expected)


def test_gradients_flow_through_the_reference():
    given = arguments(setting("left", "some", 2, 1, 4, 7), "softcap", True) | {"window": 2, "trained": 4}
    given = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in given.items()}
    inputs = [given.pop(name).requires_grad_() for name in ("query", "key", "value")]
    assert torch.autograd.gradcheck(lambda q, k, v: self_extend(q, k, v, **given), inputs)


@pytest.mark.full(2)
@cases
@directions
def test_kernel_matches_the_reference(layout, kind, causal, rule, device, poisoned, check_close):
    given = order(arguments(setting(layout, kind, 4, 2, 16, 100, device), rule, causal))
    with poisoned():
        got = self_extend_op(*given)
    check_close(got, self_extend_reference(*given))


@pytest.mark.full(2)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "keys"), [(1, 1, 64, 1), (6, 2, 24, 150), (2, 1, 80, 130), (3, 3, 128, 65)]
)
@directions
def test_shapes_and_dtypes(heads, kv_heads, width, keys, causal, device, dot_dtype, poisoned, check_close):
    layout, kind = ("whole", "all") if keys < 3 else ("left", "some")
    given = setting(layout, kind, heads, kv_heads, width, keys, device, dot_dtype)
    given = order(arguments(given, "some extended", causal, width**-0.5))
    with poisoned():
        got = self_extend_op(*given)
    check_close(got, self_extend_reference(*given))


@pytest.mark.parametrize("window", [1, 63, 64, 129, 200])
@directions
def test_windows_around_the_tile_size(window, causal, device, poisoned, check_close):
    given = arguments(setting("right", "all", 1, 1, 16, 300, device, torch.float16), "odd", causal)
    given = order(given | {"window": window})
    with poisoned():
        got = self_extend_op(*given)
    check_close(got, self_extend_reference(*given))


@pytest.mark.full(1)
@cases
def test_decode_kernel_matches_the_reference(layout, kind, rule, device, poisoned, check_close):
    given = setting(layout, kind, 4, 2, 24, 300, device, rotary=20)
    rows = min(int(given["query_offsets"].diff().max()), 8)
    # The last few queries of each sequence.
    kept = [
        torch.arange(max(int(a), int(b) - rows), int(b)) for a, b in given["query_offsets"].unfold(0, 2, 1)
    ]
    counts = torch.tensor([0, *map(len, kept)], device=device)
    chosen = torch.cat(kept).to(device)
    given |= {"query": given["query"][chosen], "positions": given["positions"][chosen], "longest": rows}
    given = arguments(given | {"query_offsets": counts.cumsum(0)}, rule, True)
    with poisoned():
        got = self_extend_decode_op(*decode_order(given))
    check_close(got, self_extend_reference(*order(given)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "keys"),
    [(1, 1, 64, 1), (6, 2, 24, 150), (9, 3, 64, 333), (32, 8, 128, 65)],
)
def test_decode_shapes_and_dtypes(heads, kv_heads, width, keys, device, dot_dtype, poisoned, check_close):
    given = setting("left" if keys > 2 else "whole", "last", heads, kv_heads, width, keys, device, dot_dtype)
    given = arguments(given, "odd", True, width**-0.5)
    table = torch.float32 if dot_dtype is torch.float32 else torch.float16
    with poisoned():
        got = self_extend_decode_op(*decode_order(given, table))
    check_close(got, self_extend_reference(*order(given)))


def test_decode_of_interleaved_pairs(device, poisoned, check_close):
    given = arguments(setting("left", "last", 4, 2, 32, 200, device), "odd", True)
    order_of = torch.tensor([*range(0, 32, 2), *range(1, 32, 2)], device=device).argsort()
    mixed = {name: given[name][..., order_of] for name in ("query", "key")}
    with poisoned():
        got = self_extend_decode_op(*decode_order(given | mixed, interleaved=True))
    check_close(got, self_extend_reference(*order(given)))


def test_cache_is_read_where_it_lies(device, poisoned, check_close):
    """New queries behind cached keys: a transposed view of [batch, kv_heads, keys, head_dim], longer than used."""
    cache = torch.randn(2, 2, 2, 90, 40, device=device)
    key, value = cache[0, :, :, :70, :32].transpose(1, 2), cache[1, :, :, :70, 3:35].transpose(1, 2)
    given = {
        "query": torch.randn(10, 4, 3 * 32, device=device)[..., 32:64],
        "key": key,
        "value": value,
        "inv_freq": torch.rand(16, device=device),
        "positions": torch.arange(65, 70, device=device).repeat(2),
        "query_offsets": torch.tensor([0, 99, 5, 99, 10], device=device)[::2],
        "key_ranges": torch.tensor([[0, 12], [70, 70]], device=device).T,
        "longest": 5,
    }
    given = arguments(given, "odd", True)
    expected = self_extend_reference(*order(given))
    with poisoned():
        check_close(self_extend_op(*order(given)), expected)
        check_close(self_extend_decode_op(*decode_order(given)), expected)


@directions
def test_a_query_that_sees_nothing_gets_zeros(causal, device, poisoned):
    given = arguments(setting("left", "all", 2, 1, 16, 20, device), "odd", causal)
    # Padding queries on the left: none of the keys of their sequence lies before them.
    given["positions"] = given["positions"].clone()
    given["positions"][:20] = torch.arange(20, device=device)
    given["key_ranges"][0] = torch.tensor([6, 20], device=device)
    given["key_ranges"][2] = 4
    with poisoned():
        got = self_extend_op(*order(given))
    assert bool((got[:6] == 0).all()) is causal
    assert not got[-18:].any()
    torch.testing.assert_close(got, self_extend_reference(*order(given)), rtol=1e-5, atol=1e-5)
    if causal:
        with poisoned():
            few = self_extend_decode_op(*decode_order(given))
        torch.testing.assert_close(few, got, rtol=1e-5, atol=1e-5)


def test_empty_inputs_and_too_many_programs(device, poisoned, check_close):
    given = arguments(setting("right", "some", 2, 1, 16, 40, device), "odd", True)
    expected = self_extend_reference(*order(given))
    with poisoned():
        got = self_extend_op(*order(given | {"longest": 200}))
    check_close(got, expected)
    nothing = given | {
        "query": given["query"][:0],
        "positions": given["positions"][:0],
        "query_offsets": torch.zeros(4, dtype=torch.long, device=device),
        "longest": 0,
    }
    assert self_extend_op(*order(nothing)).shape == (0, 2, 16)
    assert self_extend(**nothing).shape == (0, 2, 16)


def test_operator_changes_nothing(device, interpreted):
    given = arguments(setting("right", "some", 2, 1, 16, 20, device), "softcap", True)
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    torch.library.opcheck(self_extend_op.registered, order(given), **tests)
    torch.library.opcheck(self_extend_decode_op.registered, decode_order(given), **tests)


def test_turns_may_be_kept_for_more_places_than_there_are_keys():
    given = arguments(setting("left", "some", 4, 2, 8, 29), "odd", True)
    turns = far_turns(given["inv_freq"], given["group"], 64, False)
    assert torch.equal(self_extend(**given, turns=turns), self_extend(**given))


@pytest.mark.parametrize(("change", "message"), [
    ({"group": 0}, "group must be positive"),
    ({"window": 0}, "window must be positive"),
    ({"scale": math.nan}, "scale must be positive"),
    ({"softcap": 0.0}, "softcap must be positive"),
    ({"trained": -1}, "trained must not be negative"),
    ({"inv_freq": torch.zeros(9)}, r"inv_freq does not fit query.*\(9,\)"),
    ({"inv_freq": torch.zeros(2).int()}, "inv_freq must hold floating"),
    ({"turns": (torch.zeros(28, 8), torch.zeros(28, 8))}, r"cos of turns does not fit.*\(28, 8\).*at least 29 places"),
    ({"positions": torch.zeros(2).long()}, "positions has the wrong shape"),
    ({"key": torch.zeros(3, 29, 3, 8)}, "value has the wrong shape"),
])  # fmt: skip
def test_wrong_argument_is_refused(change, message):
    given = arguments(setting("left", "all", 4, 2, 8, 29), "odd", True)
    with pytest.raises(KernelArgumentError, match=message):
        self_extend(**given | change)

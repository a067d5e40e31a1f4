"""What only a GPU can show: dispatch, compiled graphs, CUDA graphs, and offsets beyond 2**31."""

from __future__ import annotations

import pytest
import torch

import slimformer_kernels as kernels
from slimformer_kernels.dispatch import runs_kernel


def inputs(device, dtype=torch.bfloat16):
    x = torch.randn(300, 576, device=device).to(dtype)
    rows = torch.arange(0, 300, 3, device=device)
    y = torch.randn(100, 576, device=device).to(dtype)
    return x, rows, y, torch.randn(576, device=device).to(dtype)


def attention_inputs(device, dtype, *, width=128, packed=False):
    """Half of the tokens of three sequences as queries, heads in groups of four, keys in a cache's layout."""
    lengths = torch.tensor([700, 1300, 1024])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]) if packed else 1300 - lengths
    cache = torch.randn(2, 1 if packed else 3, 2, 3100 if packed else 1300, width)
    rows = [
        start + torch.randperm(n)[: n // 2].sort().values for start, n in zip(starts, lengths, strict=False)
    ]
    counts = torch.tensor([len(r) for r in rows])
    key, value = cache.to(device, dtype).transpose(2, 3)
    given = {
        "positions": torch.cat(rows),
        "query_offsets": torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        "key_ranges": torch.stack([starts[:3], starts[:3] + lengths], dim=1),
    }
    query = torch.randn(int(counts.sum()), 8, width).to(device, dtype)
    return (query, key, value), {name: t.to(device) for name, t in given.items()} | {"longest": 700}


def step(x, rows, y, weight):
    """Every row function and a gated activation, as one sublayer would use them."""
    h = kernels.rms_norm_rows(x, rows, weight, 1e-6)
    kernels.add_rows_(x, rows, kernels.swiglu_packed(torch.cat([h, y], dim=-1)))
    return kernels.add_rows_rms_norm_(x, rows, y, weight, 1e-6, offset=1.0)


def test_public_functions_take_the_kernel_unless_a_gradient_flows(gpu):
    x = torch.randn(4, 4, device=gpu)
    assert runs_kernel(x)
    assert not runs_kernel(x.double())
    assert not runs_kernel(x.cpu())
    x.requires_grad_()
    assert not runs_kernel(x)
    with torch.no_grad():
        assert runs_kernel(x)
    weight = torch.ones(4, device=gpu, requires_grad=True)
    kernels.rms_norm_rows(x, None, weight, 1e-6).sum().backward()
    assert weight.grad is not None


def test_compiled_graph_gives_the_same(gpu, check_close):
    x, rows, y, weight = inputs(gpu)
    residual = x.clone()
    expected = step(residual, rows, y, weight)
    got = torch.compile(step, fullgraph=True)(x, rows, y, weight)
    check_close(got, expected)
    check_close(x, residual)


def test_compiled_graph_takes_rows_of_unknown_count(gpu, check_close):
    def keep_positive(x, weight, score):
        return kernels.rms_norm_rows(x, (score > 0).nonzero().squeeze(1), weight, 1e-6)

    x, _, _, weight = inputs(gpu)
    score = torch.randn(300, device=gpu)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(keep_positive, fullgraph=True)
        for values in (score, score.abs() + 1, -score.abs()):
            check_close(compiled(x, weight, values), keep_positive(x, weight, values))


def test_cuda_graph_replays(gpu, check_close):
    x, rows, y, weight = inputs(gpu)
    start = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, rows, y, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, rows, y, weight)
    x.copy_(start)
    graph.replay()
    expected = step(start, rows, y, weight)
    check_close(out, expected)
    check_close(x, start)


@pytest.mark.parametrize("device_index", [0, 1])
def test_kernels_run_on_the_device_of_their_input(gpu, device_index, check_close):
    if device_index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    cpu = inputs("cpu", torch.float32)
    moved = [t.to(f"cuda:{device_index}") for t in cpu]
    check_close(step(*moved).cpu(), step(*cpu))


def test_offsets_beyond_31_bits(gpu, check_close):
    width = 4096
    tokens = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 5 * tokens * width:
        pytest.skip("needs 11 GB of free GPU memory")
    x = torch.zeros(tokens, width, device=gpu, dtype=torch.bfloat16)
    rows = torch.tensor([0, tokens - 2, tokens - 1], device=gpu)
    y, weight = torch.randn(3, width, device=gpu).bfloat16(), torch.ones(width, device=gpu).bfloat16()
    kernels.add_rows_(x, rows, y)
    check_close(x[rows], y)
    norm = kernels.rms_norm_rows(y, None, weight, 1e-6)
    check_close(kernels.rms_norm_rows(x, rows, weight, 1e-6), norm)
    check_close(kernels.rms_norm_rows(x, None, weight, 1e-6)[rows], norm)
    assert not x[1:-2].any()


def test_pooled_scores_of_a_long_prompt(gpu, check_close):
    q = torch.randn(1, 8, 4100, 128, device=gpu).bfloat16()
    k = torch.randn(1, 2, 4100, 128, device=gpu).bfloat16()
    check_close(kernels.pooled_scores(q, k).matrix.cpu(), kernels.pooled_scores(q.cpu(), k.cpu()).matrix)


def decoder_step(x, y, weight, cos, sin, key, value, given):
    """Add and norm, rotation and attention, as one sublayer would use them."""
    x, h = kernels.add_rms_norm(x, y, weight, 1e-6)
    query = h.view(-1, 8, 128)
    kernels.rotary_(query, None, cos, sin, rows=given["positions"])
    out = kernels.attention_rows(query, key, value, **given, causal=True, scale=128**-0.5)
    return kernels.add_layer_norm(x, out.flatten(1), weight)


def test_decoder_step_compiles_and_replays_in_a_cuda_graph(gpu, check_close):
    (query, key, value), given = attention_inputs(gpu, torch.bfloat16)
    x, y = query.flatten(1), torch.randn_like(query).flatten(1)
    angle = torch.randn(1300, 128, device=gpu)
    parts = x, y, torch.ones(1024, device=gpu).bfloat16(), angle.cos(), angle.sin(), key, value, given
    expected = decoder_step(*parts)
    for got, want in zip(torch.compile(decoder_step, fullgraph=True)(*parts), expected, strict=True):
        check_close(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = decoder_step(*parts)
    graph.replay()
    for got, want in zip(replayed, expected, strict=True):
        assert torch.equal(got, want)


# Its reference takes seconds.
@pytest.mark.full(2)
@pytest.mark.parametrize("packed", [False, True], ids=["cache", "packed"])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(True, None, None), (False, None, None), (True, 200, None), (False, 200, None), (True, 300, 20.0)],
)
def test_attention_of_a_few_thousand_tokens(gpu, dtype, width, packed, causal, window, softcap, check_close):
    tensors, given = attention_inputs(gpu, dtype, width=width, packed=packed)
    rules = given | {"causal": causal, "scale": width**-0.5, "window": window, "softcap": softcap}
    got = kernels.attention_rows(*tensors, **rules)
    # On the CPU in float64: no GPU library stands between kernel and definition.
    on_host = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in rules.items()}
    expected = kernels.attention_rows(*(t.cpu().double() for t in tensors), **on_host)
    check_close(got.cpu(), expected.to(dtype))


@pytest.mark.parametrize("count", [1, 5, 40])
def test_attention_of_few_queries(gpu, dtype, count, check_close):
    """Decoding: the blocks hold fewer queries."""
    query, (key, value) = torch.randn(3 * count, 8, 128), torch.randn(2, 3, 900, 2, 128)
    given = {
        "positions": torch.arange(900 - count, 900).repeat(3),
        "query_offsets": torch.arange(4) * count,
        "key_ranges": torch.tensor([[0, 900], [100, 900], [899, 900]]),
    }
    rules = {"longest": count, "causal": True, "scale": 128**-0.5}
    tensors = [t.to(dtype) for t in (query, key, value)]
    got = kernels.attention_rows(
        *(t.to(gpu) for t in tensors), **{name: t.to(gpu) for name, t in given.items()}, **rules
    )
    expected = kernels.attention_rows(*(t.double() for t in tensors), **given, **rules)
    check_close(got.cpu(), expected.to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_of_a_packed_projection(gpu, dtype, interleaved, check_close):
    packed = torch.randn(1000, (32 + 8 + 8) * 128).to(dtype)
    angle = torch.randn(1300, 96)
    rows = torch.randperm(1300)[:1000]
    expected = packed.clone()
    for tensor, device in ((expected, "cpu"), (packed := packed.to(gpu), gpu)):
        query, key = (t.unflatten(1, (-1, 128)) for t in tensor.split((4096, 1024, 1024), 1)[:2])
        cos, sin, index = angle.cos().to(device), angle.sin().to(device), rows.to(device)
        kernels.rotary_(query, key, cos, sin, rows=index, interleaved=interleaved)
    check_close(packed.cpu(), expected)


def test_add_norm_of_a_few_thousand_tokens(gpu, dtype, check_close):
    x, y = torch.randn(2, 2000, 4096).to(dtype)
    weight, bias = torch.randn(2, 4096).to(dtype)
    moved = [t.to(gpu) for t in (x, y, weight, bias)]
    for got, expected in (
        (kernels.add_rms_norm(*moved[:3], 1e-6), kernels.add_rms_norm(x, y, weight, 1e-6)),
        (kernels.add_layer_norm(*moved), kernels.add_layer_norm(x, y, weight, bias)),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            check_close(ours.cpu(), theirs)


def test_attention_and_rotation_beyond_31_bits(gpu, check_close):
    keys = 2**31 // (64 * 128) + 300
    if torch.cuda.mem_get_info()[0] < 5 * keys * 64 * 128:
        pytest.skip("needs 11 GB of free GPU memory")
    # Key and value are neighbours in one tensor, whose last rows lie beyond 2**31 elements.
    cache = torch.zeros(1, keys, 64, 128, device=gpu, dtype=torch.bfloat16)
    cache[:, -200:].normal_()
    key, value = cache[:, :, :32], cache[:, :, 32:]
    query = torch.randn(40, 32, 128, device=gpu).bfloat16()
    given = {
        "query_offsets": torch.tensor([0, 40], device=gpu),
        "longest": 40,
        "causal": True,
        "scale": 128**-0.5,
    }
    rows, ends = torch.arange(keys - 40, keys, device=gpu), torch.tensor([[keys - 200, keys]], device=gpu)
    got = kernels.attention_rows(query, key, value, positions=rows, key_ranges=ends, **given)
    near = {"positions": rows - keys + 200, "key_ranges": ends - keys + 200}
    expected = kernels.attention_rows(query, key[:, -200:].clone(), value[:, -200:].clone(), **near, **given)
    check_close(got, expected)
    cos, sin = torch.zeros(2, 128, device=gpu), torch.ones(2, 128, device=gpu)
    first, second = key[0, -200:].clone().chunk(2, dim=-1)
    kernels.rotary_(key[0], None, cos, sin, rows=torch.ones(keys, dtype=torch.int32, device=gpu))
    check_close(key[0, -200:], torch.cat([-second, first], dim=-1))

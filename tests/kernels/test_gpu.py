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

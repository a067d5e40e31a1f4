"""Under kernels and in half precision every plan gives what it gives in float32 without them."""

from __future__ import annotations

import pytest
import torch

import slimformer
from gpu.plans import COMPOSED, METHODS, Method
from gpu.subjects import (
    DECODERS,
    DEVICE,
    DRY,
    DTYPES,
    LAYOUTS,
    STRUCTURES,
    TOLERANCE,
    arguments,
    build,
    counted,
    in_float32,
    launched,
    moved,
    off,
    outputs,
    typical,
    with_kernels,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# On the default stream kernels run from 2**22 numbers in the residual on, those of LayerNorm from 2**23 on.
# MPNet's scores have a bias, for which there is no kernel of ours.
WITHOUT_KERNELS = {"mpnet"}
ROWS, LENGTH = (2, 64) if DRY else (36, 1024)


@dtypes
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_plain_patch_is_the_unpatched_model(name: str, dtype: torch.dtype) -> None:
    model, ran = slimformer.patch(build(name, dtype, DEVICE)), {}
    for texts in LAYOUTS.values():
        given = arguments(name, texts)
        with with_kernels() as launches:
            actual = outputs(model, moved(given))
        ran |= launches
        assert off(actual, in_float32(name, None, texts), given["attention_mask"]) <= TOLERANCE[dtype]
    assert launched(ran) or name in WITHOUT_KERNELS


@dtypes
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_computes_chosen_rows(name: str, dtype: torch.dtype) -> None:
    compare(name, COMPOSED, dtype)


@dtypes
@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(name, method, id=f"{method.name}-{name}") for method in METHODS for name in method.models],
)
def test_every_method_is_what_it_is_in_float32(name: str, method: Method, dtype: torch.dtype) -> None:
    compare(name, method, dtype)


def compare(name: str, method: Method, dtype: torch.dtype) -> None:
    """A model with a plan under kernels, with every kind of padding, beside float32 on the CPU."""
    model = slimformer.patch(build(name, dtype, DEVICE), *method.plan())
    measure, ran = typical if method.chooses else off, {}
    for layout in method.layouts:
        texts, more = LAYOUTS[layout], dict(method.more)
        given = arguments(name, texts)
        mask = given["attention_mask"]
        with with_kernels() as launches:
            actual = outputs(model, moved(given), **more)
        ran |= launches
        expected = in_float32(name, method, texts, **more)
        assert measure(actual, expected, mask) <= TOLERANCE[dtype]
        # Without the method the test fails.
        assert (
            method.name == "plain"
            or off(in_float32(name, None, texts), expected, mask) > 2 * TOLERANCE[dtype]
        )
    # Of a LayerNorm's scores there is no kernel.
    expected_kernels = [k for k in method.kernels if k != "router_scores" or name == "llama"]
    assert launched(ran, *expected_kernels) or name in WITHOUT_KERNELS, ran


@dtypes
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_kernels_run_by_themselves_where_the_batch_is_large(name: str, dtype: torch.dtype) -> None:
    texts = ((0, LENGTH),) * (ROWS - 1) + ((0, LENGTH // 2),)
    given = moved(arguments(name, texts, LENGTH))
    expected = outputs(build(name, device=DEVICE), given)
    model = slimformer.patch(build(name, dtype, DEVICE))
    with counted() as launches:
        actual = outputs(model, given)
    assert launched(launches)
    assert off(actual, expected, given["attention_mask"]) <= TOLERANCE[dtype]
    with counted() as few:
        outputs(model, {key: value[:1] for key, value in given.items()})
    assert sum(few.values()) < sum(launches.values()) or DRY


@pytest.mark.skipif(DRY, reason="the profiler sees no kernels where there is no GPU")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_counted_as_launched_is_on_the_gpu(name: str) -> None:
    model = slimformer.patch(build(name, torch.bfloat16, DEVICE))
    given = moved(arguments(name, LAYOUTS["right" if name not in DECODERS else "left"]))
    with with_kernels():
        outputs(model, given)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile, with_kernels() as launches:
        outputs(model, given)
    names = " ".join(event.key for event in profile.key_averages())
    assert launches
    assert all(f"{name}_kernel" in names or f"_{name}kernel" in names for name in map(bare, launches)), (
        launches,
        names,
    )


def bare(operator: str) -> str:
    """The name of an operator as its kernel has it: `add_rows_rms_norm_` launches `_add_rows_rms_norm_kernel`."""
    return operator.rstrip("_")

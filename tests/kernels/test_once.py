"""Kernels are lowered once in a process, and start to compile where there is a GPU. With no GPU."""

import functools
import re
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params

from kernels import once as module
from kernels.gla import mosaic_gpu
from kernels.once import once, wait_for_kernels


def kernel(x, *, name, factor):
    def body(x_g, out_g):
        @functools.partial(pl.run_scoped, x_s=plgpu.SMEM(x.shape, x.dtype), arrived=plgpu.Barrier())
        def _(x_s, arrived):
            plgpu.copy_gmem_to_smem(x_g, x_s, arrived)
            plgpu.barrier_wait(arrived)
            out_g[...] = plgpu.load(x_s, layout=plgpu.Layout.WG_STRIDED(x.shape, 1)) * factor

    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), kernel_name=name)(x)


@once
def scaled(x, *, factor=2.0, name="scaled"):
    return kernel(x["x"], name=name, factor=factor)


def lowered_for_cuda(fn, *arrays) -> str:
    return jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(program: str) -> list[str]:
    return re.findall(r'kernel_hash = "([^"]*)"', program)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def names_in(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield eqn.params["name"].removeprefix("gla_")
        for inner in jaxprs_in_params(eqn.params):
            yield from names_in(inner)


@pytest.fixture
def lowered(monkeypatch):
    """Names of the kernels that are lowered, in order."""
    names = []
    lower = module._lower.__wrapped__

    def seen(kernels):
        names.extend(names_in(kernels))
        return lower(kernels)

    monkeypatch.setattr(module, "_lower", functools.cache(seen))
    return names


def test_two_programs_hold_the_same_kernel():
    one = kernels_in(lowered_for_cuda(lambda x: scaled({"x": x}), array(256)))
    other = kernels_in(lowered_for_cuda(lambda x: scaled({"x": x + 1}) + 1, array(256)))
    assert len(one) == 1 and one == other


def test_shapes_dtypes_and_options_have_kernels_of_their_own():
    calls = [(array(256), {}), (array(128), {}), (array(256, dtype=jnp.float16), {}), (array(256), {"factor": 3.0})]
    found = {kernels_in(lowered_for_cuda(lambda x, o=o: scaled({"x": x}, **o), x))[0] for x, o in calls}
    assert len(found) == len(calls)


def test_nothing_is_lowered_by_tracing(lowered):
    def call(x):
        return scaled({"x": x}, factor=8.0)

    jax.eval_shape(call, array(256))
    jaxpr = jax.make_jaxpr(call)(array(256))
    assert "mpmd_map" in str(jaxpr)  # and what calls a kernel can be seen into
    assert not lowered
    lowered_for_cuda(call, array(256))
    assert lowered


def test_no_thread_starts_where_there_is_no_gpu(monkeypatch):
    started = []
    monkeypatch.setattr(module._threads, "submit", started.append)
    lowered_for_cuda(lambda x: scaled({"x": x}, factor=4.0), array(256))
    assert not started


def test_waits_for_what_compiles(monkeypatch):
    """Which fails here, in its threads, where it may: there is no GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compile_after, delays = module._compile, []

    def slowly(program, delay):
        time.sleep(0.5)
        assert threading.current_thread() is not threading.main_thread()
        delays.append(delay)
        compile_after(program, delay)

    monkeypatch.setattr(module, "_compile", slowly)
    lowered_for_cuda(lambda x: scaled({"x": x}, factor=5.0), array(256))
    assert not delays  # but together with others:
    lowered_for_cuda(lambda x: wait_for_kernels(scaled({"x": x}, factor=6.0, name="of_longer_name")), array(256))
    assert len(delays) == 2 and min(delays) == 0.0 < max(delays)  # the larger one first
    assert not module._under_way and not module._waiting


def test_threads_lower_a_kernel_once(lowered):
    def program(x, n):
        return scaled({"x": x}, factor=7.0) + n

    programs = [functools.partial(program, n=n) for n in range(4)]
    threads = [threading.Thread(target=lowered_for_cuda, args=(each, array(256))) for each in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lowered == ["scaled"]


WIDE = ["prepare", "walk_o", "pair_gradients", "walk_dv", "walk_dq", "walk_dk", "finish"]
FUSED = ["own_states", "forward_saving", "own_gradients", "backward"]


@pytest.mark.parametrize(
    "K, V, wanted, how", [(64, 64, FUSED, "plain"), (128, 256, WIDE, "remat"), (128, 256, WIDE, "shard_map")]
)
def test_a_training_step_lowers_each_kernel_once(K, V, wanted, how, lowered):
    """A second step none."""
    T = 1024 if V == 64 else 128  # the former in pieces
    call = functools.partial(mosaic_gpu.gated_linear_attention, scale=1.0)
    if how == "remat":
        call = jax.checkpoint(call)
    if how == "shard_map":
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        call = jax.shard_map(call, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))

    def step(do, *inputs):
        o, vjp = jax.vjp(call, *inputs)
        return o, *vjp(do)

    q, v = (array(2, T, 1, width, dtype=jnp.bfloat16) for width in (K, V))
    lowered_for_cuda(step, v, q, q, v, q)
    assert lowered == wanted
    lowered_for_cuda(lambda *arrays: [x * 2 for x in step(*arrays)], v, q, q, v, q)
    assert len(lowered) == len(wanted)


def test_a_forward_lowers_no_backward(lowered):
    q, v = (array(1, 128, 1, width, dtype=jnp.bfloat16) for width in (128, 256))
    lowered_for_cuda(functools.partial(mosaic_gpu.gated_linear_attention, scale=1.0), q, q, v, q)
    assert lowered == ["prepare", "walk_o"]

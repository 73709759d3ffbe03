"""Mosaic kernels that are lowered once in a process, and compiled side by side.

XLA compiles the Mosaic kernels of a program one after another. It keeps what it compiled, and knows a kernel again by
its bytes, but Pallas lowers a kernel to other bytes each time (a count is among them). So here a kernel is lowered for
all programs of the process, by jax.export, when the first of them is; and, on a machine with GPUs, what a program has
lowered is compiled in threads, `wait_for_kernels` waits for it, and XLA finds it compiled.
"""

import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable

import jax
from jax import export
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from .dispatch import vary_alike

ARRAY = object()  # in the place of an array, among options
NO_MESH = jax.sharding.AbstractMesh((), ())

_lock = threading.RLock()
_threads = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="kernels")
_waiting: list[tuple[int, jax.stages.Lowered]] = []  # with the bytes of the kernel
_under_way: set[concurrent.futures.Future] = set()


def once(fn: Callable) -> Callable:
    """`fn`, lowered once for all calls with arrays of the same shapes and dtypes and equal other arguments.

    For a function of arrays (or trees of them) and hashable options that calls Mosaic kernels, without a derivative or
    batching of its own, on one device's arrays. With `interpret`, it is called as it is.
    """

    @functools.wraps(fn)
    def call(*args, interpret=None, **kwargs):
        if interpret is not None:
            return fn(*args, interpret=interpret, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        of_arrays = _of_arrays(fn, tree, tuple(ARRAY if isinstance(x, jax.Array) else x for x in leaves))
        with jax.sharding.use_abstract_mesh(NO_MESH):
            traced = of_arrays.trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
        out = vary_alike(*arrays, *_call.bind(*arrays, kernels=traced.jaxpr))[len(arrays) :]
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), out)

    return call


def wait_for_kernels(x: jax.Array) -> jax.Array:
    """x; all kernels lowered before it are compiled before the program is, side by side."""
    return _wait.bind(x)


@functools.cache
def _of_arrays(fn, tree, options):
    def of_arrays(*arrays):
        arrays = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(arrays) if x is ARRAY else x for x in options])
        return fn(*args, **kwargs)

    of_arrays.__name__ = fn.__name__
    return jax.jit(of_arrays)  # whose cache gives the same jaxpr for the same shapes


def _lowered(kernels) -> export.Exported:
    with _lock, jax.sharding.use_abstract_mesh(NO_MESH):
        return _lower(kernels)


@functools.cache
def _lower(kernels):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kernels.in_avals]
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    lowered = export.export(jax.jit(jaxpr_as_fun(kernels)), platforms=["cuda"], disabled_checks=unchecked)(*shapes)
    if jax.default_backend() == "gpu":
        program = jax.jit(lowered.call).trace(*shapes).lower(lowering_platforms=("cuda",))
        _waiting.append((len(lowered.mlir_module_serialized), program))
    return lowered


def _lower_call(ctx, *arrays, kernels):
    return mlir.lower_fun(_lowered(kernels).call, multiple_results=True)(ctx, *arrays)


def _lower_wait(_, x):
    with _lock:
        largest = max((size for size, _ in _waiting), default=0)
        for size, program in _waiting:
            compiling = _threads.submit(_compile, program, 0.12 * (1 - size / largest))
            _under_way.add(compiling)
            compiling.add_done_callback(_under_way.discard)
        _waiting.clear()
    concurrent.futures.wait(set(_under_way))
    return [x]


def _compile(program: jax.stages.Lowered, delay: float):
    """After so many seconds. Errors stay in the thread: the program's own compilation meets them again.

    For a moment near its start a compilation needs some options of LLVM, and from 15 to 140 ms later on, by the size of
    the kernel, others. They are global: compilations that need the same go side by side, those that need the first wait
    for the end of all that are at the second. So the moments of all kernels have to pass before any is at the second.
    With these delays the largest kernels, which take longest to get there, pass first.
    """
    time.sleep(delay)
    program.compile()


_call = Primitive("lowered_once")
_call.multiple_results = True
_call.def_abstract_eval(lambda *_, kernels: [jax.core.ShapedArray(x.shape, x.dtype) for x in kernels.out_avals])
_call.def_impl(lambda *arrays, kernels: jax.jit(_lowered(kernels).call)(*arrays))
mlir.register_lowering(_call, _lower_call, platform="cuda")

_wait = Primitive("wait_for_kernels")  # x as it is; what happens, happens when the program is lowered
_wait.def_abstract_eval(lambda x: x)
_wait.def_impl(lambda x: x)
mlir.register_lowering(_wait, _lower_wait)

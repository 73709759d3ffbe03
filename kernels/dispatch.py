"""What every operator's entry does: name a wrong argument, find the platform, choose the implementation.

An operator's table of implementations maps names to modules, fastest first; a module is imported when asked for. Each
has a function named like the operator, which takes its arguments checked and brings its own derivative and sharding;
and `unsupported`, which takes the same arguments and the platform, and gives None or a sentence that says which
argument it cannot run and why.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)  # float64, under x64, makes "reference" the oracle


class Choice(NamedTuple):
    """What a call would run, and why not each faster implementation."""

    implementation: str
    passed_over: dict[str, str]


def choose(implementations: dict[str, str], *arrays, **options) -> Choice:
    """The first implementation that supports the call."""
    passed_over = {}
    for name, path in implementations.items():
        module = importlib.import_module(path)
        reason = module.unsupported(*arrays, **options, platform=platform_of(arrays[0]))
        if reason is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise AssertionError("the last implementation supports every call")


def module_for(implementation: str | None, implementations: dict[str, str], *arrays, **options) -> ModuleType:
    """The module of the named implementation, or of the chosen one; raises where the named one cannot run the call."""
    if implementation is None:
        implementation = choose(implementations, *arrays, **options).implementation
    elif implementation not in implementations:
        raise ValueError(f"implementation: got {implementation!r}, wanted None or one of {', '.join(implementations)}")
    else:
        module = importlib.import_module(implementations[implementation])
        if reason := module.unsupported(*arrays, **options, platform=platform_of(arrays[0])):
            raise NotImplementedError(f"implementation {implementation!r} cannot run this call: {reason}")
    return importlib.import_module(implementations[implementation])


def platform_of(x) -> str:
    """ "gpu", "cpu" or "tpu": where x lies, or where a traced computation will run: on the mesh in use, by default."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices())).platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    device = jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def compute_capability() -> str | None:
    """Such as "9.0": of the mesh in use, whose GPUs need not be here (a compilation for others), or of this machine."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and any(name in target.device_kind for name in ("H100", "H200", "GH200")):
        return "9.0"
    return getattr(jax.devices("gpu")[0], "compute_capability", None)


def hopper_obstacle(name: str, platform: str) -> str | None:
    """Why kernels compiled for Hopper alone cannot run where argument `name` is; None where they can."""
    if platform != "gpu":
        return f"{name} is on platform {platform!r}; the Hopper kernels run on NVIDIA GPUs of compute capability 9.0"
    if (capability := compute_capability()) != "9.0":
        return f"the GPU has compute capability {capability}; the Hopper kernels are compiled for 9.0"
    return None


def vary_alike(*arrays):
    """The arrays (None stays None), typed as different over every mesh axis over which one of them is.

    Inside shard_map a scan wants it of its carry and what comes in; and a custom derivative that takes a weight all
    shards share and a shard's tokens gives the shard's gradient of the weight: this is where shard_map learns to add
    those up.
    """
    varies = {i: jax.typeof(x).manual_axis_type.varying for i, x in enumerate(arrays) if x is not None}
    everywhere = frozenset().union(*varies.values())
    return [
        jax.lax.pcast(x, tuple(everywhere - varies[i]), to="varying") if everywhere - varies.get(i, everywhere) else x
        for i, x in enumerate(arrays)
    ]


def run_with_auto_axes(call: Callable, arrays: Sequence, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """`call(*arrays)`, on a mesh of any kind; None among the arrays stays None.

    Explicit axes, jax.make_mesh's default, are part of an array's type, and would ask of every operation inside how its
    result is sharded. They are the compiler's inside, and results have them again: `inputs` and `outputs` name the axes
    of each array, one of a result is sharded as the first argument that has one of its name, and "." is not sharded.
    """
    named, mesh = {}, None
    for x, axes in zip(arrays, inputs, strict=True):
        if x is not None and (sharding := jax.typeof(x).sharding).mesh.explicit_axes:
            mesh = sharding.mesh
            for name, over in zip(axes.split(), sharding.spec, strict=True):
                named.setdefault(name, over)
    if mesh is None:
        return call(*arrays)
    shardings = [NamedSharding(mesh, PartitionSpec(*map(named.get, axes.split()))) for axes in outputs]
    shardings = tuple(shardings) if len(shardings) > 1 else shardings[0]
    return jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=shardings)(*arrays)


def with_auto_mesh(call: Callable) -> Callable:
    """`call`, for a shard of a custom_partitioning: traced where no axis of the mesh in use is explicit."""

    def traced(*shards):
        mesh = jax.sharding.get_abstract_mesh()
        auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(auto):
            return call(*shards)

    return traced


def checked_scale(scale, key_width: int) -> float:
    """K^-0.5 for None, else a finite Python number as a float."""
    if scale is None:
        return key_width**-0.5
    if isinstance(scale, jax.Array) or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, wanted None or a finite Python number (multiply q by a traced one)")
    return float(scale)


def check_array(name: str, x, axes: str, sizes: dict[str, int], dtype=None) -> None:
    """Check that x has these axes, at the sizes known so far (new ones are added), and `dtype`, or any float's."""
    wanted = "[" + ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes.split()) + "]"
    if not hasattr(x, "shape"):
        raise ValueError(f"{name}: got a {type(x).__name__}, wanted an array {wanted}")
    known = dict(zip(axes.split(), x.shape, strict=False)) | sizes
    if tuple(x.shape) != tuple(known.get(axis) for axis in axes.split()):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted}")
    if min(x.shape) < 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted every axis of {wanted} to be at least 1")
    sizes.update(known)
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted {jnp.dtype(dtype)}")
    if dtype is None and x.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted bfloat16, float16 or float32")

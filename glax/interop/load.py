"""A checkpoint into a model, straight into its shards, one tensor at a time."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.typing import DTypeLike

from glax.errors import UserError
from glax.interop.configs import model_config, read_config
from glax.interop.files import TensorFiles
from glax.interop.hub import checkpoint_folder
from glax.interop.names import Tensor, layout_of, ours, partition, tensors
from glax.models import LanguageModel, ModelConfig
from glax.models.accounting import abstract_model

# Buffers that old versions saved, which are computed here.
COMPUTED = (".rotary_emb.inv_freq", ".rotary.inv_freq")


def load_model(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: str | None = None,
    scan_layers: bool = True,
    implementation: str | None = None,
) -> LanguageModel:
    """The model of a checkpoint in the Hub's format.

    Under a mesh with rules for the logical axes (``glax.training.sharding.use_mesh``) every parameter goes straight
    into its shards: a process reads only the parts that its devices hold. Host memory has
    one such part at a time: what it takes is the largest of them.

    Args:
      source: a folder with config.json and safetensors, or OWNER/NAME on the Hub (with glax[hub]).
      dtype: of the parameters, whatever the checkpoint's is: float32 to train on, bfloat16 to save memory.
      compute_dtype: "bfloat16" or "float32"; bfloat16 when None, float32 on a CPU.
      scan_layers, implementation: as in ``ModelConfig``.

    Raises:
      UserError: what is missing, cut short, misshaped, unknown or too much, by name; before anything is allocated.
    """
    folder = checkpoint_folder(source)
    hub = read_config(folder)
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = dataclasses.replace(
        model_config(hub), compute_dtype=compute_dtype, scan_layers=scan_layers, implementation=implementation
    )
    files = TensorFiles(folder)
    wanted = tensors(config, layout_of(hub, files.shapes))
    _check(folder, wanted, files.shapes)
    dtype = jnp.dtype(dtype)

    parameters: dict[str, jax.Array] = {}
    memory = np.empty(_largest(files, wanted), np.uint8)
    for tensor in wanted:
        value = _read(files, tensor, memory)
        if tensor.layer is None:
            parameters[tensor.path] = _placed(value, tensor.turn, dtype, _sharding(tensor.our_axes))
        else:
            if tensor.path not in parameters:
                parameters[tensor.path] = _empty(config, tensor, dtype)
            parameters[tensor.path] = _inserted(parameters[tensor.path], value, tensor.turn, tensor.layer)
        del value
    return _model(config, parameters)


def _check(folder, wanted: list[Tensor], shapes) -> None:
    shape_of = {tensor.name: tensor.shape for tensor in wanted}
    if missing := [name for name in shape_of if name not in shapes]:
        raise UserError(f"{folder} lacks {len(missing)} tensors of this model, the first {missing[0]}: fetch it again")
    for name, shape in shape_of.items():
        if shapes[name] != shape:
            raise UserError(f"{name} has shape {list(shapes[name])} and config.json makes it {list(shape)}: mend one")
    extra = sorted(name for name in shapes if name not in shape_of and not name.endswith(COMPUTED))
    if extra:
        raise UserError(
            f"{folder} has {len(extra)} tensors that this model has no use for, the first {extra[0]}: "
            "mend its config.json"
        )


def _sharding(axes):
    mesh = jax.sharding.get_mesh()
    return SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, partition(axes))


def _parts(tensor: Tensor, sharding) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """From and to which index of each axis the devices of this process hold the tensor's rows."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    for axis, size in zip(spec, tensor.part, strict=False):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        count = math.prod(sharding.mesh.shape[name] for name in names)
        if size % count:
            raise UserError(f"the mesh cuts {tensor.name}, of {size}, into {count} parts: use a divisor")
    parts = {}
    for device, index in sharding.addressable_devices_indices_map(tensor.part).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, tensor.part, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def _largest(files: TensorFiles, wanted: list[Tensor]) -> int:
    """Bytes of the largest part of a tensor that a device holds."""
    return max(
        math.prod(stop - start for start, stop in bounds) * files.dtype(tensor.name).itemsize
        for tensor in wanted
        for bounds in _parts(tensor, _sharding(tensor.axes))
    )


def _read(files: TensorFiles, tensor: Tensor, memory: np.ndarray) -> jax.Array:
    """The tensor as the checkpoint has it, on the devices; each part of it is read once, into ``memory``."""
    sharding = _sharding(tensor.axes)
    first = 0 if tensor.rows is None else tensor.rows[0]
    shards = []
    for ((start, stop), *rest), devices in _parts(tensor, sharding).items():
        part = files.read(tensor.name, [(start + first, stop + first), *rest], memory)
        # Copied once there, since a CPU's array may be this memory itself, which is the next part's.
        there = [jax.device_put(part, device) for device in devices]
        shards += jax.block_until_ready([jax.device_put(x, x.device, may_alias=False) for x in there])
    return jax.make_array_from_single_device_arrays(tensor.part, sharding, shards)


def _placed(value, turn, dtype, sharding):
    return _placement(turn, dtype, sharding)(value)


@functools.lru_cache(maxsize=64)
def _placement(turn, dtype, sharding):
    return jax.jit(lambda x: ours(turn, x).astype(dtype), out_shardings=sharding)


def _empty(config: ModelConfig, tensor: Tensor, dtype) -> jax.Array:
    """Zeros for a parameter with an axis of layers."""
    shape = _flat(nnx.state(abstract_model(config), nnx.Param))[tensor.path].shape
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=_sharding((None, *tensor.our_axes)))()


def _inserted(parameter, value, turn, layer):
    """``parameter`` with this layer, in its place."""
    return _insertion(turn, parameter.sharding)(parameter, value, layer)


@functools.lru_cache(maxsize=64)
def _insertion(turn, sharding):
    def insert(parameter, value, layer):
        return jax.lax.dynamic_update_index_in_dim(parameter, ours(turn, value).astype(parameter.dtype), layer, 0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _flat(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _model(config: ModelConfig, parameters: dict[str, jax.Array]) -> LanguageModel:
    graph, state = nnx.split(abstract_model(config), nnx.Param)
    flat = nnx.to_flat_state(state)
    filled = [(path, variable.replace(parameters[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))

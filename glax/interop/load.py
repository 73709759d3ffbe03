"""A checkpoint into a model, straight into its shards, one tensor at a time."""

import dataclasses
import functools
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
    into its shards: a process reads only the parts that its devices hold. No two tensors are in host memory at once.

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
    for tensor in wanted:
        value = _read(files, tensor)
        if tensor.layer is None:
            parameters[tensor.path] = _placed(value, tensor.turn, dtype, _sharding(tensor.our_axes))
        else:
            if tensor.path not in parameters:
                parameters[tensor.path] = _empty(config, tensor, dtype)
            parameters[tensor.path] = _inserted(parameters[tensor.path], value, tensor.turn, tensor.layer)
        # Copies to a device go on behind our back, and keep what they copy.
        jax.block_until_ready(parameters[tensor.path])
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


def _read(files: TensorFiles, tensor: Tensor) -> jax.Array:
    """The tensor as the checkpoint has it, on the devices; each part of it is read once."""
    first = 0 if tensor.rows is None else tensor.rows[0]

    @functools.lru_cache(maxsize=1)
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        (start, stop), *rest = bounds
        return files.read(tensor.name, (slice(start + first, stop + first), *(slice(a, b) for a, b in rest)))

    def wanted(index):
        return part(tuple(s.indices(size)[:2] for s, size in zip(index, tensor.part, strict=True)))

    sharding = _sharding(tensor.axes)
    for axis, size in zip(sharding.spec if isinstance(sharding, NamedSharding) else (), tensor.part, strict=False):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        count = int(np.prod([sharding.mesh.shape[name] for name in names]))
        if size % count:
            raise UserError(f"the mesh cuts {tensor.name}, of {size}, into {count} parts: use a divisor")
    return jax.make_array_from_callback(tensor.part, sharding, wanted)


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

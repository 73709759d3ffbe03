"""Who holds what: the mesh, and the rules from logical axes (named by the models) to mesh axes."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from glax.data import DataConfig
from glax.errors import UserError
from glax.models import ModelConfig
from glax.training.config import MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")
RULES = (
    ("batch", BATCH),
    ("length", "sequence"),
    ("embed", ("fsdp", "sequence")),  # devices that share a sequence need no copies of the parameters either
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("gate", None),
    ("state", None),
    ("layers", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (all, unless given). Raises UserError where the axes do not fit them."""
    devices = jax.devices() if devices is None else list(devices)
    given = {"fsdp": config.fsdp, "sequence": config.sequence, "tensor": config.tensor}
    given |= {} if config.data is None else {"data": config.data}
    for name, size in given.items():
        if size < 1:
            raise UserError(f"mesh.{name} is {size}: it must be at least 1")
    product = int(np.prod(list(given.values())))
    described = " x ".join(f"{name} {size}" for name, size in given.items() if size > 1 or name == "data")
    if config.data is None and len(devices) % product:
        raise UserError(f"the mesh {described} does not divide the {len(devices)} devices: their product must")
    if config.data is not None and product != len(devices):
        raise UserError(
            f"the mesh {described} needs {product} devices and there are {len(devices)}: change the axes, or leave out "
            "mesh.data to give it all devices that remain"
        )
    shape = (-1, config.fsdp, config.sequence, config.tensor)
    # A host's devices side by side: the later an axis, the more it says, and the faster the wires that it gets.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(mesh: Mesh, model: ModelConfig, data: DataConfig, microbatches: int) -> None:
    """Raises UserError where the mesh does not divide the heads, the batch or the length."""
    tensor = mesh.shape["tensor"]
    for name in ("num_heads", "num_kv_heads"):
        heads = getattr(model, name)
        if heads is not None and heads % tensor:
            raise UserError(f"mesh.tensor {tensor} does not divide the model's {heads} heads ({name}): use a divisor")
    sequence = mesh.shape["sequence"]
    if data.sequence_length % sequence:
        raise UserError(
            f"mesh.sequence {sequence} does not divide data.sequence_length {data.sequence_length}: use a divisor"
        )
    if model.short_conv_width is not None and data.sequence_length // sequence < model.short_conv_width - 1:
        raise UserError(
            f"mesh.sequence {sequence} leaves {data.sequence_length // sequence} tokens in a shard, fewer than the "
            f"convolution of width {model.short_conv_width} looks back: use fewer shards"
        )
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatches < 1 or data.batch_size % (rows * microbatches):
        raise UserError(
            f"data.batch_size {data.batch_size} is not a multiple of mesh.data {mesh.shape['data']} x mesh.fsdp "
            f"{mesh.shape['fsdp']} x microbatches {microbatches} = {rows * microbatches}: change one of them"
        )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace, compile and run under ``mesh``, with the models' logical axes bound to it."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        yield


def parameter_shardings(
    axes: PyTree[PartitionSpec], shapes: PyTree[jax.ShapeDtypeStruct], mesh: Mesh
) -> PyTree[NamedSharding]:
    """Shardings of parameters with logical ``axes``. Raises UserError for one that the mesh does not divide."""
    rules = dict(RULES)

    def sharding(path: tuple, names: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = [None if name is None else rules[name] for name in names]
        for name, axis, size in zip(names, spec, leaf.shape, strict=False):
            axes = (axis,) if isinstance(axis, str) else axis or ()
            if size % math.prod(mesh.shape[axis] for axis in axes):
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                ways = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
                raise UserError(f"{ways} does not divide the {name} axis of {where}, which is {size}: use a divisor")
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp, tokens of a row over sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "sequence"))


def row_part(mesh: Mesh) -> tuple[int, int]:
    """(i, n): of n equal parts of a batch's rows, this process's devices hold tokens of part i.

    Processes that share the tokens of the same rows have the same part. Raises UserError where a process holds rows
    that are not such a part.
    """
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    places = batch_sharding(mesh).addressable_devices_indices_map((count, mesh.shape["sequence"]))
    held = sorted({row for rows, _ in places.values() for row in range(*rows.indices(count))})
    first, size = held[0], len(held)
    if held[-1] - first + 1 != size or count % size or first % size:
        raise UserError(
            f"process {jax.process_index()} would hold the rows {held} of {count}, which is no equal part of them: "
            "make mesh.data, mesh.fsdp, mesh.sequence and mesh.tensor powers of 2, or as many as the GPUs of a host"
        )
    return first // size, count // size


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays of a batch from the rows of this process's part (see ``row_part``)."""
    part, parts = row_part(mesh)
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        first = part * rows.shape[0]

        def shard(index: tuple[slice, slice]) -> np.ndarray:
            start, stop, _ = index[0].indices(parts * rows.shape[0])
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((parts * rows.shape[0], *rows.shape[1:]), sharding, shard)

    return {name: place(rows) for name, rows in batch.items()}

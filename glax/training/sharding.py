"""Who holds what: the mesh, and the rules from logical axes (named by the models) to mesh axes."""

import contextlib
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
    ("length", None),
    ("embed", "fsdp"),
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
    if config.sequence != 1:
        raise UserError(f"mesh.sequence is {config.sequence}: sharding the sequence is not supported, leave it at 1")
    given = {"fsdp": config.fsdp, "tensor": config.tensor} | ({} if config.data is None else {"data": config.data})
    for name, size in given.items():
        if size < 1:
            raise UserError(f"mesh.{name} is {size}: it must be at least 1")
    product = int(np.prod(list(given.values())))
    described = " x ".join(f"{name} {size}" for name, size in given.items())
    if config.data is None and len(devices) % product:
        raise UserError(f"the mesh {described} does not divide the {len(devices)} devices: their product must")
    if config.data is not None and product != len(devices):
        raise UserError(
            f"the mesh {described} needs {product} devices and there are {len(devices)}: change the axes, or leave out "
            "mesh.data to give it all devices that remain"
        )
    shape = (len(devices) // (config.fsdp * config.tensor), config.fsdp, 1, config.tensor)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(mesh: Mesh, model: ModelConfig, data: DataConfig, microbatches: int) -> None:
    """Raises UserError where the mesh does not divide the heads or the batch."""
    tensor = mesh.shape["tensor"]
    for name in ("num_heads", "num_kv_heads"):
        heads = getattr(model, name)
        if heads is not None and heads % tensor:
            raise UserError(f"mesh.tensor {tensor} does not divide the model's {heads} heads ({name}): use a divisor")
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
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"mesh.{axis} {mesh.shape[axis]} does not divide the {name} axis of {where}, which is {size}: "
                    "use a divisor"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays of a batch from the rows that this process holds."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows) for name, rows in batch.items()}

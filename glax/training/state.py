"""What a step changes, made in its shards: no device ever holds the whole model."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from glax.models import LanguageModel
from glax.training.config import TrainConfig
from glax.training.optimizer import adamw
from glax.training.sharding import parameter_shardings, replicated

Parameters = PyTree[Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and optimiser moments in float32, and counters.

    Attributes:
        params: nested dict of the model's parameters.
        opt_state: of the optax transformation.
        step: batches seen, skipped ones included.
        skipped: steps whose loss or gradient was not finite, which changed nothing.
        skipped_in_row: how many of the last steps were such.
    """

    params: Parameters
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a state before any of it exists.

    Attributes:
        build: makes the model from parameters.
        axes: logical axis names of each parameter.
        optimizer: AdamW without its learning rate.
        abstract: shapes, dtypes and shardings of the state.
        initialize: makes the state of step 0, compiled, each device its shards only.
    """

    build: Callable[[Parameters], LanguageModel]
    axes: PyTree[PartitionSpec]
    optimizer: optax.GradientTransformation
    abstract: TrainState
    initialize: Callable[[], TrainState]

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def plan_state(config: TrainConfig, mesh: Mesh) -> Plan:
    """Shapes and shardings of the state that ``config`` trains on ``mesh``. Call under ``use_mesh(mesh)``."""

    def variables() -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(LanguageModel(config.model, rngs=nnx.Rngs(config.seed)), nnx.Param)

    graph, abstract = jax.eval_shape(variables)
    axes = nnx.to_pure_dict(jax.tree.map(_axes, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
    optimizer = adamw(config.optimizer, axes)

    def initial() -> TrainState:
        params = nnx.to_pure_dict(variables()[1])
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, zero, zero)

    shapes = jax.eval_shape(initial)
    shardings = _state_shardings(shapes, parameter_shardings(axes, shapes.params, mesh), optimizer, mesh)
    return Plan(
        build=lambda params: nnx.merge(graph, nnx.State(params)),
        axes=axes,
        optimizer=optimizer,
        abstract=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        ),
        initialize=jax.jit(initial, out_shardings=shardings),
    )


def _axes(parameter: nnx.Variable) -> PartitionSpec:
    return PartitionSpec(*(parameter.get_metadata("out_sharding", None) or ()))


def _state_shardings(
    shapes: TrainState, params: PyTree[NamedSharding], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Moments lie as their parameters do; counters are everywhere."""
    everywhere = replicated(mesh)

    def opt_state() -> PyTree:
        return optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            params,
            transform_non_params=lambda _: everywhere,
        )

    # optax makes a small state to see which of it are parameters: traced, since the mesh's devices need not be here.
    leaves, tree = [], []

    def trace() -> None:
        found, structure = jax.tree.flatten(opt_state())
        leaves.extend(found)
        tree.append(structure)

    jax.eval_shape(trace)
    return TrainState(params, jax.tree.unflatten(tree[0], leaves), everywhere, everywhere, everywhere)

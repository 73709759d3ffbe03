"""Every implementation runs on its shard of the batch and the heads: nothing is exchanged between devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import gated_linear_attention
from kernels.dispatch import run_with_auto_axes
from kernels.gla import recurrence
from kernels.gla.partition import shard_over_batch_and_heads

BATCH = ("data", "fsdp")
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)\(")

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices: JAX_PLATFORMS=cpu with eight virtual ones"
)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def make(gla, groups, segments, state):
    return gla.make_inputs(gla.Case(8, 70, 4, groups, 4, 6, segments=segments, state=state), gates="resets")


def specs(inputs, heads="tensor", groups="tensor"):
    """Partition of q, k, v, log_alpha, initial_state, segment_ids."""
    arrays = [P(BATCH, None, heads), *[P(BATCH, None, groups)] * 3]
    return *arrays, P(BATCH, heads) if inputs.initial_state is not None else None, P(BATCH)


def place(mesh, inputs, partition):
    arrays = (*inputs.differentiable, inputs.segment_ids)
    return [
        x if x is None else jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(arrays, partition, strict=True)
    ]


def forward(name, has_state):
    def call(q, k, v, log_alpha, initial_state, segment_ids):
        return gated_linear_attention(
            q,
            k,
            v,
            log_alpha,
            initial_state=initial_state,
            segment_ids=segment_ids,
            return_final_state=has_state,
            implementation=name,
        )

    return call


def gradients(call, has_state):
    loss = lambda *x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(call(*x)))  # noqa: E731
    return jax.grad(loss, argnums=tuple(range(4 + has_state)))


@pytest.mark.parametrize("groups, extras", [(4, False), (2, True)])
def test_under_jit_nothing_is_exchanged(gla, implementation, mesh, groups, extras):
    inputs = make(gla, groups, segments=extras, state=extras)
    arrays = place(mesh, inputs, specs(inputs))
    call, recurrent = forward(implementation.name, extras), forward("reference", extras)
    for f, oracle in ((call, recurrent), (gradients(call, extras), gradients(recurrent, extras))):
        compiled = jax.jit(f).lower(*arrays).compile()
        assert not COLLECTIVE.search(compiled.as_text())
        outputs = jax.tree.leaves(compiled(*arrays))
        expected = jax.tree.leaves(jax.jit(oracle)(*inputs.differentiable, inputs.segment_ids))
        for got, want in zip(outputs, expected, strict=True):
            assert got.addressable_shards[0].data.size * 8 == got.size
            np.testing.assert_allclose(got, want, atol=5e-5)


def test_inside_shard_map(gla, implementation, mesh):
    inputs = make(gla, 2, segments=True, state=True)
    partition = specs(inputs)
    call = forward(implementation.name, True)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=partition, out_specs=(partition[0], partition[4]))
    arrays = (*inputs.differentiable, inputs.segment_ids)
    got, want = (jax.jit(gradients(f, True))(*arrays) for f in (sharded, forward("reference", True)))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5)


def test_inside_shard_map_with_no_state_and_shared_gates(gla, mesh):
    """The state that the operator itself begins with, and gates that all devices share, whose gradients are added."""
    q, k, v, log_alpha, *_ = make(gla, 4, segments=False, state=False).differentiable
    arrays, partition = (q, k, v, log_alpha[:1, :, :2]), (*[P(BATCH, None, "tensor")] * 3, P())
    for name in ("xla", "reference"):

        def call(q, k, v, shared, name=name):
            return gated_linear_attention(q, k, v, jnp.broadcast_to(shared[:, :, :1], k.shape), implementation=name)

        sharded = jax.shard_map(call, mesh=mesh, in_specs=partition, out_specs=partition[0])
        got, want = (jax.jit(gradients(f, False))(*arrays) for f in (sharded, call))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


class TestShardOverBatchAndHeads:
    """The partition rule of kernels that XLA cannot see into, around a stand-in it could."""

    INPUTS = ("B T H K", "B T G K", "B T G V", "B T G K", "B H K V", "B T")
    OUTPUTS = ("B T H V", "B H K V")

    @pytest.fixture
    def seen(self):
        """Shapes of q that the stand-in was traced for."""
        return []

    @pytest.fixture
    def plain(self, seen):
        def call(q, k, v, log_alpha, initial_state, segment_ids):
            seen.append(q.shape)
            options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": True}
            return recurrence.gated_linear_attention(q, k, v, log_alpha, scale=1.0, **options)

        return call

    @pytest.fixture
    def wrapped(self, plain):
        """A custom_vjp whose two rules are each partitioned, as a kernel's would be."""
        d_inputs = self.INPUTS[:-1]

        def backward(*arrays):
            *inputs, segment_ids, d_o, d_state = arrays
            return jax.vjp(lambda *x: plain(*x, segment_ids), *inputs)[1]((d_o, d_state))

        op = jax.custom_vjp(shard_over_batch_and_heads(plain, self.INPUTS, self.OUTPUTS))
        backward = shard_over_batch_and_heads(backward, self.INPUTS + self.OUTPUTS, d_inputs)
        op.defvjp(lambda *x: (op(*x), x), lambda x, d: (*backward(*x, *d), None))
        return op

    def check(self, got, want):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=5e-5)

    @pytest.mark.parametrize("groups", [4, 2])
    def test_each_device_runs_its_share(self, gla, mesh, plain, wrapped, seen, groups):
        inputs = make(gla, groups, segments=True, state=True)
        arrays = place(mesh, inputs, specs(inputs))
        for wrap in (lambda f: f, functools.partial(gradients, has_state=True)):
            compiled = jax.jit(wrap(wrapped)).lower(*arrays).compile()
            assert not COLLECTIVE.search(compiled.as_text())
            assert seen[-1] == (2, 70, 2, 4)
            self.check(compiled(*arrays), jax.jit(wrap(plain))(*inputs.differentiable, inputs.segment_ids))

    def test_more_shards_of_heads_than_groups(self, gla, mesh, plain, wrapped, seen):
        """No device has a whole group: heads are gathered, and the batch stays sharded."""
        inputs = make(gla, 1, segments=True, state=True)
        arrays = place(mesh, inputs, specs(inputs, groups=None))
        gradient = jax.jit(gradients(wrapped, True)).lower(*arrays).compile()
        assert seen[-1] == (2, 70, 4, 4)
        self.check(gradient(*arrays), jax.jit(gradients(plain, True))(*inputs.differentiable, inputs.segment_ids))

    def test_under_vmap_scan_and_remat(self, gla, mesh, plain, wrapped):
        inputs = make(gla, 2, segments=True, state=True)
        arrays = (*inputs.differentiable, inputs.segment_ids)
        twice = (jnp.stack([arrays[0], 2 * arrays[0]]), *arrays[1:])
        in_axes = (0, None, None, None, None, None)

        def layers(call, *arrays):
            step = jax.checkpoint(lambda x, _: (x + call(x, *arrays[1:])[0][..., :4], None))
            return jax.lax.scan(step, arrays[0], None, length=2)[0]

        def total(call):
            return lambda *x: jnp.sum(jax.vmap(functools.partial(layers, call), in_axes)(*x) ** 2)

        got, want = (jax.jit(jax.grad(total(call), argnums=(0, 2)))(*twice) for call in (wrapped, plain))
        self.check([x / jnp.abs(y).max() for x, y in zip(got, want, strict=True)], [y / jnp.abs(y).max() for y in want])

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_inside_shard_map(self, gla, mesh, plain, wrapped, check_vma):
        inputs = make(gla, 2, segments=True, state=True)
        partition, arrays = specs(inputs), (*inputs.differentiable, inputs.segment_ids)
        out_specs = (partition[0], partition[4])
        sharded = jax.shard_map(wrapped, mesh=mesh, in_specs=partition, out_specs=out_specs, check_vma=check_vma)
        self.check(jax.jit(gradients(sharded, True))(*arrays), jax.jit(gradients(plain, True))(*arrays))

    def test_explicit_axes(self, gla, mesh, plain, wrapped, seen):
        """jax.make_mesh's default: the entry leaves them to the compiler, and a shard is traced without them."""
        inputs = make(gla, 2, segments=True, state=True)
        mesh = mesh.update(axis_types=(AxisType.Explicit,) * 3)
        arrays = place(mesh, inputs, specs(inputs))
        call = lambda *x: run_with_auto_axes(wrapped, x, self.INPUTS, ["B T H .", "B H . ."])  # noqa: E731
        with jax.set_mesh(mesh):
            compiled = jax.jit(gradients(call, True)).lower(*arrays).compile()
        assert not COLLECTIVE.search(compiled.as_text())
        assert seen[-1] == (2, 70, 2, 4)
        self.check(compiled(*arrays), jax.jit(gradients(plain, True))(*inputs.differentiable, inputs.segment_ids))

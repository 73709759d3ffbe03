"""Eight virtual devices: the same losses as on one, everything in its shards, nothing gathered that has tokens."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import glax.layers.gated_linear_attention as gla_layer
from glax.data import prepare, train_batches
from glax.errors import UserError
from glax.layers import Mamba
from glax.layers.sequence_parallel import linear_attention
from glax.training import MeshConfig
from glax.training.loop import choose_microbatches, plan_and_trace
from glax.training.sharding import check_divisible, make_mesh, place_batch, use_mesh
from glax.training.state import plan_state

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "sequence 8": MeshConfig(sequence=8),
    "tensor 2": MeshConfig(tensor=2),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 2 x sequence 2 x tensor 2": MeshConfig(data=2, sequence=2, tensor=2),
}


# Convolutions and softmax attention look across the edges of shards too, and documents straddle them: rows of 192 hold
# several, of 25 to 600 tokens.
HYBRID = {"attention_layers": (1,), "short_conv_width": 4, "remat": "full"}
MODELS = {"gla": {}, "hybrid": HYBRID}


@pytest.fixture(scope="module")
def steps_on(tiny_config):
    """``steps_on(mesh_config, model)``: losses of twenty steps, the last state, and the HLO of the step."""

    @functools.cache
    def run(mesh_config: MeshConfig, model: str):
        config = tiny_config(mesh=mesh_config)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **MODELS[model]))
        devices = (mesh_config.data or 1) * mesh_config.fsdp * mesh_config.sequence * mesh_config.tensor
        mesh = make_mesh(mesh_config, jax.devices()[:devices])
        batches = train_batches(prepare(config.data, quiet=True), config.data)
        with use_mesh(mesh):
            plan, lowered = plan_and_trace(config, mesh, 1)
            compiled = lowered.compile()
            state = plan.initialize()
            losses = []
            for _ in range(config.steps):
                state, metrics = compiled(state, place_batch(next(batches), mesh))
                losses.append(float(metrics["loss"]))
        batches.close()
        return losses, state, compiled.as_text()

    return run


def assert_equal_one_devices(steps_on, mesh: MeshConfig, model: str):
    one, one_state, _ = steps_on(MeshConfig(), model)
    losses, state, _ = steps_on(mesh, model)
    assert one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(losses, one, rtol=0, atol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (state.params, one_state.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_parameters_equal_one_devices(steps_on, mesh: str):
    assert_equal_one_devices(steps_on, MESHES[mesh], "gla")


def test_a_hybrid_equals_one_device(steps_on):
    assert_equal_one_devices(steps_on, MeshConfig(fsdp=4, sequence=2), "hybrid")


def test_a_state_space_layer_equals_one_device():
    """Scan and convolution, and what their weights, which all shards share, are told of the tokens of each."""
    layer = Mamba(32, dtype=np.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 32, 32))
    documents = np.repeat(np.array([[1, 1, 2, 2, 2, 1, 1, 1], [1, 2, 2, 2, 2, 2, 2, 3]], np.int32), 4, 1)

    def gradients(layer, x):
        return jax.grad(lambda layer, x: jax.numpy.sum(layer(x, segment_ids=documents)[0] ** 2), (0, 1))(layer, x)

    want = jax.jit(gradients)(layer, x)
    with use_mesh(make_mesh(MeshConfig(sequence=4), jax.devices()[:4])):
        got = jax.jit(gradients)(layer, x)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.max(np.abs(y))))


@pytest.mark.parametrize("mesh", ["fsdp 8", "sequence 8", "data 2 x fsdp 2 x tensor 2"])
def test_parameters_and_moments_lie_in_pieces(steps_on, mesh: str):
    _, state, _ = steps_on(MESHES[mesh], "gla")
    pieces = MESHES[mesh].fsdp * MESHES[mesh].tensor * MESHES[mesh].sequence
    total = held = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        total += leaf.size
        held += leaf.addressable_shards[0].data.size
    # Norms, the low-rank gate and counters are the small rest that is not cut over every axis.
    assert total / pieces <= held < 1.15 * total / pieces


def test_no_device_holds_the_whole_state_at_first(tiny_config):
    """Results and temporary memory of the compiled initialisation, per device."""
    config = tiny_config(mesh=MeshConfig(fsdp=8))
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh):
        memory = plan_state(config, mesh).initialize.lower().compile().memory_analysis()
    parameters = 4 * config.model.num_parameters()
    assert memory.output_size_in_bytes < 1.2 * 3 * parameters / 8
    assert memory.temp_size_in_bytes < parameters / 2


def gathers_with_tokens(hlo: str) -> list[str]:
    """The all-gathers in ``hlo`` of arrays that have a token axis: the length alone has a factor of 3."""
    found = []
    for line in hlo.splitlines():
        instruction = re.search(r"= (.*?) all-gather(?:-start)?\(", line)
        if instruction is None:
            continue
        for dims in re.findall(r"\w+\[([\d,]*)\]", instruction[1]):
            if math.prod(int(size) for size in dims.split(",") if size) % 3 == 0:
                found.append(line.strip())
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_no_token_array_is_gathered(steps_on, mesh: str):
    """q, k, v, log_alpha and every other activation stay where they are, forward and backward."""
    _, _, hlo = steps_on(MESHES[mesh], "gla")
    assert gathers_with_tokens(hlo) == []
    if MESHES[mesh].fsdp * MESHES[mesh].sequence > 1:
        assert "all-gather" in hlo, "parameters are gathered under fsdp: without any, the search finds nothing"


@pytest.mark.parametrize("operand", [0, 3], ids=["q", "log_alpha"])
def test_a_gathered_operand_is_found(tiny_config, monkeypatch, request, operand: int):
    """The search above sees what it looks for: one operand, replicated on purpose before shares of it are taken."""

    def replicating(operator, *operands, **options):
        operands = list(operands)
        operands[operand] = jax.lax.with_sharding_constraint(operands[operand], PartitionSpec())
        return linear_attention(operator, *operands, **options)

    monkeypatch.setattr(gla_layer, "linear_attention", replicating)
    jax.clear_caches()  # blocks that were traced before
    request.addfinalizer(jax.clear_caches)
    config = tiny_config(mesh=MeshConfig(fsdp=8))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh):
        _, lowered = plan_and_trace(config, mesh, 1)
        assert gathers_with_tokens(lowered.compile().as_text())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "data 3 needs 3 devices and there are 8"),
        (MeshConfig(data=2, fsdp=2), "needs 4 devices and there are 8"),
        (MeshConfig(fsdp=3), "does not divide the 8 devices"),
        (MeshConfig(tensor=0), "mesh.tensor is 0"),
        (MeshConfig(sequence=3), "does not divide the 8 devices"),
    ],
)
def test_a_mesh_must_fit_the_devices(mesh: MeshConfig, message: str):
    with pytest.raises(UserError, match=message):
        make_mesh(mesh)


def test_devices_that_are_not_named_go_to_data():
    assert make_mesh(MeshConfig(fsdp=2, tensor=2)).shape == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


def test_a_mesh_must_divide_heads_batch_and_parameters(tiny_config):
    config = tiny_config(mesh=MeshConfig(fsdp=2, tensor=4))
    mesh = make_mesh(config.mesh)
    with pytest.raises(UserError, match=r"mesh.tensor 4 does not divide the model's 2 heads"):
        check_divisible(mesh, config.model, config.data, 1)
    model = dataclasses.replace(config.model, num_heads=4, num_kv_heads=2)
    with pytest.raises(UserError, match="num_kv_heads"):
        check_divisible(mesh, model, config.data, 1)
    model = dataclasses.replace(config.model, num_heads=4)
    check_divisible(mesh, model, config.data, 4)
    with pytest.raises(UserError, match=r"microbatches 3 = 6"):
        check_divisible(mesh, model, config.data, 3)
    by_sequence = make_mesh(MeshConfig(sequence=8))
    with pytest.raises(UserError, match=r"mesh.sequence 8 does not divide data.sequence_length 100"):
        check_divisible(by_sequence, model, dataclasses.replace(config.data, sequence_length=100), 1)
    with pytest.raises(UserError, match=r"mesh.sequence 8 leaves 2 tokens in a shard"):
        convolved = dataclasses.replace(model, short_conv_width=4)
        check_divisible(by_sequence, convolved, dataclasses.replace(config.data, sequence_length=16), 1)
    with use_mesh(mesh), pytest.raises(UserError, match=r"mesh.tensor 4 does not divide the vocab axis of embedding"):
        plan_and_trace(dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=258)), mesh, 1)


def test_microbatches_keep_a_device_at_its_tokens(tiny_config):
    config = tiny_config()

    def choose(rows: int, length: int, mesh: MeshConfig, given: int | None = None) -> int:
        data = dataclasses.replace(config.data, batch_size=rows, sequence_length=length)
        return choose_microbatches(dataclasses.replace(config, data=data, microbatches=given), make_mesh(mesh))

    assert choose(256, 2048, MeshConfig(fsdp=8)) == 2
    assert choose(256, 2048, MeshConfig(tensor=8)) == 16
    assert choose(24, 2048, MeshConfig(tensor=8)) == 2
    assert choose(8, 65536, MeshConfig(tensor=8)) == 8
    assert choose(16, 256, MeshConfig()) == 1
    assert choose(8, 65536, MeshConfig(sequence=8)) == 2
    assert choose(256, 2048, MeshConfig(fsdp=8), given=4) == 4

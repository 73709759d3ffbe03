"""``--mesh auto``: a mesh from the devices, the model and the shape of a batch, and why."""

import math
from typing import NamedTuple

from glax.errors import UserError
from glax.training.config import MeshConfig, TrainConfig

# Bytes that a parameter takes: itself, its gradient and two moments, all float32.
STATE_BYTES = 16
# A device takes at most this many tokens at a time where config.microbatches is None.
MICROBATCH_TOKENS = 32768
# Share of a device's memory that is planned with: the rest is the allocator's and the runtime's.
USABLE = 0.85


class MeshChoice(NamedTuple):
    """A mesh with every axis given, and the reasons in one line."""

    mesh: MeshConfig
    why: str


def choose_mesh(config: TrainConfig, devices: int, memory: float, host: int) -> MeshChoice:
    """The simplest mesh that fits, by an estimate (``estimated_bytes``), of ``devices`` with ``memory`` bytes each.

    ``host`` devices share a host. The batch is divided as far as it has rows, and the sequence by what is left; copies
    of the state stay whole where they fit, else it is cut by fsdp, within a host if that is enough and over as many
    hosts as it takes otherwise. Tensor parallelism, which sends the most, comes last. Raises UserError where nothing
    fits.
    """
    rows, length = config.data.batch_size, config.data.sequence_length
    across = math.gcd(rows, devices)
    sequence = math.gcd(length, devices // across)
    tensor = devices // (across * sequence)
    said = [f"{rows} rows over {across}" if across > 1 else f"{rows} row{'s' * (rows > 1)}"]
    if sequence > 1:
        said.append(f"the {length:,} tokens of a row over {sequence}, for the rows are too few for {devices} devices")
    if tensor > 1:
        if any(heads and heads % tensor for heads in (config.model.num_heads, config.model.num_kv_heads)):
            raise UserError(
                f"no mesh of {devices} devices divides {rows} rows of {length} tokens and {config.model.num_heads} "
                "heads: make data.batch_size a multiple of the devices, or give the mesh by hand"
            )
        said.append(f"heads and MLP over {tensor}, for the length is no multiple of more")
    pieces = sorted({math.gcd(across, size) for size in (1, host, *(host * 2**n for n in range(1, 20)))} | {across})
    for fsdp in pieces:
        if across % fsdp:
            continue
        mesh = MeshConfig(data=across // fsdp, fsdp=fsdp, sequence=sequence, tensor=tensor)
        needed = estimated_bytes(config, mesh)
        if needed <= USABLE * memory:
            break
    else:
        raise UserError(
            f"{config.model.num_parameters() / 1e9:.2f} B parameters with rows of {length:,} tokens need about "
            f"{needed / 1e9:.0f} GB on each of {devices} devices of {memory / 1e9:.0f} GB: use more devices, "
            f"{'model.remat full, ' if config.model.remat != 'full' else ''}a smaller model or shorter rows"
        )
    if fsdp > 1:
        said.append(f"the state in {fsdp * sequence} pieces, since whole it would not fit")
    if math.isfinite(memory):
        said.append(f"about {needed / 1e9:.1f} of {memory / 1e9:.0f} GB on each")
    return MeshChoice(mesh, "; ".join(said))


def estimated_bytes(config: TrainConfig, mesh: MeshConfig) -> float:
    """Memory of a training step on one device: 5 to 25% above what XLA compiled for experiments/scaling.py.

    The state's share, and the residual stream of every block in the compute dtype for the tokens that are in flight,
    with what one block (full remat) or all of them (else) hold besides.
    """
    model, width = config.model, config.model.dtype.itemsize
    shards = mesh.fsdp * mesh.sequence * mesh.tensor
    state = STATE_BYTES * model.num_parameters() / shards
    rows = -(-config.data.batch_size // ((mesh.data or 1) * mesh.fsdp))
    row = config.data.sequence_length / mesh.sequence
    tokens = min(rows * row, max(MICROBATCH_TOKENS, row))
    # Per token of a block: about eight arrays of the stream's width, and three of the MLP's.
    inside = tokens * width * (8 * model.hidden_size + 3 * model.mlp_width) / mesh.tensor
    held = {"full": 1.5, "matmuls": model.num_layers * 0.7, "none": model.num_layers * 1.3}[model.remat]
    stream = tokens * width * model.hidden_size * model.num_layers
    return 1.27 * (state + stream + held * inside)

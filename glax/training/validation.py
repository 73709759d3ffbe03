"""One pass over the validation text."""

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from glax.data import ValidationBatches
from glax.training.sharding import place_batch
from glax.training.state import Parameters

AHEAD = 3  # batches under way: all would wait in memory, and fill the queues of processes that wait for each other


def validate(
    loss: Callable[[Parameters, dict], Float[Array, ""]], params: Parameters, batches: ValidationBatches, mesh: Mesh
) -> dict[str, float]:
    """Mean loss per token in nats, its perplexity, and bits per byte of the text, over all ``batches``.

    ``loss(params, batch)`` is the summed loss of a batch. Bits per byte charges the end tokens of documents too.
    """
    sums = []
    for batch in batches:
        sums.append(loss(params, place_batch(batch, mesh)))
        jax.block_until_ready(sums[-AHEAD:][0])
    total = math.fsum(float(part) for part in jax.device_get(sums))
    mean = total / batches.num_tokens
    return {
        "validation_loss": mean,
        "validation_perplexity": math.exp(min(mean, 700.0)),
        "validation_bits_per_byte": total / math.log(2) / batches.num_bytes,
    }

"""What a model holds and computes, counted without making it."""

import functools
import math

import jax
from flax import nnx

from glax.layers import Linear
from glax.models.config import ModelConfig
from glax.models.language_model import LanguageModel


@functools.cache
def abstract_model(config: ModelConfig) -> LanguageModel:
    """The model with shapes in place of arrays."""
    return jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs for each token of a sequence of ``length``, forward and backward, as model FLOPs utilization counts them.

    Two for each weight that a token is multiplied with, and the mixers' own (of the recurrence for GLA, of the causal
    half for softmax attention); the backward pass has twice those of the forward pass. Recomputation does not count.
    """
    model = abstract_model(config)
    weights = sum(math.prod(module.kernel.shape) for _, module in nnx.iter_modules(model) if isinstance(module, Linear))
    if config.tie_embeddings:
        weights += config.vocab_size * config.hidden_size
    return 3.0 * (2 * weights + sum(block.flops_per_token(length) for block in model.blocks))

"""Cross entropy of a softmax over a large vocabulary, without the logits of all tokens at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def softmax_cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "D vocab"],
    targets: Int[Array, "N"],
    *,
    block: int = 2048,
) -> Float[Array, "N"]:
    """Negative log likelihood of each target in nats: logsumexp(h W) - (h W)[target], float32.

    The logits of at most `block` tokens (over all devices) are held at a time, forward or backward. Products take bfloat16 operands when
    hidden and unembedding are both bfloat16, else float32 in full precision; sums are float32. A block takes tokens a stride apart, so that N may
    be sharded over devices, and vocab too.

    Raises ValueError naming argument, got, and wanted for a wrong rank, shape or dtype.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {hidden.shape}, wanted [N, D]")
    tokens, width = hidden.shape
    if unembedding.ndim != 2 or unembedding.shape[0] != width:
        raise ValueError(f"unembedding: got shape {unembedding.shape}, wanted [D={width}, vocab]")
    if targets.shape != (tokens,) or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets: got {targets.dtype} of shape {targets.shape}, wanted integers of shape [N={tokens}]"
        )
    if block < 1:
        raise ValueError(f"block: got {block}, wanted at least 1")
    blocks = -(-tokens // block)
    padding = -tokens % blocks
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))
    return _by_block(blocks, hidden, unembedding, targets)[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_block(blocks, hidden, unembedding, targets):
    return _forward(blocks, hidden, unembedding, targets)[0]


def _forward(blocks, hidden, unembedding, targets):
    def one_block(_, index):
        h, target = _block(hidden, blocks, index), _block(targets, blocks, index)
        logits = _product("nd,dv->nv", h, unembedding)
        total = jax.nn.logsumexp(logits, -1)
        return None, (total - jnp.sum(jnp.where(_one_hot(target, logits), logits, 0), -1), total)

    _, (loss, total) = jax.lax.scan(one_block, None, jnp.arange(blocks))
    loss, total = loss.T.reshape(-1), total.T.reshape(-1)
    return loss, (hidden, unembedding, targets, total)


def _backward(blocks, residuals, d_loss):
    hidden, unembedding, targets, total = residuals

    def one_block(d_unembedding, index):
        h, target, log_total, d = (_block(x, blocks, index) for x in (hidden, targets, total, d_loss))
        logits = _product("nd,dv->nv", h, unembedding)
        d_logits = d[:, None] * (jnp.exp(logits - log_total[:, None]) - _one_hot(target, logits))
        d_logits = d_logits.astype(logits_dtype)
        d_hidden = _product("nv,dv->nd", d_logits, unembedding)
        return d_unembedding + _product("nd,nv->dv", h, d_logits), d_hidden.astype(hidden.dtype)

    logits_dtype = jnp.result_type(hidden.dtype, unembedding.dtype)
    d_unembedding, d_hidden = jax.lax.scan(one_block, jnp.zeros(unembedding.shape, jnp.float32), jnp.arange(blocks))
    d_hidden = jnp.swapaxes(d_hidden, 0, 1).reshape(hidden.shape)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None


_by_block.defvjp(_forward, _backward)


def _block(x, blocks, index):
    """Rows index, index + blocks, index + 2 blocks, ...: each device that holds a run of rows holds its share of every block."""
    return jax.lax.dynamic_index_in_dim(x.reshape(-1, blocks, *x.shape[1:]), index, 1, keepdims=False)


def _one_hot(target, logits):
    return target[:, None] == jax.lax.broadcasted_iota(target.dtype, logits.shape, 1)


def _product(equation, x, y):
    dtype = jnp.bfloat16 if x.dtype == y.dtype == jnp.bfloat16 else jnp.float32
    return jnp.einsum(
        equation,
        x.astype(dtype),
        y.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

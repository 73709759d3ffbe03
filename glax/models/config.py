"""What a model is: plain fields, checked."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from glax.errors import UserError
from glax.layers import FEATURE_MAPS, Gate

Mixer = Literal["gla", "attention", "retnet", "mamba"]
Remat = Literal["none", "full", "matmuls"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model. Raises UserError for values that make none."""

    vocab_size: int = 32000
    """Tokens of the vocabulary."""

    hidden_size: int = 1024
    """Width of the residual stream."""

    num_layers: int = 24
    """Blocks, each a token mixer and an MLP."""

    mixer: Mixer = "gla"
    """Token mixer of every block that is not in attention_layers: gated linear attention, softmax attention (with
    an MLP that is a Llama block, Transformer++), RetNet's retention, or Mamba's selective state space (version 1)."""

    num_heads: int = 4
    """Query heads."""

    num_kv_heads: int | None = None
    """Heads of keys, values and gates, a divisor of num_heads. None: as many as query heads."""

    expand_k: float = 0.5
    """Width of all keys together, as a multiple of hidden_size."""

    expand_v: float = 1.0
    """Width of all values together, as a multiple of hidden_size; Mamba's inner width likewise."""

    gate: Gate = "channel"
    """Decay of gated linear attention's memory: channel, one data-dependent number per head and key channel; scalar,
    one per head; fixed, RetNet's constants; none, no decay."""

    gate_rank: int = 16
    """Rank of the map from the input to the gates."""

    gate_temperature: float = 16.0
    """tau: gates are sigmoid(.)^(1/tau)."""

    clamp_min: float | None = None
    """Lower bound of the gates' logarithms."""

    feature_map: str | None = None
    """Function applied to queries and keys: relu, sigmoid, silu, swish, sqrelu or gelu."""

    output_gate: bool = True
    """Multiply the mixer's normed output by a swish gate."""

    short_conv_width: int | None = None
    """Taps of a causal convolution on queries, keys and values. None: no convolution, and Mamba's, which it always
    has, takes 4."""

    state_size: int = 16
    """Numbers that Mamba remembers per channel."""

    attention_layers: tuple[int, ...] = ()
    """Depths, from 0, of the blocks that mix tokens by softmax attention."""

    attention_heads: int | None = None
    """Query heads of softmax attention. None: num_heads."""

    attention_kv_heads: int | None = None
    """Key and value heads of softmax attention, a divisor of its query heads. None: as many as those."""

    attention_window: int | None = None
    """Tokens that softmax attention sees, the current one included. None: all."""

    rope_base: float = 10000.0
    """Base of the rotary frequencies of softmax attention and retention."""

    mlp_size: int | None = None
    """Width of the SwiGLU. None: 8/3 of hidden_size, rounded up to a multiple of 256. 0: no MLP."""

    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""

    tie_embeddings: bool = False
    """Use the embedding matrix, transposed, for the logits."""

    initializer_range: float = 0.02
    """Standard deviation of the initial matrices."""

    compute_dtype: str = "bfloat16"
    """Type of matrix products and of the residual stream: bfloat16 or float32. Parameters, norms, states,
    logits and the computation of gates are float32."""

    remat: Remat = "none"
    """What the backward pass computes again: none; full, everything in a block; matmuls, all but a block's matrix
    products and its token mixing."""

    scan_layers: bool = True
    """Stack the parameters of equal blocks. False: each its own."""

    unroll_layers: bool | None = None
    """Run stacked blocks one by one, which is faster and needs less memory than a scan over them, but compiles longer.
    None: on GPUs, but for full remat on several."""

    implementation: str | None = None
    """Kernel of the recurrent mixers. None: the fastest that runs here."""

    def __post_init__(self):
        # A config read from JSON has a list here.
        object.__setattr__(self, "attention_layers", tuple(sorted(set(self.attention_layers))))
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "gate_rank", "state_size"):
            _at_least_one(name, getattr(self, name))
        optional = ("num_kv_heads", "attention_heads", "attention_kv_heads", "attention_window", "short_conv_width")
        for name in optional:
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name in ("expand_k", "expand_v", "gate_temperature", "norm_eps", "initializer_range", "rope_base"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.clamp_min is not None and not self.clamp_min <= 0:
            raise UserError(f"clamp_min is {self.clamp_min}: it must not be positive")
        if self.mlp_size is not None and self.mlp_size < 0:
            raise UserError(f"mlp_size is {self.mlp_size}: give a width, 0 for no MLP, or leave it out")
        _one_of("mixer", self.mixer, get_args(Mixer))
        _one_of("gate", self.gate, get_args(Gate))
        _one_of("remat", self.remat, get_args(Remat))
        _one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        if self.feature_map is not None:
            _one_of("feature_map", self.feature_map, tuple(FEATURE_MAPS))
        for depth in self.attention_layers:
            if not 0 <= depth < self.num_layers:
                raise UserError(
                    f"attention_layers has {depth}: the model's {self.num_layers} layers are 0 to {self.num_layers - 1}"
                )
        self._check_heads()

    def _check_heads(self) -> None:
        mixers = set(self.mixers)
        if "gla" in mixers:
            _divides("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)
            if self.gate != "channel" and self.num_kv_heads not in (None, self.num_heads):
                raise UserError(f'gate "{self.gate}" needs as many kv heads as heads: leave num_kv_heads out')
        for name in ("expand_k", "expand_v"):
            width = getattr(self, name) * self.hidden_size
            multiple = self.num_heads if mixers & {"gla", "retnet"} else 1
            if mixers != {"attention"} and (width != round(width) or round(width) % multiple):
                raise UserError(
                    f"{name} {getattr(self, name)} x hidden_size {self.hidden_size} is {width:g}: it must be a "
                    f"whole multiple of num_heads {self.num_heads}"
                )
        if "retnet" in mixers and round(self.expand_k * self.hidden_size) % (2 * self.num_heads):
            raise UserError(
                f"expand_k {self.expand_k} gives {self.num_heads} heads of odd width, and rotary positions need an "
                "even one: change expand_k or num_heads"
            )
        if "attention" in mixers:
            heads = self.attention_heads or self.num_heads
            _divides("attention_kv_heads", self.attention_kv_heads, "attention_heads", heads)
            if self.hidden_size % (2 * heads):
                raise UserError(
                    f"hidden_size {self.hidden_size} over {heads} attention heads is no even width, which rotary "
                    "positions need: change attention_heads"
                )

    @property
    def mixers(self) -> tuple[str, ...]:
        """The token mixer of each block, first to last."""
        return tuple("attention" if depth in self.attention_layers else self.mixer for depth in range(self.num_layers))

    @property
    def mlp_width(self) -> int:
        """Width of the SwiGLU: ``mlp_size``, or 256 ceil(int(8d/3) / 256)."""
        return 256 * -(-(8 * self.hidden_size // 3) // 256) if self.mlp_size is None else self.mlp_size

    @property
    def dtype(self) -> jnp.dtype:
        """``compute_dtype`` as a dtype."""
        return jnp.dtype(self.compute_dtype)

    def num_parameters(self) -> int:
        """Parameters of the model, embeddings included; nothing is allocated."""
        from glax.models.accounting import num_parameters

        return num_parameters(self)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the matrix products, forward and backward, for each token of a sequence of ``length``."""
        from glax.models.accounting import flops_per_token

        return flops_per_token(self, length)


def _at_least_one(name, value):
    if value < 1:
        raise UserError(f"{name} is {value}: it must be at least 1")


def _one_of(name, value, choices):
    if value not in choices:
        raise UserError(f'{name} is "{value}": choose one of {", ".join(choices)}')


def _divides(name, value, of_name, of):
    if value is not None and of % value:
        raise UserError(f"{name} {value} does not divide {of_name} {of}: use a divisor")

"""A language model laid out for one token at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers import GatedLinearAttention
from glax.models.blocks import Block, Stack, unstacked
from glax.models.config import ModelConfig
from glax.models.language_model import LanguageModel
from kernels import gla_decode, matvec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GLABlock:
    """The weights of a GLA block as its five kernels read them: rows are outputs, what reads the same input is one.

    Attributes:
        inputs: rows of q, k, v, the gates' low-rank input, and the output gate.
        gate_and_up: rows of the MLP's gate, then of its up projection.
    """

    mixer_norm: Float[Array, "D"]
    inputs: Float[Array, "_ D"]
    gate_up: Float[Array, "R GK"]
    gate_bias: Float[Array, "GK"]
    o_norm: Float[Array, "V"]
    output: Float[Array, "D HV"]
    mlp_norm: Float[Array, "D"] | None
    gate_and_up: Float[Array, "_ D"] | None
    down: Float[Array, "D I"] | None
    has_output_gate: bool = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(metadata={"static": True})
    clamp_min: float | None = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})

    def step(self, x: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        """One token, as ``Block.step``."""
        projected = matvec(x, self.inputs, norm_weight=self.mixer_norm, eps=self.eps)
        o, memory = gla_decode(
            projected,
            self.gate_up,
            self.gate_bias,
            state.memory,
            temperature=self.temperature,
            clamp_min=self.clamp_min,
        )
        gate = projected if self.has_output_gate else None
        x = matvec(o, self.output, norm_weight=self.o_norm, eps=self.eps, gate=gate, residual=x)
        if self.down is not None:
            hidden = matvec(x, self.gate_and_up, norm_weight=self.mlp_norm, eps=self.eps, swiglu=True)
            x = matvec(hidden, self.down, residual=x)
        return x, state._replace(memory=memory)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """What ``LanguageModel`` is to generation (``prefill``, ``read``, ``step``, states), with a faster ``step``.

    Prompts are read by the model itself; the steps have their own copy of the weights of its GLA blocks, merged and
    transposed. The state is a list with an entry for each layer, so that each is updated where it lies.
    """

    model: LanguageModel
    blocks: list[GLABlock | Block]
    norm: Float[Array, "D"]
    unembedding: Float[Array, "vocab D"]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def init_state(self, batch_size: int, max_length: int | None = None) -> list[Any]:
        """As ``LanguageModel.init_state``, by layers."""
        return self.model.by_layer(self.model.init_state(batch_size, max_length))

    def by_layer(self, state: list[Any]) -> list[Any]:
        """The state: it has this form."""
        return state

    def by_element(self, state: list[Any]) -> list[Any]:
        """The state from ``by_layer``: as it is."""
        return state

    def read(
        self, tokens: Int[Array, "B T"], state: list[Any], *, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """As ``LanguageModel.read``."""
        hidden, state = self.model.read(tokens, self.model.by_element(state), lengths=lengths)
        return hidden, self.model.by_layer(state)

    def prefill(
        self, tokens: Int[Array, "B T"], state: list[Any], *, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B vocab"], list[Any]]:
        """As ``LanguageModel.prefill``."""
        logits, state = self.model.prefill(tokens, self.model.by_element(state), lengths=lengths)
        return logits, self.model.by_layer(state)

    def step(self, tokens: Int[Array, "B"], state: list[Any]) -> tuple[Float[Array, "B vocab"], list[Any]]:
        """One token of each row: the logits after it, float32, and the new state."""
        x = self.model.embedding[tokens].astype(self.config.dtype)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.step(x, before)
            after.append(new)
        eps = self.config.norm_eps
        return matvec(x, self.unembedding, norm_weight=self.norm, eps=eps, dtype=jnp.float32), after


def cast(model: LanguageModel, dtype: DTypeLike) -> LanguageModel:
    """The model with its matrices in ``dtype``; norms and biases, which are small, stay as they are."""
    # A stacked norm has two axes: what is a matrix is told by its name, not by its rank.
    vectors = ("weight", "bias")

    def leaf(path, array):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").rsplit(".", 1)[-1]
        return array if name in vectors else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, model)


@jax.jit
def decoder(model: LanguageModel) -> Decoder:
    """``model`` for decoding: its matrices in the compute dtype, once for prompts and once more for steps."""
    model = cast(model, model.config.dtype)
    blocks = []
    for element in model.blocks:
        layers = unstacked(element.block, element.count) if isinstance(element, Stack) else [element]
        blocks += [_packed(block) if _is_packable(block) else block for block in layers]
    matrix = model.embedding[...] if model.lm_head is None else model.lm_head.kernel[...].T
    return Decoder(model, blocks, model.norm.weight[...], matrix)


def _is_packable(block: Block) -> bool:
    mixer = block.mixer
    plain = isinstance(mixer, GatedLinearAttention) and mixer.q_conv is None and mixer.feature_map is None
    return plain and mixer.gate == "channel"


def _packed(block: Block) -> GLABlock:
    mixer, mlp = block.mixer, block.mlp
    projections = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gk_down, mixer.g_proj]
    return GLABlock(
        mixer_norm=block.mixer_norm.weight[...],
        inputs=_rows(*(linear for linear in projections if linear is not None)),
        gate_up=mixer.gk_up.kernel[...],
        gate_bias=mixer.gk_up.bias[...],
        o_norm=mixer.o_norm.weight[...],
        output=_rows(mixer.o_proj),
        mlp_norm=None if mlp is None else block.mlp_norm.weight[...],
        gate_and_up=None if mlp is None else _rows(mlp.gate_proj, mlp.up_proj),
        down=None if mlp is None else _rows(mlp.down_proj),
        has_output_gate=mixer.g_proj is not None,
        temperature=mixer.gate_temperature,
        clamp_min=mixer.clamp_min,
        eps=block.mixer_norm.eps,
    )


def _rows(*linears) -> Float[Array, "out in"]:
    return jnp.concatenate([linear.kernel[...].T for linear in linears])

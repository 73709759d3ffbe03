"""Which tensor of a checkpoint each parameter is, and how it lies there."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from glax.errors import UserError
from glax.models import ModelConfig
from glax.models.accounting import abstract_model

# Our names and the checkpoints', within a layer.
_FLA = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.q_proj.kernel": "attn.q_proj.weight",
    "mixer.k_proj.kernel": "attn.k_proj.weight",
    "mixer.v_proj.kernel": "attn.v_proj.weight",
    "mixer.g_proj.kernel": "attn.g_proj.weight",
    "mixer.o_proj.kernel": "attn.o_proj.weight",
    "mixer.gk_down.kernel": "attn.gk_proj.0.weight",
    "mixer.gk_up.kernel": "attn.gk_proj.1.weight",
    "mixer.gk_up.bias": "attn.gk_proj.1.bias",
    "mixer.q_conv.weight": "attn.q_conv1d.weight",
    "mixer.k_conv.weight": "attn.k_conv1d.weight",
    "mixer.v_conv.weight": "attn.v_conv1d.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_proj.kernel": "mlp.gate_proj.weight",
    "mlp.up_proj.kernel": "mlp.up_proj.weight",
    "mlp.down_proj.kernel": "mlp.down_proj.weight",
}
_LLAMA = {
    name: theirs.replace("attn.", "self_attn.", 1)
    .replace("attn_norm", "input_layernorm")
    .replace("mlp_norm", "post_attention_layernorm")
    for name, theirs in _FLA.items()
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint spells a model.

    Attributes:
        kind: "gla", "retnet", "transformer" or "llama".
        fused_norm: the norm of a mixer's output is called g_norm_swish_gate and not g_norm.
        fused_mlp: mlp.gate_proj holds the rows of gate and up, as before February 2025.
    """

    kind: str
    fused_norm: bool = True
    fused_mlp: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, or some rows of it, and where its values go.

    Attributes:
        name: in the checkpoint.
        shape: of the whole tensor there.
        rows: from which row to which one, where it is shared; all when None.
        path: of the parameter, dotted.
        layer: index in the parameter's leading axis of layers; None where it has none.
        axes: logical names of the axes, as the tensor has them.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None
    path: str
    layer: int | None
    axes: tuple[str | None, ...]

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])

    @property
    def turn(self) -> str:
        """How it lies there beside how it lies here: "matrix", [out, in]; "taps", [C, 1, W]; or "same"."""
        return "taps" if self.path.endswith("conv.weight") else "matrix" if self.path.endswith(".kernel") else "same"

    @property
    def our_axes(self) -> tuple[str | None, ...]:
        """Logical names of the parameter's axes, without that of layers."""
        return {"taps": self.axes[:1] + self.axes[2:], "matrix": self.axes[::-1], "same": self.axes}[self.turn]


def ours(turn: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A tensor as the parameter has it."""
    return x[:, 0] if turn == "taps" else x.T if turn == "matrix" else x


def theirs(turn: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The inverse of ``ours``."""
    return x[:, None] if turn == "taps" else ours(turn, x)


def layout_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """The spelling of a checkpoint with this config.json and these tensors."""
    kind = config["model_type"]
    fused_norm = config.get("fuse_norm", True) and config.get("use_output_gate", True)
    fused_mlp = kind != "llama" and not any(name.endswith(".mlp.up_proj.weight") for name in shapes)
    return Checkpoint(kind, fused_norm, fused_mlp and any(name.endswith(".mlp.gate_proj.weight") for name in shapes))


def tensors(config: ModelConfig, checkpoint: Checkpoint) -> list[Tensor]:
    """Every tensor of the model in the checkpoint's order, by layers; one that is shared stands there twice."""
    abstract = abstract_model(config)
    variables = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
    found, first = [], 0
    depth_of = {}
    for index, element in enumerate(abstract.blocks):
        depth_of[index] = first
        first += getattr(element, "count", 1)
    for path, variable in variables:
        axes = tuple(variable.get_metadata("out_sharding", None) or (None,) * variable.ndim)
        dotted = ".".join(str(part) for part in path)
        if path[0] != "blocks":
            found.append(
                (
                    -1 if dotted == "embedding" else first,
                    _tensor(dotted, dotted, None, variable.shape, axes, checkpoint),
                )
            )
            continue
        stacked = path[2] == "block"
        rest = ".".join(str(part) for part in path[3 if stacked else 2 :])
        shape, axes = (variable.shape[1:], axes[1:]) if stacked else (variable.shape, axes)
        for layer in range(variable.shape[0] if stacked else 1):
            depth = depth_of[path[1]] + layer
            tensor = _tensor(dotted, rest, depth, shape, axes, checkpoint)
            found.append((depth, dataclasses.replace(tensor, layer=layer if stacked else None)))
    # A shared tensor's first rows come first, since gate stands before up.
    return [tensor for _, tensor in sorted(found, key=lambda pair: (pair[0], pair[1].name, pair[1].rows or (0, 0)))]


def _tensor(path, name, depth, shape, axes, checkpoint) -> Tensor:
    llama = checkpoint.kind == "llama"
    rest = {
        "embedding": "model.embed_tokens.weight" if llama else "model.embeddings.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.kernel": "lm_head.weight",
    }
    layer = (
        _LLAMA
        if llama
        else _FLA | {"mixer.o_norm.weight": f"attn.{'g_norm_swish_gate' if checkpoint.fused_norm else 'g_norm'}.weight"}
    )
    known = rest if depth is None else layer
    if name not in known:
        raise UserError(f"the {checkpoint.kind} format has no place for the model's {name}: choose another format")
    theirs = known[name] if depth is None else f"model.layers.{depth}.{known[name]}"
    if path.endswith("conv.weight"):
        shape, axes = (shape[0], 1, shape[1]), (axes[0], None, axes[1])
    elif path.endswith(".kernel"):
        shape, axes = shape[::-1], axes[::-1]
    rows = None
    if checkpoint.fused_mlp and name in ("mlp.gate_proj.kernel", "mlp.up_proj.kernel"):
        width = shape[0]
        rows = (0, width) if "gate" in name else (width, 2 * width)
        shape, theirs = (2 * width, *shape[1:]), theirs.replace("up_proj", "gate_proj")
    return Tensor(theirs, tuple(shape), rows, path, None, axes)


def sharding_rules() -> dict[str, Any]:
    """Mesh axes of logical axes, as whoever set up the mesh has bound them; empty without a mesh."""
    from flax.core import spmd

    if jax.sharding.get_abstract_mesh().empty:
        return {}
    return dict(spmd.get_logical_axis_rules())


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical ones."""
    rules = sharding_rules()
    return PartitionSpec(*(rules.get(axis) for axis in axes))

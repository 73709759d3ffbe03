"""Logits, loss and every gradient of two checkpoints, against the PyTorch implementation that made them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from glax.models import LanguageModel, ModelConfig

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"

# Our names of a layer's parameters, and the checkpoints'. Matrices are transposed: ours are [in, out].
LAYER = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.q_proj.kernel": "attn.q_proj.weight",
    "mixer.k_proj.kernel": "attn.k_proj.weight",
    "mixer.v_proj.kernel": "attn.v_proj.weight",
    "mixer.g_proj.kernel": "attn.g_proj.weight",
    "mixer.o_proj.kernel": "attn.o_proj.weight",
    "mixer.gk_down.kernel": "attn.gk_proj.0.weight",
    "mixer.gk_up.kernel": "attn.gk_proj.1.weight",
    "mixer.gk_up.bias": "attn.gk_proj.1.bias",
    "mixer.o_norm.weight": "attn.g_norm_swish_gate.weight",
    "mixer.q_conv.weight": "attn.q_conv1d.weight",
    "mixer.k_conv.weight": "attn.k_conv1d.weight",
    "mixer.v_conv.weight": "attn.v_conv1d.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_proj.kernel": "mlp.gate_proj.weight",
    "mlp.up_proj.kernel": "mlp.up_proj.weight",
    "mlp.down_proj.kernel": "mlp.down_proj.weight",
}
REST = {
    "embedding": "model.embeddings.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}


def config_of(checkpoint: Path) -> ModelConfig:
    hub = json.loads((checkpoint / "config.json").read_text())
    return ModelConfig(
        vocab_size=hub["vocab_size"],
        hidden_size=hub["hidden_size"],
        num_layers=hub["num_hidden_layers"],
        num_heads=hub["num_heads"],
        num_kv_heads=hub["num_kv_heads"],
        expand_k=hub["expand_k"],
        expand_v=hub["expand_v"],
        clamp_min=hub["clamp_min"],
        feature_map=hub["feature_map"],
        short_conv_width=hub["conv_size"] if hub["use_short_conv"] else None,
        norm_eps=hub["norm_eps"],
        tie_embeddings=hub["tie_word_embeddings"],
        compute_dtype="float32",
        scan_layers=False,
    )


def hub_name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    if not name.startswith("blocks."):
        return REST[name]
    _, depth, name = name.split(".", 2)
    return f"model.layers.{depth}.{LAYER[name]}"


def ours(name: str, array: np.ndarray) -> np.ndarray:
    """An array of the checkpoint in our layout."""
    if name.endswith("conv1d.weight"):
        return array[:, 0]
    return array.T if array.ndim == 2 and name != "model.embeddings.weight" else array


def relative_rms(got, want) -> float:
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


@pytest.mark.parametrize("name", ["gla-base", "gla-conv-gqa-tied"])
def test_golden_checkpoint(name: str):
    checkpoint = GOLDEN / name
    if not checkpoint.is_dir():
        pytest.skip(f"the golden checkpoints are not here ({checkpoint.parent.name}/{name})")
    tensors, expected = load_file(checkpoint / "model.safetensors"), np.load(checkpoint / "io.npz")
    model = LanguageModel(config_of(checkpoint), rngs=nnx.Rngs(0))

    used = set()

    def assign(path, leaf):
        name = hub_name(path)
        used.add(name)
        array = ours(name, tensors[name])
        assert array.shape == leaf.shape, name
        return jnp.asarray(array)

    model = jax.tree_util.tree_map_with_path(assign, model)
    assert used == set(tensors)

    tokens = jnp.asarray(expected["input_ids"], jnp.int32)

    def loss(model):
        logits = model(tokens)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)
        return -jnp.mean(chosen), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    assert relative_rms(np.asarray(logits), expected["logits"]) < 1e-4
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = hub_name(path)
        error = relative_rms(np.asarray(gradient), ours(name, expected[f"grad/{name}"]))
        assert error < 1e-3, f"{name}: {error}"

"""Transformer++ and Mamba against the `transformers` library, with its weights copied.

What it computed lies in golden/, so that the comparison runs everywhere; where the library is installed, the models
are also made afresh.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from glax.models import LanguageModel, ModelConfig

GOLDEN = Path(__file__).with_name("golden")
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "compute_dtype": "float32",
    "scan_layers": False,
}
CONFIGS = {
    "llama": ModelConfig(mixer="attention", attention_kv_heads=2, mlp_size=48, **COMMON),
    "mamba": ModelConfig(
        mixer="mamba", expand_v=2.0, state_size=8, mlp_size=0, norm_eps=1e-5, tie_embeddings=True, **COMMON
    ),
}


def made_afresh(name: str) -> dict[str, np.ndarray]:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    spec = importlib.util.spec_from_file_location("transformers_models", GOLDEN / "transformers_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.arrays(name)


def copy_llama(model: LanguageModel, weights: dict[str, np.ndarray]) -> None:
    model.embedding[...] = weights.pop("model.embed_tokens.weight")
    model.norm.weight[...] = weights.pop("model.norm.weight")
    model.lm_head.kernel[...] = weights.pop("lm_head.weight").T
    for index, block in enumerate(model.blocks):
        prefix = f"model.layers.{index}."
        block.mixer_norm.weight[...] = weights.pop(prefix + "input_layernorm.weight")
        block.mlp_norm.weight[...] = weights.pop(prefix + "post_attention_layernorm.weight")
        for part, where in ((block.mixer, "self_attn."), (block.mlp, "mlp.")):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                if hasattr(part, name):
                    getattr(part, name).kernel[...] = weights.pop(f"{prefix}{where}{name}.weight").T


def copy_mamba(model: LanguageModel, weights: dict[str, np.ndarray]) -> None:
    model.embedding[...] = weights.pop("backbone.embeddings.weight")
    np.testing.assert_array_equal(weights.pop("lm_head.weight"), model.embedding[...])
    model.norm.weight[...] = weights.pop("backbone.norm_f.weight")
    for index, block in enumerate(model.blocks):
        prefix, mixer = f"backbone.layers.{index}.", block.mixer
        block.mixer_norm.weight[...] = weights.pop(prefix + "norm.weight")
        prefix += "mixer."
        mixer.in_proj.kernel[...], mixer.z_proj.kernel[...] = np.split(weights.pop(prefix + "in_proj.weight").T, 2, 1)
        mixer.conv.weight[...] = weights.pop(prefix + "conv1d.weight")[:, 0]
        mixer.conv.bias[...] = weights.pop(prefix + "conv1d.bias")
        mixer.x_proj.kernel[...] = weights.pop(prefix + "x_proj.weight").T
        mixer.dt_proj.kernel[...] = weights.pop(prefix + "dt_proj.weight").T
        mixer.dt_proj.bias[...] = weights.pop(prefix + "dt_proj.bias")
        mixer.a_log[...] = weights.pop(prefix + "A_log")
        mixer.d[...] = weights.pop(prefix + "D")
        mixer.out_proj.kernel[...] = weights.pop(prefix + "out_proj.weight").T


COPY = {"llama": copy_llama, "mamba": copy_mamba}


@pytest.mark.parametrize("source", ["kept", "made afresh"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, source: str):
    weights = load_file(GOLDEN / f"{name}.safetensors") if source == "kept" else made_afresh(name)
    tokens, logits = jnp.asarray(weights.pop("tokens")), weights.pop("logits")
    model = LanguageModel(CONFIGS[name], rngs=nnx.Rngs(0))
    COPY[name](model, weights)
    assert not weights, "all weights have a place"
    assert np.std(logits) > 0.5
    np.testing.assert_allclose(jax.jit(LanguageModel.__call__)(model, tokens), logits, atol=2e-4, rtol=1e-4)

"""Makes llama.safetensors and mamba.safetensors: small random models of the `transformers` library with their logits.

python -m pip install torch transformers safetensors
python tests/glax/golden/transformers_models.py
"""

from pathlib import Path

VOCABULARY, WIDTH, LAYERS = 61, 32, 2


def llama():
    """Grouped heads, untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            rms_norm_eps=1e-6,
            initializer_range=0.2,
            max_position_embeddings=64,
        )
    )


def mamba():
    """Tied embeddings, as Mamba's are."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            state_size=8,
            layer_norm_epsilon=1e-5,
            initializer_range=0.2,
            residual_in_fp32=True,
        )
    )


MODELS = {"llama": llama, "mamba": mamba}


def arrays(name: str) -> dict:
    """The model's weights by its own names, the tokens it was given and the logits it gave, as NumPy arrays."""
    import torch

    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith((".D", "conv1d.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # ones and zeros would hide what they do
        tokens = torch.randint(0, VOCABULARY, (2, 19))
        logits = model(tokens, use_cache=False).logits
    weights = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    return weights | {"tokens": tokens.numpy().astype("int32"), "logits": logits.numpy()}


if __name__ == "__main__":
    import torch
    import transformers
    from safetensors.numpy import save_file

    for name in MODELS:
        made_by = {"made_by": f"torch {torch.__version__}, transformers {transformers.__version__}"}
        save_file(arrays(name), Path(__file__).with_name(f"{name}.safetensors"), made_by)

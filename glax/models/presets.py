"""Models by name: the paper's, those it is compared with at equal parameters (within 2%), and small ones."""

from glax.models.config import ModelConfig

# Retention has 8 d^2 parameters where GLA has 4 d^2: a narrower MLP pays for it. Mamba has no MLP and twice the layers
# but one, which the input's and the output's embeddings would put 3% above the others.
_RETNET = {"mixer": "retnet", "expand_k": 1.0, "expand_v": 2.0}
_MAMBA = {"mixer": "mamba", "expand_v": 2.0, "mlp_size": 0}
_BYTES = {"vocab_size": 264, "hidden_size": 128, "num_layers": 3, "num_heads": 2}
_TINY = {"vocab_size": 264, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "scan_layers": False}

PRESETS = {
    "gla-340m": ModelConfig(hidden_size=1024, num_layers=24, num_heads=4),
    "gla-1.3b": ModelConfig(hidden_size=2048, num_layers=24, num_heads=4),
    "gla-7b": ModelConfig(hidden_size=4096, num_layers=32, num_heads=16),  # the paper has none: Llama's widths
    "transformer-340m": ModelConfig(mixer="attention", hidden_size=1024, num_layers=24, num_heads=16),
    "transformer-1.3b": ModelConfig(mixer="attention", hidden_size=2048, num_layers=24, num_heads=16),
    "retnet-340m": ModelConfig(hidden_size=1024, num_layers=24, num_heads=4, mlp_size=1408, **_RETNET),
    "retnet-1.3b": ModelConfig(hidden_size=2048, num_layers=24, num_heads=8, mlp_size=2816, **_RETNET),
    "mamba-340m": ModelConfig(hidden_size=1024, num_layers=47, **_MAMBA),
    "mamba-1.3b": ModelConfig(hidden_size=2048, num_layers=47, **_MAMBA),
    "gla-small-bytes": ModelConfig(mlp_size=384, **_BYTES),
    "transformer-small-bytes": ModelConfig(mlp_size=384, **_BYTES | {"mixer": "attention"}),
    "retnet-small-bytes": ModelConfig(mlp_size=224, **_BYTES | _RETNET),
    "mamba-small-bytes": ModelConfig(**_BYTES | _MAMBA | {"num_layers": 6, "expand_v": 1.875}),
    "gla-tiny": ModelConfig(**_TINY),
    "transformer-tiny": ModelConfig(mixer="attention", **_TINY),
    "retnet-tiny": ModelConfig(**_TINY | _RETNET),
    "mamba-tiny": ModelConfig(**_TINY | _MAMBA),
}

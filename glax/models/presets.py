"""Models by name: the paper's, and small ones."""

from glax.models.config import ModelConfig

PRESETS = {
    "gla-340m": ModelConfig(hidden_size=1024, num_layers=24, num_heads=4),
    "gla-1.3b": ModelConfig(hidden_size=2048, num_layers=24, num_heads=4),
    "gla-small-bytes": ModelConfig(vocab_size=264, hidden_size=128, num_layers=3, num_heads=2, mlp_size=384),
    "gla-tiny": ModelConfig(vocab_size=264, hidden_size=64, num_layers=2, num_heads=2, scan_layers=False),
}

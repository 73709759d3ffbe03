"""Models, data, training and experiments for Gated Linear Attention."""

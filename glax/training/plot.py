"""The plot of a run's curves."""

import os
from pathlib import Path

import numpy as np

from glax.training.metrics import Record


def plot_losses(records: list[Record], path: Path, title: str) -> None:
    """Training and validation loss by step, as a PNG at ``path``, which appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training (mean of {width} steps)")
    if validation:
        axes.plot(*np.array(validation).T, "o-", color="tab:orange", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a name may have dollar signs
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)

"""The results of kernel_speed.py as a markdown table and a plot."""

from pathlib import Path
from typing import Any

GRADIENTS = ("dq", "dk", "dv", "dlog_alpha")


def table(content: dict[str, Any]) -> str:
    """The rows as markdown, with what they ran on."""
    ran_on = content["ran_on"]
    lines = [
        f"{ran_on['device']}, jax {ran_on['versions']['jax']}, commit {ran_on['commit']}; {content['dtype']}, gates "
        f"{content['gates']}, {content['packed']} document(s) per row, copy {content['copy_gb_per_s']:.0f} GB/s.",
        "",
        "Medians in milliseconds; MiB of temporaries and outputs; worst gradient's error; -: not measured.",
        "",
        "| case (B, T, H, K, V) | implementation | forward | forward + backward | times floor | MiB | first call, s "
        "| error of o | of gradients | causal, same bits |",
        "|---" * 10 + "|",
    ]
    for row in content["rows"]:
        case = f"{row['case']} {tuple(content['shapes'][row['case']].values())}"
        if "both_ms" not in row:
            lines.append(f"| {case} | {row['implementation']} | {row['error'].replace('|', '/')}" + " |" * 8)
            continue
        ratio = [
            f"{row[f'{part}_ms'] / row[f'{part}_floor_ms']:.2f}" for part in ("forward", "both") if "errors" in row
        ]
        first = row.get("forward_first_call_s", 0) + row.get("both_first_call_s", 0)
        errors = row.get("errors", {})
        worst = f"{max(errors[name] for name in GRADIENTS):.1e}" if errors else "-"
        cells = [
            case,
            row["implementation"],
            f"{row['forward_ms']:.3f}",
            f"{row['both_ms']:.3f}",
            " / ".join(ratio) or "-",
            f"{row['forward_mib']:.0f} / {row['both_mib']:.0f}",
            f"{first:.1f}",
            f"{errors['o']:.1e}" if errors else "-",
            worst,
            f"{_yes(row['causal'])}, {_yes(row['same_bits'])}" if errors else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(content: dict[str, Any], path: Path) -> None:
    """Time and memory of forward + backward by length, like Figure 2: the family of shapes with the most lengths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if "both_ms" in row]
    lengths_of = {}
    for row in rows:
        lengths_of.setdefault(_family(content, row), set()).add(_length(content, row))
    family = max(lengths_of, key=lambda of: len(lengths_of[of]))
    rows = [row for row in rows if _family(content, row) == family]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("both_ms", "both_mib"), ("milliseconds", "MiB"), strict=True):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = sorted((_length(content, r), r[key]) for r in rows if r["implementation"] == name)
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        if key == "both_ms":
            floors = sorted({(_length(content, r), r["both_floor_ms"]) for r in rows if "both_floor_ms" in r})
            if floors:
                axes.plot(*zip(*floors, strict=True), "k--", label="floor")
        axes.set(xscale="log", yscale="log", xlabel=f"length, at {family[0]} tokens", ylabel=label)
        lengths = sorted(lengths_of[family])
        axes.set_xticks(lengths, [str(T) for T in lengths], minor=False)
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend()
    _, H, K, V = family
    figure.suptitle(f"forward + backward, {H} heads of {K} x {V}, {content['dtype']}, {content['ran_on']['device']}")
    figure.savefig(path, dpi=120, format="png")


def _length(content, row) -> int:
    return content["shapes"][row["case"]]["T"]


def _family(content, row) -> tuple[int, ...]:
    """What lengths are compared within: the same number of tokens and the same heads."""
    shape = content["shapes"][row["case"]]
    return shape["B"] * shape["T"], shape["H"], shape["K"], shape["V"]


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"

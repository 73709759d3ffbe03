"""The paper's tables of downstream tasks: which tasks, which metrics, and what the paper has (arXiv 2312.06635 v6)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of a model.

    Attributes:
        title: in the table.
        task, metric: in lm-evaluation-harness.
        percent: shown times 100; these are what the average is over.
    """

    title: str
    task: str
    metric: str
    percent: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns, whether they end with an average, and the paper's rows."""

    columns: tuple[Column, ...]
    average: bool
    paper: dict[str, tuple[float, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, each once."""
        return tuple(dict.fromkeys(column.task for column in self.columns))


TABLES = {
    "table2": Table(
        (
            Column("Wiki ppl", "wikitext", "word_perplexity", percent=False),
            Column("LMB ppl", "lambada_openai", "perplexity", percent=False),
            Column("LMB acc", "lambada_openai", "acc"),
            Column("PIQA", "piqa", "acc"),
            Column("Hella", "hellaswag", "acc_norm"),
            Column("Wino", "winogrande", "acc"),
            Column("ARC-e", "arc_easy", "acc"),
            Column("ARC-c", "arc_challenge", "acc_norm"),
        ),
        average=True,
        paper={
            "Transformer++ 340M, 15B": (28.39, 42.69, 31.0, 63.3, 34.0, 50.4, 44.5, 24.2, 41.2),
            "RetNet 340M, 15B": (32.33, 49.19, 28.6, 63.5, 33.5, 52.5, 44.5, 23.4, 41.0),
            "Mamba 340M, 15B": (28.39, 39.66, 30.6, 65.0, 35.4, 50.1, 46.3, 23.6, 41.8),
            "GLA 340M, 15B": (28.65, 43.35, 30.3, 64.8, 34.5, 51.4, 45.1, 22.7, 41.5),
            "Transformer++ 1.3B, 100B": (16.85, 13.44, 48.9, 70.8, 49.6, 53.6, 56.0, 26.5, 50.9),
            "RetNet 1.3B, 100B": (18.64, 17.27, 43.3, 70.0, 47.3, 52.5, 54.8, 25.6, 48.9),
            "Mamba 1.3B, 100B": (17.06, 13.89, 46.2, 72.2, 40.1, 54.1, 59.0, 28.2, 50.0),
            "GLA 1.3B, 100B": (17.22, 14.47, 46.9, 71.8, 49.8, 53.9, 57.2, 26.6, 51.0),
        },
    ),
    "table3": Table(
        (
            Column("FDA", "fda", "contains"),
            Column("SWDE", "swde", "contains"),
            Column("SQuAD", "squad_completion", "contains"),
        ),
        average=False,
        paper={
            "Transformer++ 340M, 15B": (21.4, 42.2, 22.1),
            "RetNet 340M, 15B": (2.9, 13.3, 27.6),
            "Mamba 340M, 15B": (2.1, 12.4, 23.0),
            "GLA 340M, 15B": (8.1, 18.6, 27.2),
            "Transformer++ 1.3B, 100B": (27.4, 66.6, 31.5),
            "RetNet 1.3B, 100B": (14.3, 42.8, 34.7),
            "Mamba 1.3B, 100B": (6.2, 41.4, 35.2),
            "GLA 1.3B, 100B": (19.9, 50.6, 42.6),
        },
    ),
}


def row(table: Table, results: dict[str, dict[str, float]]) -> tuple[float, ...]:
    """The table's numbers from the harness's results, the average last where the table has one."""
    values = [results[column.task][column.metric] * (100 if column.percent else 1) for column in table.columns]
    accuracies = [value for value, column in zip(values, table.columns, strict=True) if column.percent]
    return (*values, *([sum(accuracies) / len(accuracies)] if table.average else []))


def table_text(table: Table, name: str, values: tuple[float, ...]) -> str:
    """A markdown table: this model, then the paper's."""
    titles = ["model", *(column.title for column in table.columns), *(["avg"] if table.average else [])]
    perplexities = [not column.percent for column in table.columns] + [False]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for model, numbers in {name: values, **{f"{model} (paper)": row for model, row in table.paper.items()}}.items():
        cells = [f"{n:.2f}" if is_ppl else f"{n:.1f}" for n, is_ppl in zip(numbers, perplexities, strict=False)]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(lines)

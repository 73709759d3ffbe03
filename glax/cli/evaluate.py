"""Perplexity of text, tasks of lm-evaluation-harness, and the paper's tables with its numbers beside.

glax evaluate runs/books --text held-out.txt
glax evaluate gla-1.3B-100B/ --tables table2 table3 --json scores.json        (needs glax[eval], and the network)
glax evaluate gla-1.3B-100B/ --tasks my_task --include-path tasks/
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glax.cli.sources import Source, check_place, open_source
from glax.data.sources import find_source
from glax.errors import UserError
from glax.evaluation import TABLES, perplexity, table_text
from glax.evaluation.tables import row
from glax.inference import Sampling, complete


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is evaluated, on what."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder, the folder of a checkpoint in the Hub's format, or OWNER/NAME on the Hub."""

    text: str | None = None
    """Text for perplexity: file, folder, glob or hub:OWNER/NAME, as --data.train takes it."""

    text_field: str = "text"
    """Field or column that holds a document's text, in JSONL and Parquet files."""

    tables: tuple[Literal["table2", "table3"], ...] = ()
    """The paper's tables: zero-shot tasks, and recall."""

    tasks: tuple[str, ...] = ()
    """Tasks of the harness by name."""

    include_path: str | None = None
    """Folder of your own task files."""

    limit: int | None = None
    """Documents of each task, at most. For trials: the numbers are not comparable."""

    batch_size: int = 16
    """Rows at once."""

    segment: int = 2048
    """Tokens of a document that are read at once for perplexity; the state is carried on."""

    bucket: int = 2048
    """Positions of a bucket in perplexity by position."""

    json: Path | None = None
    """Also write all numbers to this file."""

    start_token: bool = True
    """Put the start token before every text of a task, as in training. The harness's own models do not."""

    tokenizer: str | None = None
    """"bytes", "mistral" or a SentencePiece file. None: the run's, or the checkpoint's tokenizer.model."""

    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """None: the run's; for a checkpoint bfloat16, float32 on a CPU."""

    implementation: str | None = None
    """Kernel of the recurrent layers. None: the fastest that runs here."""


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="glax evaluate", description=__doc__)
    if not (arguments.text or arguments.tables or arguments.tasks):
        raise UserError("there is nothing to evaluate: give --text, --tables or --tasks")
    check_place(arguments.json)
    if arguments.tables or arguments.tasks:
        import glax.evaluation.harness  # noqa: F401  (says what is missing before the model is read)
    source = open_source(arguments.model, arguments.tokenizer, arguments.compute_dtype, arguments.implementation)
    content: dict = {"model": arguments.model, "parameters": source.model.config.num_parameters()}
    if arguments.text:
        content["perplexity"] = _perplexity(source, arguments)
    if arguments.tables or arguments.tasks:
        content["tasks"] = results = _tasks(source, arguments)
        for name in arguments.tables:
            table = TABLES[name]
            values = row(table, results)
            content[name] = {"values": values, "paper": table.paper}
            print(f"\n{name}\n{table_text(table, source.name, values)}")
        for name in arguments.tasks:
            print(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in results[name].items()))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {arguments.json} ({error.strerror}): choose another place") from error


def _perplexity(source: Source, arguments: Arguments) -> dict:
    result = perplexity(
        source.model,
        source.tokenizer,
        (document.text for document in find_source(arguments.text, arguments.text_field).documents()),
        segment=arguments.segment,
        batch_size=arguments.batch_size,
        bucket=arguments.bucket,
    ).as_json()
    print(
        f"perplexity by token {result['token_perplexity']:.4g}, word {result['word_perplexity']:.4g}, byte "
        f"{result['byte_perplexity']:.4g} ({result['bits_per_byte']:.4f} bits), of {result['tokens']} tokens, "
        f"{result['words']} words, {result['bytes']} bytes"
    )
    for part in result["by_position"]:
        print(f"  positions {part['first']} to {part['last']}: {part['token_perplexity']:.4g}, {part['tokens']} tokens")
    return result


def _tasks(source: Source, arguments: Arguments) -> dict:
    from glax.evaluation.harness import HarnessModel, evaluate

    model = source.decoder()
    start = source.start_token if arguments.start_token else None

    def completed(contexts, until, max_new_tokens, temperature):
        done = complete(
            model,
            source.tokenizer,
            contexts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature),
            stop=until,
            start_token=start,
            end_token=source.tokenizer.eos_id,
        )
        return [one.text for one in done]

    adapter = HarnessModel(model, source.tokenizer, completed, batch_size=arguments.batch_size, start_token=start)
    tasks = [*dict.fromkeys([*(task for name in arguments.tables for task in TABLES[name].tasks), *arguments.tasks])]
    return evaluate(adapter, tasks, include_path=arguments.include_path, limit=arguments.limit)

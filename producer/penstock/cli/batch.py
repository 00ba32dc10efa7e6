"""`penstock batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_EXAMPLES = """
penstock batch requests.jsonl -o answers.jsonl
penstock batch requests.jsonl -o answers.jsonl --priority 4 --json
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="JSONL: OpenAI's batch lines, or submit's keywords with a prompt.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSONL of answers, in the input's order.")
    ],
    priority: Annotated[
        int, typer.Option("--priority", metavar="0..9", min=0, max=9, help="Of lines that do not say.")
    ] = 1,
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose jobs they are.")] = "default",
    window: Annotated[
        int, typer.Option("--window", metavar="N", min=1, max=10_000, help="Jobs in the queue at a time.")
    ] = 256,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Run a file of requests; answers in its order, resumable.

    After an interruption the same command goes on where it stood: lines whose custom_id the output file has are
    skipped. A line is {"custom_id": ..., "prompt": ..., "max_tokens": ...} or one of OpenAI's batch files. --json
    prints a summary.
    """
    from penstock.cli.batch_run import run_batch
    from penstock.cli.session import locate

    raise typer.Exit(run_batch(locate(redis, queue), source, output, priority, tenant, window, as_json=as_json))

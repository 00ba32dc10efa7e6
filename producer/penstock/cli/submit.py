"""`penstock submit`: one job, from a prompt on the command line or on stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli import generation as g
from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption
from penstock.cli.terminal import coloured, is_terminal, paint, say

if TYPE_CHECKING:
    from penstock.client import Client, JobHandle

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_PROMPT = "Prompt"
_EXAMPLES = """
penstock submit "Once upon a time" --stream
penstock submit --chat --stream "Tell me a story about a fox who wants to see the sea."
id=$(penstock submit --priority 9 --tenant web --deadline 30 < prompt.txt)
penstock submit "Describe a ship." --chat --json-schema @ship.json --wait --json
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def submit(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin when absent or `-`.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", rich_help_panel=_PROMPT, help="The prompt is a message: use the chat template.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", rich_help_panel=_PROMPT, help="System message; implies --chat."),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            "--messages", metavar="JSON|FILE|-", rich_help_panel=_PROMPT, help="A whole conversation instead."
        ),
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option("--token-ids", metavar="IDS", rich_help_panel=_PROMPT, help="Token ids instead: 1,2,3."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", rich_help_panel=_PROMPT, help="Refuse workers that serve another model."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and print it.")] = False,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Print the tokens as they come.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="Wait no longer (exit code 6); the job goes on."),
    ] = None,
    max_tokens: g.MaxTokens = None,
    min_tokens: g.MinTokens = None,
    n: g.Choices = None,
    best_of: g.BestOf = None,
    stop: g.Stop = None,
    stop_token_ids: g.StopIds = None,
    include_stop: g.IncludeStop = False,
    ignore_eos: g.IgnoreEos = False,
    echo: g.Echo = False,
    keep_special_tokens: g.KeepSpecial = False,
    logprobs: g.Logprobs = None,
    prompt_logprobs: g.PromptLogprobs = None,
    json_schema: g.JsonSchema = None,
    regex: g.Regex = None,
    choice: g.Choice = None,
    grammar: g.Grammar = None,
    temperature: g.Temperature = None,
    top_k: g.TopK = None,
    top_p: g.TopP = None,
    min_p: g.MinP = None,
    seed: g.Seed = None,
    presence_penalty: g.Presence = None,
    frequency_penalty: g.Frequency = None,
    repetition_penalty: g.Repetition = None,
    logit_bias: g.LogitBias = None,
    allowed_token_ids: g.AllowedIds = None,
    bad_words: g.BadWords = None,
    priority: g.Priority = None,
    tenant: g.Tenant = None,
    deadline: g.Deadline = None,
    delay: g.Delay = None,
    not_before: g.NotBefore = None,
    max_retries: g.Retries = None,
    idempotency_key: g.IdempotencyKey = None,
    result_ttl: g.ResultTtl = None,
    affinity: g.Affinity = None,
    metadata: g.Metadata = None,
    traceparent: g.Traceparent = None,
    durability: g.Durability = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Submit a prompt; wait for the answer or stream it live.

    Prints the job's id, or with --wait and --stream the text. The job is stored when this returns: closing the
    terminal, or a worker that dies, loses nothing.
    """
    from penstock.cli.session import locate, open_client

    if wait and stream:
        invalid("--wait", "is given together with --stream, which waits anyway; give one")
    if timeout is not None and not (wait or stream):
        invalid("--timeout", "has no meaning without --wait or --stream")
    if timeout is not None and not 0 <= timeout < float("inf"):
        invalid("--timeout", f"{timeout} is no number of seconds; give 0 or more")
    request, options = g.build(ctx.params)
    address = locate(redis, queue)
    with open_client(address) as client:
        handle = client.submit(request=request, **options.model_dump(exclude_unset=True))
        workers = _count_workers(client)
        if workers == 0 and is_terminal(sys.stderr):
            say(f"  no worker serves queue {address.queue} now: the job waits until one does, see `penstock worker`")
        if stream or wait:
            from penstock.cli.following import follow

            follow(handle, live=stream, timeout_s=timeout, as_json=as_json, announce=True)
            return
        _print_id(handle, address.queue, workers, as_json)


def _count_workers(client: Client) -> int | None:
    """How many workers serve the queue: a job for a misspelt one would wait for ever. None where nobody can tell."""
    from penstock.cli.fleet import live_workers
    from penstock_core.protocol.errors import PenstockError

    try:
        return live_workers(client.queue_snapshot())
    except PenstockError:  # the job is stored, whatever comes now
        return None


def _print_id(handle: JobHandle, queue: str, workers: int | None, as_json: bool) -> None:
    if as_json:
        from penstock.cli.screen import print_json

        print_json({"job_id": handle.id, "queue": queue, "duplicate": handle.duplicate, "workers": workers})
        return
    print(handle.id, flush=True)
    if is_terminal(sys.stdout):
        what = "was submitted before" if handle.duplicate else "is stored"
        command = paint(f"penstock watch {handle.id}", "cyan", on=coloured(sys.stderr))
        say(paint(f"  {what} in queue {queue}; follow it: ", "dim", on=coloured(sys.stderr)) + command)

"""What `penstock dead show` knows of one dead job: reason, history, request, and the text it had produced."""

from __future__ import annotations

from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.exits import CommandFailed, ExitCode
from penstock.cli.records import status_record
from penstock.cli.screen import console, print_json, state
from penstock.cli.session import Queue
from penstock.cli.terminal import printable
from penstock_core.protocol.codec import decode_event, decode_request
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.transitions import read_events, read_job


def describe(queue: Queue, job_id: str, as_json: bool) -> None:
    """Print one dead job; raises `CommandFailed` where it is unknown or not dead."""
    status = queue.run(read_job(queue.keys, job_id))
    if status is None:
        raise CommandFailed(ExitCode.NOT_FOUND, "job", f"{job_id} is unknown, or its retention time has passed")
    if status.state is not JobState.DEAD:
        raise CommandFailed(ExitCode.NOT_FOUND, "job", f"{job_id} is not dead but {status.state}; see `penstock jobs`")
    request = _request(queue, job_id)
    text = _text_so_far(queue, job_id)
    if as_json:
        print_json(status_record(status) | {"request": request, "text": text})
        return
    out = console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="label")
    facts.add_column()
    reason = status.failure
    taken = f"{status.crashes} crashes, {status.losses} losses"
    history = f"{status.attempt} attempts, {taken}, {status.errors} errors, {status.tokens} tokens"
    for name, value in (
        ("state", state(str(status.state))),
        ("why", Text(f"{printable(reason.message)} ({reason.code})" if reason else "unknown", style="bad")),
        ("history", history),
        ("priority", f"{status.priority}, tenant {status.tenant}"),
        ("last worker", Text(status.owner or "-")),
    ):
        facts.add_row(name, value)
    out.print(Text(job_id, style="id"))
    out.print(facts)
    shown = request.get("prompt") or request.get("messages") or request.get("prompt_token_ids") or request
    out.print(Panel(_clip(str(shown)), title="request", title_align="left", border_style="frame"))
    if text:
        out.print(Panel(_clip(text), title="text so far", title_align="left", border_style="frame"))
    out.print(Text(f"penstock dead requeue {job_id}", style="brand"), Text("puts it back in line", style="mute"))


def _request(queue: Queue, job_id: str) -> dict[str, Any]:
    stored: Any = queue.client.hget(queue.keys.job(job_id), "request")
    if not stored:
        return {"error": "the request is missing from the job"}
    try:
        return decode_request(stored).model_dump(mode="json", exclude_unset=True)
    except (UndecodableRecord, ValueError) as error:
        return {"error": str(error), "bytes": len(stored)}


def _text_so_far(queue: Queue, job_id: str) -> str:
    pieces: list[str] = []
    after = ""
    while (page := queue.run(read_events(queue.keys, job_id, after=after))) is not None and page.last_id != after:
        after = page.last_id
        for data in page.events:
            try:
                event = decode_event(data)
            except UndecodableRecord:
                continue
            if isinstance(event, TokenChunk) and event.index == 0:
                pieces.append(event.text)
    return "".join(pieces)


def _clip(text: str, limit: int = 2000) -> Text:
    text = printable(text)
    return Text(text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)")

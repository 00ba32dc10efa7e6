"""Several streams at once: a row each on a terminal, whole texts or JSON lines otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from penstock.aio import AsyncClient
from penstock.cli.exits import ExitCode, explain
from penstock.cli.records import chunk_record, outcome_record
from penstock.cli.screen import WORKER_COLOURS, console, print_json, state
from penstock.cli.session import Address
from penstock.cli.terminal import is_terminal, note, printable
from penstock_core.protocol.errors import JobError, PenstockError
from penstock_core.protocol.jobs import JobResult

_FRAMES_PER_S = 10


@dataclass(slots=True)
class Row:
    """What is known of one stream."""

    job_id: str
    state: str = "queued"
    tokens: int = 0
    parts: list[tuple[int, str]] = field(default_factory=list)  # attempt, text
    result: JobResult | None = None
    error: PenstockError | None = None

    def add(self, attempt: int, tokens: int, text: str) -> None:
        """Take in a chunk."""
        self.state = "running"
        self.tokens += tokens
        if self.parts and self.parts[-1][0] == attempt:
            self.parts[-1] = (attempt, self.parts[-1][1] + text)
        else:
            self.parts.append((attempt, text))


def watch_many(
    address: Address, job_ids: list[str], from_offset: int, index: int | None, timeout_s: float | None, as_json: bool
) -> ExitCode:
    """Follow all jobs to their ends; returns the exit code of the worst one."""
    rows = [Row(job_id) for job_id in job_ids]
    live = is_terminal(sys.stdout) and not as_json
    asyncio.run(_watch(address, rows, from_offset, index, timeout_s, as_json, live))
    if not live and not as_json:
        _print_texts(rows)
    errors = [row.error for row in rows if row.error is not None]
    for row in rows:
        if row.error is not None:
            note("✗", "red", explain(row.error)[1])
    return max((explain(error)[0] for error in errors), default=ExitCode.OK)


async def _watch(
    address: Address, rows: list[Row], from_offset: int, index: int | None, timeout_s: float | None, as_json: bool,
    live: bool,
) -> None:  # fmt: skip
    async with AsyncClient(address.url, queue=address.queue) as client:
        tasks = [asyncio.create_task(_follow(client, row, from_offset, index, timeout_s, as_json)) for row in rows]
        painter = asyncio.create_task(_paint(rows)) if live else None
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            if painter is not None:
                painter.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await painter


async def _follow(
    client: AsyncClient, row: Row, from_offset: int, index: int | None, timeout_s: float | None, as_json: bool
) -> None:
    handle = client.job(row.job_id)
    chosen = 0 if index is None else index
    try:
        try:
            async for chunk in handle.stream(from_offset, index, timeout_s):
                if as_json:
                    print_json(chunk_record(row.job_id, chunk))
                if chunk.index == chosen:
                    row.add(chunk.attempt, len(chunk.token_ids), chunk.text)
            row.result = await handle.result(timeout_s)
            row.state = "completed"
        except JobError as error:
            row.error, row.result = error, error.result
            row.state = str((await handle.status()).state)
    except PenstockError as error:
        row.error, row.state = error, "failed"
        return
    if as_json:
        failure = row.error
        told = {"code": failure.code, "message": failure.message} if isinstance(failure, JobError) else None
        status = await handle.status()
        print_json({"event": "ended", **outcome_record(row.job_id, row.state, status.attempt, row.result, told)})


async def _paint(rows: list[Row]) -> None:
    out = console()
    began = time.monotonic()
    with Live(console=out, auto_refresh=False, transient=False) as live:
        try:
            while True:
                live.update(_picture(rows, out.width, out.height), refresh=True)
                await asyncio.sleep(1 / _FRAMES_PER_S)
        finally:
            live.update(_picture(rows, out.width, max(out.height, len(rows) + 2)), refresh=True)
    out.print(
        f"[label]{len(rows)} streams, {sum(row.tokens for row in rows):,} tokens, {time.monotonic() - began:.1f} s[/]"
    )


def _picture(rows: list[Row], width: int, height: int) -> RenderableType:
    shown = rows[: max(1, height - 2)]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in shown:
        table.add_row(
            Text(row.job_id, style="id"), state(row.state), f"{row.tokens:,}", _tail(row, max(10, width - 62))
        )
    if len(rows) > len(shown):
        table.add_row(Text(f"and {len(rows) - len(shown)} more", style="mute"))
    return table


def _tail(row: Row, room: int) -> Text:
    text = Text()
    for number, (attempt, part) in enumerate(row.parts):
        if number:
            text.append("▌", style="takeover")
        text.append(" ".join(printable(part).split("\n")), style=WORKER_COLOURS[(attempt - 1) % len(WORKER_COLOURS)])
    if text.cell_len <= room:
        return text
    kept = text[len(text) - room + 1 :]
    while kept.cell_len > room - 1:
        kept = kept[1:]
    return Text("…", style="mute") + kept


def _print_texts(rows: list[Row]) -> None:
    for row in rows:
        print(f"── {row.job_id} ── {row.state}")
        text = "".join(part for _, part in row.parts)
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")

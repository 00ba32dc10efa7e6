"""The picture `penstock top` draws: figures, waiting jobs by priority and tenant, workers with pages and speed."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.screen import WORKER_COLOURS, bar, console, duration, sparkline
from penstock.cli.session import Queue
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.transitions import QueueSnapshot, WorkerView, snapshot

_GONE_AFTER_MS = 5000


class History:
    """Rates of the last minutes, from the differences between snapshots."""

    def __init__(self) -> None:
        self.tokens_per_s: deque[float] = deque(maxlen=240)
        self.jobs_per_s: deque[float] = deque(maxlen=240)
        self._last: QueueSnapshot | None = None

    def add(self, seen: QueueSnapshot) -> None:
        """Take in a snapshot."""
        last, self._last = self._last, seen
        if last is None:
            self.tokens_per_s.append(sum(view.record.tokens_per_s for view in seen.workers if view.record))
            return
        seconds = max(0.001, (seen.now_ms - last.now_ms) / 1000)
        ended = ("completed", "failed", "cancelled", "expired", "dead")
        jobs = sum(seen.stats[name] - last.stats[name] for name in ended)
        self.jobs_per_s.append(max(0.0, jobs / seconds))
        self.tokens_per_s.append(sum(view.record.tokens_per_s for view in seen.workers if view.record))


def run_live(queue: Queue, interval_s: float) -> None:
    """Redraw until Ctrl-C. A broker that goes away is waited for."""
    out = console()
    history = History()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                seen = queue.run(snapshot(queue.keys))
            except BrokerUnavailable as error:
                live.update(Panel(Text(f"waiting for the broker: {error}", style="bad")), refresh=True)
            else:
                history.add(seen)
                live.update(picture(queue, seen, history, out.width), refresh=True)
            time.sleep(interval_s)


def picture(queue: Queue, seen: QueueSnapshot, history: History, width: int) -> RenderableType:
    """The whole view."""
    return Group(
        _title(queue, seen, width), _figures(seen, history, width), _waiting(seen, width), _workers(seen, width)
    )


def _title(queue: Queue, seen: QueueSnapshot, width: int) -> Text:
    left = Text.assemble(
        (" ≋ penstock ", "brand"), ("top", "bold"), (f"  {queue.address.queue}", "id"),
        (f"  ·  {queue.address.shown_url}", "mute"),
    )  # fmt: skip
    right = Text(time.strftime("%H:%M:%S ", time.localtime(seen.now_ms / 1000)), style="mute")
    left.truncate(max(10, width - right.cell_len - 1), overflow="ellipsis")
    return left + Text(" " * max(1, width - left.cell_len - right.cell_len)) + right


def _figures(seen: QueueSnapshot, history: History, width: int) -> Panel:
    speed = history.tokens_per_s[-1] if history.tokens_per_s else 0.0
    stats = seen.stats
    first = Text.assemble(
        (f"{seen.running:,}", "state.running"), (" running   ", "label"),
        (f"{seen.waiting:,}", "figure"), (" waiting   ", "label"),
        (f"{seen.delayed:,}", "figure"), (" delayed   ", "label"),
        (f"{seen.dead:,}", "bad" if seen.dead else "figure"), (" dead   ", "label"),
        (duration(seen.oldest_wait_ms / 1000) if seen.waiting else "-", "figure"), (" longest wait", "label"),
    )  # fmt: skip
    second = Text.assemble(
        (f"{speed:>7,.0f}", "figure"), (" tokens/s  ", "label"),
        (sparkline(list(history.tokens_per_s), max(8, width - 30)), "brand"),
    )  # fmt: skip
    third = Text("  ").join(
        Text.assemble((f"{stats[name]:,}", "figure"), (f" {name}", "label"))
        for name in ("submitted", "completed", "failed", "cancelled", "expired", "retried", "reclaimed", "fenced")
        if stats[name] or name in ("submitted", "completed")
    )
    lines = [first, second, third]
    for line in lines:
        line.truncate(width - 4, overflow="ellipsis")
    return Panel(Text("\n").join(lines), border_style="frame", padding=(0, 1))


def _waiting(seen: QueueSnapshot, width: int) -> Panel:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label", expand=True)
    table.add_column("priority", no_wrap=True)
    table.add_column("tenant", no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column("jobs", justify="right", style="figure")
    table.add_column("", ratio=1)
    table.add_column("oldest", justify="right", no_wrap=True)
    most = max((line.depth for line in seen.lines), default=1)
    for line in seen.lines[:12]:
        table.add_row(
            Text(f"p{line.priority}", style="figure" if line.priority >= 8 else "mute"),
            line.tenant,
            f"{line.depth:,}",
            bar(line.depth / most, max(6, width - 60), "brand"),
            duration(max(0, seen.now_ms - line.oldest_ms) / 1000),
        )
    more = len(seen.lines) - 12
    body: RenderableType = table if seen.lines else Text("nothing waits", style="mute")
    return Panel(
        body, title="[title] waiting [/]", title_align="left", border_style="frame", padding=(0, 1),
        subtitle=f"[mute]{more} more lines[/]" if more > 0 else None,
    )  # fmt: skip


def _workers(seen: QueueSnapshot, width: int) -> Panel:
    roomy = width >= 110
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label", expand=True)
    table.add_column("worker", no_wrap=True, overflow="ellipsis", ratio=1, min_width=10)
    table.add_column("on", no_wrap=True)
    table.add_column("running", justify="right", no_wrap=True)
    table.add_column("pages", no_wrap=True)
    table.add_column("tok/s", justify="right", style="figure")
    table.add_column("prefix hits", justify="right", no_wrap=True)
    if roomy:
        table.add_column("drafts", justify="right", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
    table.add_column("beat", justify="right", no_wrap=True)
    for number, view in enumerate(seen.workers[:24]):
        table.add_row(*_worker(seen, view, WORKER_COLOURS[number % len(WORKER_COLOURS)], roomy))
    body: RenderableType = table
    if not seen.workers:
        body = Text.assemble(("no worker serves this queue; start one: ", "warn"), ("penstock worker", "brand"))
    return Panel(body, title="[title] workers [/]", title_align="left", border_style="frame", padding=(0, 1))


def _worker(seen: QueueSnapshot, view: WorkerView, colour: str, roomy: bool) -> list[RenderableType]:
    age_ms = max(0, seen.now_ms - view.heartbeat_ms)
    late = age_ms > _GONE_AFTER_MS
    record = view.record
    name = Text.assemble(("● " if not late else "✗ ", colour if not late else "bad"), (view.worker_id, colour))
    beat = Text(duration(age_ms / 1000), style="bad" if late else "mute")
    if record is None:
        return [name, *[Text("-", style="mute")] * (8 if roomy else 5), beat]
    used = 1 - record.free_tokens / record.total_tokens if record.total_tokens else 0.0
    pages = bar(used, 8, colour).append(f" {used:>4.0%}", style="mute")
    if record.draining:
        name.append(" draining", style="warn")
    cells: list[RenderableType] = [
        name,
        Text(record.device or "-"),
        Text(f"{record.running}/{record.max_sequences}", style="figure"),
        pages,
        Text(f"{record.tokens_per_s:,.0f}"),
        Text(f"{record.prefix_hit_rate:.0%}"),
    ]
    if roomy:
        cells += [
            Text(f"{record.draft_acceptance:.0%}" if record.draft_acceptance else "-"),
            Text(f"{record.step_ms:.1f} ms"),
            Text(f"{record.jobs_done:,}"),
        ]
    return [*cells, beat]

"""The picture `penstock top` draws: figures, queues, waiting jobs by priority and tenant, workers and their pages."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.fleet import GONE_AFTER_MS, Fleet, is_stranded, live_workers, read_fleet
from penstock.cli.screen import WORKER_COLOURS, bar, console, duration, sparkline
from penstock.cli.session import Queue
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.transitions import QueueSnapshot, WorkerView
from penstock_core.protocol.workers import WorkerRecord

_ENDED = ("completed", "failed", "cancelled", "expired", "dead")
_MOST_LINES, _MOST_WORKERS = 12, 24


class History:
    """Rates of the last minutes."""

    def __init__(self) -> None:
        self.tokens_per_s: deque[float] = deque(maxlen=240)
        self.jobs_per_s = 0.0
        self._last: tuple[int, int] | None = None

    def add(self, fleet: Fleet) -> None:
        """Take in what was seen."""
        self.tokens_per_s.append(fleet.tokens_per_s)
        ended = sum(map(fleet.total, _ENDED))
        if self._last is not None:
            before_ms, before = self._last
            self.jobs_per_s = max(0, ended - before) / max(0.001, (fleet.now_ms - before_ms) / 1000)
        self._last = (fleet.now_ms, ended)


def run_live(session: Queue, interval_s: float, *, all_queues: bool) -> None:
    """Redraw until Ctrl-C. A broker that goes away is waited for."""
    out = console()
    history = History()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                fleet = read_fleet(session, all_queues=all_queues)
            except BrokerUnavailable as error:
                live.update(Panel(Text(f"waiting for the broker: {error}", style="bad")), refresh=True)
            else:
                history.add(fleet)
                live.update(picture(session, fleet, history, out.width), refresh=True)
            time.sleep(interval_s)


def picture(session: Queue, fleet: Fleet, history: History, width: int) -> RenderableType:
    """The whole view."""
    several = list(fleet.queues) != [session.address.queue]
    parts: list[RenderableType] = [_title(session, fleet, several, width), _figures(fleet, history, width)]
    if several:
        parts.append(_queues(fleet))
    return Group(*parts, _waiting(fleet, several, width), _workers(fleet, several, width))


def _title(session: Queue, fleet: Fleet, several: bool, width: int) -> Text:
    name = f"{len(fleet.queues)} queues" if several else session.address.queue
    left = Text.assemble(
        (" ≋ penstock ", "brand"), ("top", "bold"), (f"  {name}", "id"),
        (f"  ·  {session.address.shown_url}", "mute"),
    )  # fmt: skip
    right = Text(time.strftime("%H:%M:%S ", time.localtime(fleet.now_ms / 1000)), style="mute")
    left.truncate(max(10, width - right.cell_len - 1), overflow="ellipsis")
    return left + Text(" " * max(1, width - left.cell_len - right.cell_len)) + right


def _figures(fleet: Fleet, history: History, width: int) -> Panel:
    speed = history.tokens_per_s[-1] if history.tokens_per_s else 0.0
    waiting, dead = fleet.total("queued"), sum(seen.dead for seen in fleet.queues.values())
    first = Text.assemble(
        (f"{sum(seen.running for seen in fleet.queues.values()):,}", "state.running"), (" running   ", "label"),
        (f"{waiting:,}", "figure"), (" waiting   ", "label"),
        (f"{sum(seen.delayed for seen in fleet.queues.values()):,}", "figure"), (" delayed   ", "label"),
        (f"{dead:,}", "bad" if dead else "figure"), (" dead   ", "label"),
        (duration(fleet.oldest_wait_ms / 1000) if waiting else "-", "figure"), (" longest wait", "label"),
    )  # fmt: skip
    second = Text.assemble(
        (f"{speed:>7,.0f}", "figure"), (" tokens/s  ", "label"),
        (f"{history.jobs_per_s:,.1f}", "figure"), (" jobs/s  ", "label"),
        (sparkline(list(history.tokens_per_s), max(8, width - 44)), "brand"),
    )  # fmt: skip
    pages, accepted = fleet.pages, fleet.draft_acceptance
    third = Text.assemble(
        ("pages ", "label"), (f"{pages.used:,}", "figure"), (" used  ", "label"),
        (f"{pages.cached:,}", "figure"), (" cached  ", "label"), (f"{pages.free:,}", "figure"), (" free   ", "label"),
        (f"{fleet.prefix_hit_rate:.0%}", "figure"), (" prefix hits   ", "label"),
        ("-" if accepted is None else f"{accepted:.0%}", "figure"), (" drafts accepted", "label"),
    )  # fmt: skip
    fourth = Text("  ").join(
        Text.assemble((f"{fleet.total(name):,}", "figure"), (f" {name}", "label"))
        for name in ("submitted", "completed", "failed", "cancelled", "expired", "retried", "reclaimed", "fenced")
        if fleet.total(name) or name in ("submitted", "completed")
    )
    lines = [first, second, third, fourth]
    for line in lines:
        line.truncate(width - 4, overflow="ellipsis")
    return Panel(Text("\n").join(lines), border_style="frame", padding=(0, 1))


def _panel(title: str, body: RenderableType, more: int = 0) -> Panel:
    return Panel(
        body, title=f"[title] {title} [/]", title_align="left", border_style="frame", padding=(0, 1),
        subtitle=f"[mute]{more} more[/]" if more > 0 else None,
    )  # fmt: skip


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label", expand=True)


def _queues(fleet: Fleet) -> Panel:
    table = _table()
    table.add_column("queue", no_wrap=True, overflow="ellipsis", ratio=1, min_width=10)
    for heading in ("workers", "running", "waiting", "delayed", "dead", "tok/s", "oldest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, seen in fleet.queues.items():
        stranded = is_stranded(seen)
        table.add_row(
            Text(name, style="id"),
            Text(f"{live_workers(seen):,}", style="bad" if stranded else "figure"),
            f"{seen.running:,}",
            Text(f"{seen.waiting:,}", style="bad" if stranded else "figure"),
            f"{seen.delayed:,}",
            Text(f"{seen.dead:,}", style="bad" if seen.dead else "mute"),
            f"{Fleet({name: seen}).tokens_per_s:,.0f}",
            duration(seen.oldest_wait_ms / 1000) if seen.waiting else "-",
        )
    return _panel("queues", table if fleet.queues else Text("no queue was used yet", style="mute"))


def _waiting(fleet: Fleet, several: bool, width: int) -> Panel:
    lines = [(name, seen, line) for name, seen in fleet.queues.items() for line in seen.lines]
    lines.sort(key=lambda found: -found[2].priority)
    table = _table()
    if several:
        table.add_column("queue", no_wrap=True, overflow="ellipsis", max_width=24, style="id")
    table.add_column("priority", no_wrap=True)
    table.add_column("tenant", no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column("jobs", justify="right", style="figure")
    table.add_column("", ratio=1)
    table.add_column("oldest", justify="right", no_wrap=True)
    most = max((line.depth for _, _, line in lines), default=1)
    for name, seen, line in lines[:_MOST_LINES]:
        table.add_row(
            *([name] if several else []),
            Text(f"p{line.priority}", style="figure" if line.priority >= 8 else "mute"),
            line.tenant,
            f"{line.depth:,}",
            bar(line.depth / most, max(6, width - (86 if several else 60)), "brand"),
            duration(max(0, seen.now_ms - line.oldest_ms) / 1000),
        )
    return _panel("waiting", table if lines else Text("nothing waits", style="mute"), len(lines) - _MOST_LINES)


def _workers(fleet: Fleet, several: bool, width: int) -> Panel:
    roomy = width >= 110
    table = _table()
    table.add_column("worker", no_wrap=True, overflow="ellipsis", ratio=1, min_width=10)
    if several:
        table.add_column("model", no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column("on", no_wrap=True, overflow="ellipsis", max_width=14)
    table.add_column("running", justify="right", no_wrap=True)
    table.add_column("pages", no_wrap=True)
    table.add_column("tok/s", justify="right", style="figure")
    table.add_column("prefix hits", justify="right", no_wrap=True)
    if roomy:
        table.add_column("drafts", justify="right", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
    table.add_column("beat", justify="right", no_wrap=True)
    workers = list(fleet.workers())
    for number, (_, seen, view) in enumerate(workers[:_MOST_WORKERS]):
        colour = WORKER_COLOURS[number % len(WORKER_COLOURS)]
        table.add_row(*_worker(seen, view, colour, several=several, roomy=roomy))
    body: RenderableType = table
    if not workers:
        who = "these queues" if several else "this queue"
        body = Text.assemble((f"no worker serves {who}; start one: ", "warn"), ("penstock worker", "brand"))
    return _panel("workers", body, len(workers) - _MOST_WORKERS)


def _worker(seen: QueueSnapshot, view: WorkerView, colour: str, *, several: bool, roomy: bool) -> list[RenderableType]:
    age_ms = max(0, seen.now_ms - view.heartbeat_ms)
    late = age_ms > GONE_AFTER_MS
    record = view.record
    name = Text.assemble(("● " if not late else "✗ ", colour if not late else "bad"), (view.worker_id, colour))
    beat = Text(duration(age_ms / 1000), style="bad" if late else "mute")
    if record is None:
        return [name, *[Text("-", style="mute")] * (5 + several + 3 * roomy), beat]
    if record.draining:
        name.append(" draining", style="warn")
    cells: list[RenderableType] = [
        name,
        *([Text(record.model or "-", style="id")] if several else []),
        Text((record.device or "-") + (f" ×{record.ranks}" if record.ranks > 1 else "")),
        Text(f"{record.running}/{record.max_sequences}", style="figure"),
        _pages(record, colour, roomy),
        Text(f"{record.tokens_per_s:,.0f}"),
        Text(f"{record.prefix_hit_rate:.0%}"),
    ]
    if roomy:
        cells += [
            Text(f"{record.draft_acceptance:.0%} {record.speculation_gain:.1f}×" if record.draft_acceptance else "-"),
            Text(f"{record.step_ms:.1f} ms"),
            Text(f"{record.jobs_done:,}"),
        ]
    return [*cells, beat]


def _pages(record: WorkerRecord, colour: str, roomy: bool) -> Text:
    """How full the KV cache is; from its tokens where a worker of an earlier version tells no pages."""
    if not record.total_pages:
        used = 1 - record.free_tokens / record.total_tokens if record.total_tokens else 0.0
        return bar(used, 8, colour).append(f" {used:>4.0%}", style="mute")
    used = record.used_pages / record.total_pages
    drawn = bar(used, 8, colour).append(f" {used:>4.0%}", style="mute")
    return drawn.append(f" {record.used_pages:,}/{record.total_pages:,}", style="mute") if roomy else drawn

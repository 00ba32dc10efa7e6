"""The end of a demo: the closing table with its proof line, and the same figures as one JSON object."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.demo.director import Report


def record(report: Report) -> dict[str, Any]:
    """The figures as JSON."""
    verdict = report.verdict
    return {
        "ok": report.ok,
        "jobs": verdict.jobs,
        "completed": verdict.completed,
        "lost": verdict.lost,
        "duplicate_tokens": verdict.duplicate_tokens,
        "missing_tokens": verdict.missing_tokens,
        "wrong_output": verdict.wrong_output,
        "interrupted": report.interrupted,
        "compared_with_undisturbed_run": verdict.compared,
        "takeover_s": _rounded(report.takeover_s, 3),
        "takeover_all_s": _rounded(report.takeover_all_s, 3),
        "killed": report.killed,
        "killed_at_s": _rounded(report.killed_at_s, 3),
        "tokens": report.tokens,
        "tokens_per_s": _rounded(report.tokens_per_s, 1),
        "ttft_p50_ms": _rounded(report.ttft_p50_ms, 1),
        "prefix_hit_rate": _rounded(report.prefix_hit_rate, 4),
        "duration_s": _rounded(report.duration_s, 2),
        "redis_version": report.redis_version,
        "model": report.model,
        "faults": report.faults,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def table(report: Report) -> RenderableType:
    """The closing table."""
    verdict = report.verdict
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="label", no_wrap=True)
    grid.add_column(style="figure", no_wrap=True, justify="right")
    grid.add_column(style="mute")
    rows: list[tuple[str, str, str]] = [
        ("jobs", f"{verdict.completed} of {verdict.jobs}", "completed: three tenants, three priorities"),
        ("tokens", f"{report.tokens:,}", f"{report.tokens_per_s:,.0f} tokens/s, one of two workers dying"),
        ("first token", f"{report.ttft_p50_ms:,.0f} ms", "median, as subscribers saw it"),
        ("prefix cache", f"{report.prefix_hit_rate:.0%}", "of all prompt tokens"),
        ("kill -9", f"{report.interrupted}", f"streams interrupted on {report.killed}"),
    ]
    if report.takeover_s is not None and report.takeover_all_s is not None:
        words = f"until they went on, the last after {report.takeover_all_s:.2f} s"
        rows.append(("takeover", f"{report.takeover_s:.2f} s", words))
    for name, figure, words in rows:
        grid.add_row(name, figure, words)
    return Panel(
        Group(grid, Text(""), *_proof(report)),
        title=Text.assemble((" ≋ penstock ", "brand"), ("demo ", "bold")),
        title_align="left",
        subtitle=Text(
            f" redis {report.redis_version} · {report.model} · {report.duration_s:.0f} s in all ", style="mute"
        ),
        subtitle_align="right",
        border_style="good" if report.ok else "bad",
        padding=(1, 2),
    )


def _proof(report: Report) -> list[Text]:
    verdict = report.verdict
    style = "good" if report.ok else "bad"
    proof = Text.assemble(("✓ " if report.ok else "✗ ", style), (proof_line(report), style))
    outcome = "the same tokens" if not verdict.wrong_output else "NOT the same tokens"
    lines = [
        proof,
        Text("  Every stream, token log and result agree token for token. The", style="mute")
        .append(f" {verdict.compared} ", style="figure")
        .append(f"jobs that changed hands, run again undisturbed: {outcome}."),
    ]
    if not report.interrupted:
        lines.append(Text("  No stream was interrupted, so the takeover was not shown.", style="bad"))
    lines += [Text(f"  {fault}", style="bad") for fault in report.faults[:8]]
    return lines


def proof_line(report: Report) -> str:
    """What it is all about."""
    verdict = report.verdict
    line = f"lost {verdict.lost}, duplicated {verdict.duplicate_tokens}, missing {verdict.missing_tokens}"
    return line if not verdict.wrong_output else f"{line}, wrong {verdict.wrong_output}"

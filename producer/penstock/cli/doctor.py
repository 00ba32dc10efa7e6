"""`penstock doctor`: is this machine able to run Penstock, and is the broker set up to keep what it accepts?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.exits import ExitCode
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

if TYPE_CHECKING:
    from penstock.cli.diagnosis import Finding

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_MARKS = {"ok": ("✓", "good"), "warning": ("!", "warn"), "error": ("✗", "bad"), "skipped": ("·", "mute")}


@app.command(cls=Command, epilog="penstock doctor\npenstock doctor --json | jq '.checks[] | select(.status != \"ok\")'")
def doctor(
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Load the bundled model and generate with it. [default: yes]")
    ] = True,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Check this machine and the broker; each problem comes with its remedy.

    Exit code 0 when nothing is broken (warnings allowed), 7 when the broker cannot be reached, 1 otherwise.
    """
    from penstock.cli.diagnosis import examine
    from penstock.cli.screen import console, print_json
    from penstock.cli.session import locate

    address = locate(redis, queue)
    findings: list[Finding] = []
    screen = console()
    if not as_json:
        screen.print(f"[brand]≋ penstock[/] [bold]doctor[/]  [id]{address.queue}[/] [mute]on {address.shown_url}[/]")
    section = ""
    with console(stderr=True).status("looking around", spinner="dots") as status:
        for step in examine(address, load_model=model):
            if isinstance(step, str):
                status.update(step)
                continue
            findings.append(step)
            if not as_json:
                if step.section != section:
                    section = step.section
                    screen.print(f"\n[title]{section}[/]")
                _show(step)
    errors = [finding for finding in findings if finding.status == "error"]
    warnings = [finding for finding in findings if finding.status == "warning"]
    unreachable = any(finding.name == "broker" for finding in errors)
    if as_json:
        print_json(
            {
                "ok": not errors,
                "errors": len(errors),
                "warnings": len(warnings),
                "redis": address.shown_url,
                "queue": address.queue,
                "checks": [finding.record() for finding in findings],
            }
        )
    else:
        screen.print()
        verdict = "[good]Everything is in order.[/]"
        if errors:
            verdict = f"[bad]{len(errors)} problem{'s' if len(errors) > 1 else ''}[/]"
            verdict += f", [warn]{len(warnings)} warning{'s' if len(warnings) > 1 else ''}[/]" if warnings else ""
        elif warnings:
            verdict = f"It works, with [warn]{len(warnings)} warning{'s' if len(warnings) > 1 else ''}[/]."
        screen.print(verdict)
    if errors:
        raise typer.Exit(ExitCode.BROKER if unreachable else ExitCode.ERROR)


def _show(finding: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    from penstock.cli.screen import console

    mark, style = _MARKS[finding.status]
    row = Table.grid(padding=(0, 1))
    row.add_column(width=3, justify="right")
    row.add_column(width=12)
    row.add_column(overflow="fold")
    detail = Text(finding.detail, style="mute" if finding.status == "skipped" else "")
    row.add_row(Text(mark, style=style), Text(finding.name, style="label"), detail)
    if finding.remedy:
        row.add_row("", "", Text(f"→ {finding.remedy}", style="warn"))
    console().print(row)

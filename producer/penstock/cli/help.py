"""The help pages, in the manner of uv and gh: headings, two columns, no boxes, and no import of rich.

`Group` also loads its commands on first use, so `penstock --help` pays for none of them, and turns every failure of a
command into one line and an exit code.
"""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import typer
import typer.core
import typer.main

from penstock.cli.exits import ExitCode, explain, fail
from penstock.cli.terminal import coloured, paint, visible_length, width

_LEFT = 30


@dataclass(frozen=True, slots=True)
class Entry:
    """A command of a group: where it lives and the line the group's help shows."""

    name: str
    section: str
    summary: str
    module: str


class Command(typer.core.TyperCommand):
    """A command whose help page is rendered here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page to click's `formatter`."""
        formatter.write(_page(self, ctx, []))


class Group(typer.core.TyperGroup):
    """A group of commands, loaded when they are first needed."""

    entries: Sequence[Entry] = ()
    notes: Sequence[tuple[str, str]] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the help page."""
        return [entry.name for entry in self.entries] or super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command called `cmd_name`, imported on first use; None when there is none."""
        for entry in self.entries:
            if entry.name == cmd_name and cmd_name not in self.commands:
                command = typer.main.get_command(importlib.import_module(entry.module).app)
                command.name = cmd_name
                self.commands[cmd_name] = command
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or refuse with the nearest name."""
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            near = get_close_matches(args[0], names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
            ctx.fail(f"no command {args[0]!r}; {remedy}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page to click's `formatter`."""
        rows: list[tuple[str, str, str]] = []
        if self.entries:
            rows = [(entry.section, entry.name, entry.summary) for entry in self.entries]
        else:
            for name in self.list_commands(ctx):
                command = super().get_command(ctx, name)
                rows.append(("Commands", name, (getattr(command, "help", "") or "").partition("\n")[0]))
        formatter.write(_page(self, ctx, rows))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; every failure becomes one line on stderr and an exit code."""
        kwargs["standalone_mode"] = False
        kwargs["color"] = coloured(sys.stdout)
        try:
            outcome = super().main(*args, **kwargs)
        except typer.Abort:
            code = ExitCode.INTERRUPTED
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            _abandon_stdout()
            code = ExitCode.OK
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.ctx.get_help())  # type: ignore[attr-defined]
                code = ExitCode.INVALID
            elif hasattr(error, "format_message"):
                code = ExitCode.INVALID
                fail(code, _usage_line(error))
            else:
                code, message = explain(error)
                fail(code, message)
        else:
            sys.exit(outcome if isinstance(outcome, int) else ExitCode.OK)
        sys.exit(int(code))


def _abandon_stdout() -> None:
    """The reader of a pipe went away: leave nothing for the interpreter to flush at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_line(error: Any) -> str:
    """One line for an error of click's: `--option: what is wrong; see ... --help`."""
    param = getattr(error, "param", None)
    name = _display_name(param) if param is not None else getattr(error, "option_name", None)
    message = str(error.message).strip().rstrip(".")
    if type(error).__name__ == "MissingParameter":
        message = "is required"
    message = message[:1].lower() + message[1:] if message[:1].isupper() and name else message
    ctx = getattr(error, "ctx", None)
    near = getattr(error, "possibilities", None)
    remedy = f"did you mean {near[0]}?" if near else f"see `{ctx.command_path} --help`" if ctx is not None else ""
    if type(error).__name__ == "NoSuchOption":
        message = "no such option"
    line = f"{name}: {message}" if name else message
    return f"{line}; {remedy}" if remedy and "; " not in message else line


def _display_name(param: Any) -> str:
    if getattr(param, "param_type_name", "") == "argument":
        return str(param.metavar or param.name).strip("[]. ").upper()
    return max(param.opts, key=len) if param.opts else str(param.name)


def _page(command: Any, ctx: Any, commands: list[tuple[str, str, str]]) -> str:
    on = coloured(sys.stdout)
    columns = width()
    lines: list[str] = []
    for paragraph in (command.help or "").split("\f")[0].strip().split("\n\n"):
        lines += [_emphasise(line, on) for line in textwrap.wrap(" ".join(paragraph.split()), columns)] + [""]
    usage = [_usage_of(p) for p in command.params if getattr(p, "param_type_name", "") == "argument"]
    usage += ["<command>"] if commands else []
    lines.append(
        f"{paint('Usage:', 'green', 'bold', on=on)} {paint(ctx.command_path, 'cyan', 'bold', on=on)} "
        f"{paint(' '.join([*usage, '[options]']), 'cyan', on=on)}"
    )
    sections = _sections(command, ctx, commands)
    left = min(_LEFT, columns // 2 - 4, max(len(name) for _, rows in sections for name, _ in rows))
    for title, rows in sections:
        lines += ["", paint(title, "green", "bold", on=on)]
        lines += _columns(rows, left, on, columns)
    notes: Sequence[tuple[str, str]] = getattr(command, "notes", ())
    for title, text in notes:
        lines += ["", paint(title, "green", "bold", on=on)]
        lines += ["  " + _emphasise(line, on) for line in textwrap.wrap(text, columns - 2)]
    if command.epilog:
        lines += ["", paint("Examples", "green", "bold", on=on)]
        lines += [_example(line.strip(), on) for line in command.epilog.strip().splitlines()]
    return "\n".join(lines) + "\n"


def _usage_of(param: Any) -> str:
    name = _display_name(param)
    name = f"{name}..." if param.nargs != 1 else name
    return f"<{name.lower()}>" if param.required else f"[{name.lower()}]"


def _sections(command: Any, ctx: Any, commands: list[tuple[str, str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    for section, name, summary in commands:
        sections.setdefault(section, []).append((name, summary))
    options: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            sections.setdefault("Arguments", []).append((_display_name(param), param.help or ""))
            continue
        panel = getattr(param, "rich_help_panel", None) or "Options"
        options.setdefault(panel, []).append((_option_name(param), _option_help(param)))
    plain = options.pop("Options", [])
    sections.update(options)
    if plain:
        sections["Options"] = plain
    return list(sections.items())


def _option_name(param: Any) -> str:
    short = [opt for opt in param.opts if not opt.startswith("--")]
    long = [opt for opt in param.opts if opt.startswith("--")]
    name = f"{short[0]}, {long[0]}" if short and long else f"    {long[0]}" if long else short[0]
    if param.secondary_opts:
        name += f"/{param.secondary_opts[0]}"
    if not param.is_flag and not getattr(param, "count", False):
        name += f" <{(param.metavar or param.name).lower()}>"
    return name


def _option_help(param: Any) -> str:
    text = " ".join((param.help or "").split())
    if param.opts == ["--help"]:
        text = "Show this page."
    if param.opts == ["--install-completion"]:
        text = "Install tab completion for the current shell."
    if param.opts == ["--show-completion"]:
        text = "Print the completion script of the current shell."
    variable = getattr(param, "envvar", None)
    return f"{text} [env: {variable}]" if variable else text


def _columns(rows: list[tuple[str, str]], left: int, on: bool, columns: int) -> list[str]:
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, columns - left - 4) or [""]
        head = "  " + _paint_name(name, on)
        if len(name) > left:
            lines.append(head)
        else:
            lines.append(f"{head}{' ' * (left + 4 - visible_length(head))}{_emphasise(wrapped.pop(0), on)}".rstrip())
        lines += [" " * (left + 4) + _emphasise(line, on) for line in wrapped]
    return lines


def _paint_name(name: str, on: bool) -> str:
    bare, angle, metavar = name.partition(" <")
    return paint(bare, "cyan", "bold", on=on) + (paint(angle + metavar, "cyan", on=on) if angle else "")


def _emphasise(text: str, on: bool) -> str:
    if not on:
        return text
    text = re.sub(r"`([^`]+)`", lambda match: paint(match[1], "cyan", on=True), text)
    return re.sub(r"(\[(?:env|default): [^\]]+\])", lambda match: paint(match[1], "dim", on=True), text)


def _example(line: str, on: bool) -> str:
    if line.startswith("#"):
        return "  " + paint(line, "dim", on=on)
    return "  " + paint(line, "cyan", on=on)

"""The help pages: complete, narrow enough, quick to print, and honest about what the commands are."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from penstock.cli.app import ENTRIES, app
from penstock.cli.help import Entry
from penstock.cli.terminal import visible_length

OWN_HELP = [entry for entry in ENTRIES if entry.name != "worker"]  # the worker's --help is the worker's own


def run(*args: str, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, list(args), env=env, color=True)


def in_fresh_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)


def test_help_names_every_command_with_its_summary():
    outcome = run("--help", env={"COLUMNS": "120"})
    assert outcome.exit_code == 0
    for entry in ENTRIES:
        assert f"{entry.name} " in outcome.stdout
        assert entry.summary in outcome.stdout


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_summary_in_the_table_is_the_first_line_of_the_command(entry: Entry):
    found = importlib.import_module(entry.module).app
    callback = found.registered_callback or found.registered_commands[0]
    assert (callback.callback.__doc__ or "").strip().splitlines()[0] == entry.summary


@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("entry", OWN_HELP, ids=lambda entry: entry.name)
def test_help_fits_the_terminal(entry: Entry, columns: int):
    outcome = run(entry.name, "--help", env={"COLUMNS": str(columns)})
    assert outcome.exit_code == 0
    page = outcome.stdout.partition("\nExamples")[0]
    assert max(visible_length(line) for line in page.splitlines()) <= columns
    assert "Usage:" in page


@pytest.mark.parametrize("sub", ["list", "show", "requeue", "purge"])
def test_dead_has_a_page_for_each_verb(sub: str):
    assert run("dead", sub, "--help").exit_code == 0
    assert sub in run("dead", "--help").stdout


def test_colour_only_where_it_belongs():
    plain = run("--help").stdout
    assert "\x1b[" not in plain
    assert "\x1b[" in run("--help", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[" not in run("--help", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout


def test_help_loads_nothing_heavy():
    """`penstock --help` is typed in every shell's completion: it must not pay for rich, redis, pydantic or torch."""
    code = """
import sys
sys.argv = ["penstock", "--help"]
from penstock.cli import main
try:
    main()
finally:
    heavy = {"rich", "redis", "pydantic", "msgpack", "torch", "numpy", "asyncio"} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""
    done = in_fresh_python(code)
    assert done.returncode == 0
    assert "heavy: []" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_one_line_with_the_remedy(missing: str):
    code = f"""
import sys
sys.modules[{missing!r}] = None
sys.argv = ["penstock", "top", "--once", "--redis", "redis://127.0.0.1:1"]
from penstock.cli import main
main()
"""
    done = in_fresh_python(code)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: the command line needs {missing}; install it with: pip install 'penstock[cli]'"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["submt"], "error: no command 'submt'; did you mean submit?"),
        (["zzz"], "error: no command 'zzz'; one of demo, submit"),
        (["--nope"], "error: --nope: no such option; see `penstock --help`"),
        (["jobs", "--limt", "3"], "error: --limt: no such option; did you mean --limit?"),
        (["jobs", "--limit", "x"], "error: --limit: "),
        (["result"], "error: ID: is required; see `penstock result --help`"),
        (["result", "a", "--timeout", "-1"], "error: --timeout: -1.0 is no number of seconds; give 0 or more"),
        (["watch", "a", "--from", "-1"], "error: --from: -1 is negative; 0 is the first token"),
        (["jobs", "--state", "odd"], "error: --state: 'odd' is no state; one of cancelled, completed"),
        (["jobs", "--limit", "0"], "error: --limit: 0 is out of range; 1 to 10000"),
        (["dead", "requeue"], "error: ID: give job ids or --all"),
        (["dead", "purge", "a", "--all"], "error: ID: give job ids or --all, not both"),
        (["top", "--interval", "0"], "error: --interval: 0.0 is out of range; 0.1 to 3600 seconds"),
        (["serve", "--workers", "0"], "error: --workers: 0 is out of range; 1 to 256"),
        (["serve", "--port", "70000"], "error: --port: 70000 is no port; 1 to 65535"),
        (["serve", "--ephemeral", "--data", "x"], "error: --ephemeral: "),
        (["demo", "--record", "x.png"], "error: --record: x.png does not end in .svg"),
        (["submit", "a", "--wait", "--stream"], "error: --wait: "),
        (["submit", "a", "--timeout", "3"], "error: --timeout: has no meaning without --wait or --stream"),
        (["jobs", "--queue", "no spaces"], "error: queue: 'no spaces' is no queue name"),
        (["jobs", "--redis", "http://x"], "error: redis: 'http://x' begins with none of redis"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_field(args: list[str], line: str):
    outcome = run(*args)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(line)
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_no_arguments_show_the_help():
    outcome = run()
    assert outcome.exit_code == 2
    assert "Usage:" in outcome.stdout


def test_version_is_printed_by_flag_and_by_command():
    words = run("version").stdout
    assert words.startswith("penstock ")
    assert run("--version").stdout == words
    import json

    assert json.loads(run("version", "--json").stdout)["penstock"] == words.split()[1]


@pytest.mark.parametrize(
    "args",
    [["jobs"], ["cancel", "x"], ["result", "x"], ["watch", "x"], ["submit", "x"], ["dead", "list"], ["top", "--once"]],
    ids=lambda args: args[0],
)
def test_broker_that_is_down_is_exit_code_7(args: list[str]):
    outcome = run(*args, "--redis", "redis://127.0.0.1:1")
    assert outcome.exit_code == 7
    assert outcome.stderr.startswith("error: broker: Redis at redis://127.0.0.1:1: ")
    assert "penstock serve" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1

"""Lua scripts and how they are called: by SHA-1, sent whole only to a server that does not know them yet.

A `Call` is a script with its keys, its arguments and the parser of its reply: a value that any runner can execute,
alone or many in one round trip. Nothing is retried here, except a call the server refused to begin (NOSCRIPT).
redis-py is imported where a call runs: it takes longer than all of the client, which is imported by many and run by
few.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import redis
    import redis.asyncio

T = TypeVar("T")
Argument = bytes | str | int

_INCLUDE = re.compile(r"^--@include (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """One transition's Lua text, complete with the shared pieces it includes, and its SHA-1."""

    name: str
    text: str
    sha1: str


@cache
def load_script(name: str) -> Script:
    """The script `scripts/<name>.lua`, with each `--@include a b` replaced by `scripts/shared/a.lua`, `b.lua`."""
    folder = files("penstock_core.protocol") / "scripts"
    body = (folder / f"{name}.lua").read_text("utf-8")

    def included(match: re.Match[str]) -> str:
        return "\n".join((folder / "shared" / f"{part}.lua").read_text("utf-8") for part in match[1].split())

    text = _INCLUDE.sub(included, body)
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of a script: what to send, and how to read the reply."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Argument]
    parse: Callable[[Any], T]


def run(client: redis.Redis, call: Call[T]) -> T:
    """Execute a call in one round trip (two where the server does not know the script)."""
    from redis.exceptions import NoScriptError

    script = call.script
    try:
        reply = client.evalsha(script.sha1, len(call.keys), *call.keys, *call.args)
    except NoScriptError:
        reply = client.eval(script.text, len(call.keys), *call.keys, *call.args)
    return call.parse(reply)


async def run_async(client: redis.asyncio.Redis, call: Call[T]) -> T:
    """As `run`, for asyncio."""
    from redis.exceptions import NoScriptError

    script = call.script
    try:
        reply = await client.evalsha(script.sha1, len(call.keys), *call.keys, *call.args)
    except NoScriptError:
        reply = await client.eval(script.text, len(call.keys), *call.keys, *call.args)
    return call.parse(reply)


def run_many(client: redis.Redis, calls: Sequence[Call[T]]) -> list[T]:
    """Execute independent calls in one round trip; the first error reply is raised after all were executed."""
    replies = _pipelined(client, calls)
    missing = _unknown(replies)
    if missing:
        for script in {calls[i].script for i in missing}:
            client.script_load(script.text)
        for i, reply in zip(missing, _pipelined(client, [calls[i] for i in missing]), strict=True):
            replies[i] = reply
    return _parsed(calls, replies)


async def run_many_async(client: redis.asyncio.Redis, calls: Sequence[Call[T]]) -> list[T]:
    """As `run_many`, for asyncio."""
    replies = await _pipelined_async(client, calls)
    missing = _unknown(replies)
    if missing:
        for script in {calls[i].script for i in missing}:
            await client.script_load(script.text)
        again = await _pipelined_async(client, [calls[i] for i in missing])
        for i, reply in zip(missing, again, strict=True):
            replies[i] = reply
    return _parsed(calls, replies)


def _unknown(replies: Sequence[Any]) -> list[int]:
    """Places of the calls whose script the server does not know."""
    from redis.exceptions import NoScriptError

    return [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]


def _pipelined(client: redis.Redis, calls: Sequence[Call[Any]]) -> list[Any]:
    pipe: Any
    with client.pipeline(transaction=False) as pipe:
        for call in calls:  # not pipe.evalsha, which redis-py forbids in a cluster's pipeline
            pipe.execute_command("EVALSHA", call.script.sha1, len(call.keys), *call.keys, *call.args)
        return list(pipe.execute(raise_on_error=False))


async def _pipelined_async(client: redis.asyncio.Redis, calls: Sequence[Call[Any]]) -> list[Any]:
    async with client.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.execute_command("EVALSHA", call.script.sha1, len(call.keys), *call.keys, *call.args)
        return list(await pipe.execute(raise_on_error=False))


def _parsed(calls: Sequence[Call[T]], replies: Sequence[Any]) -> list[T]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [call.parse(reply) for call, reply in zip(calls, replies, strict=True)]

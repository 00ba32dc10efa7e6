"""The scripts as files, and how calls reach the server."""

from __future__ import annotations

import re
from importlib.resources import files

import fakeredis
import pytest
import redis

from penstock_core.protocol import transitions as t
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.script import load_script, run_async, run_many, run_many_async
from tests.queue_driver import QueueDriver

FOLDER = files("penstock_core.protocol") / "scripts"
SCRIPTS = sorted(path.name.removesuffix(".lua") for path in FOLDER.iterdir() if path.name.endswith(".lua"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_its_keys_arguments_answers_and_refusals(name: str) -> None:
    header = re.match(r"(--.*\n)+", (FOLDER / f"{name}.lua").read_text("utf-8"))
    assert header is not None
    for part in ("KEYS[1] prefix", "ARGV[1] now_ms", "-- Returns", "-- Refuses"):
        assert part in header[0], f"{name}.lua says nothing of {part}"
    assert "--@include base" in header[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_touches_only_its_queue_s_keys(name: str) -> None:
    text = load_script(name).text
    for command, key in re.findall(r"call\('([A-Z]+)', ([^,)]+)", text):
        if command not in ("TIME", "SCAN"):
            ours = r"Q \.\. |key$|log$|stream|unpack\(keys|order\.key|line\[at\]\.key"
            assert re.match(ours, key), f"{command} {key}"


def test_a_server_that_forgot_the_scripts_is_sent_them_again(driver: QueueDriver) -> None:
    driver.submit()
    driver.client.script_flush()
    driver.submit()
    driver.client.script_flush()
    assert len(driver.claim(max_jobs=5)) == 2


def test_many_calls_travel_together_and_answer_in_order(driver: QueueDriver) -> None:
    driver.client.script_flush()
    jobs = [driver.new_job() for _ in range(3)]
    calls = [t.submit(driver.keys, [job], now_ms=driver.now) for job in [*jobs, jobs[0]]]
    outcomes = [outcome for (outcome,) in run_many(driver.client, calls)]
    assert [outcome.status for outcome in outcomes] == ["accepted"] * 3 + ["duplicate"]
    assert [outcome.job_id for outcome in outcomes] == [job.job_id for job in [*jobs, jobs[0]]]
    assert run_many(driver.client, []) == []


def test_an_error_among_many_calls_is_raised_after_all_were_executed(driver: QueueDriver) -> None:
    bad = t.Call(load_script("claim"), (driver.keys.prefix,), [driver.now, "w1", "x"], lambda reply: reply)
    good = t.submit(driver.keys, [driver.new_job()], now_ms=driver.now)
    with pytest.raises(redis.ResponseError):
        run_many(driver.client, [bad, good])
    assert driver.stats()["queued"] == 1


async def test_the_asyncio_runners_do_the_same(keys: QueueKeys) -> None:
    client = fakeredis.FakeAsyncRedis(version=(7,), protocol=2)
    submit = [t.submit(keys, [QueueDriver.new_job(QueueDriver(client, keys), f"job{i}")]) for i in range(2)]
    assert [outcome.status for (outcome,) in await run_many_async(client, submit)] == ["accepted", "accepted"]
    await client.script_flush()
    claim = t.claim(keys, "w", max_jobs=5, free_sequences=5, free_tokens=1000, lease_ms=1000, idle=True)
    assert len((await run_async(client, claim)).jobs) == 2
    assert await run_many_async(client, []) == []
    await client.aclose()


def test_the_server_s_clock_is_used_where_no_time_is_given(driver: QueueDriver) -> None:
    seconds, microseconds = driver.client.time()
    driver.run(t.submit(driver.keys, [driver.new_job("j")]))
    assert 0 <= driver.status("j").submitted_ms - (seconds * 1000 + microseconds // 1000) < 60_000

"""The dashboard in headless Chromium: it asks for the key, shows the queue, streams, and runs nothing it was fed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock import Client
from penstock_core.protocol.codec import encode_event
from penstock_core.protocol.events import JobEnded
from penstock_core.protocol.jobs import JobFailure, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import BuryRecord, bury, run
from tests.integration.gateway.conftest import KEYS, OPERATOR_KEY, Gateway
from tests.integration.producer.scripted import ScriptedWorker
from tests.redis_server import RedisServer

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no chromium"),
]

KEY = next(key for key, tenant in KEYS.items() if tenant == "mill")
PICTURES = (
    ("dashboard", 1280, 1150, "light"),
    ("dashboard-phone", 500, 1000, "light"),
    ("dashboard-dark", 1280, 1150, "dark"),
)
EVIL = "<img src=x onerror=\"document.title='broken into'\"><script>document.title='broken into'</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    made = webdriver.Chrome(options=options, service=service)
    made.set_window_size(1280, 1000)
    yield made
    made.quit()


def points(browser: webdriver.Chrome, plot: str) -> int:
    """How many points a plot has."""
    script = "return document.querySelector('#' + arguments[0] + ' polyline')?.getAttribute('points').split(' ').length"
    return int(browser.execute_script(script, plot) or 0)


def until(browser: webdriver.Chrome, selector: str, pattern: str) -> str:
    """The element's text, once it matches."""
    found: list[str] = []

    def matches(_: object) -> bool:
        # In one script: the page draws its tables anew every second, and an element that was found would be gone.
        found_by = "[...document.querySelectorAll(arguments[0])]"
        script = f"return {found_by}.filter(e => e.checkVisibility()).map(e => e.innerText)"
        texts = browser.execute_script(script, selector)
        found[:] = [text for text in texts if re.search(pattern, text)][:1]
        return bool(found)

    wait(browser).until(matches, f"{selector} never shows {pattern}")
    return found[0]


def wait(browser: webdriver.Chrome) -> WebDriverWait[webdriver.Chrome]:
    return WebDriverWait(browser, 120)


def press(browser: webdriver.Chrome, table: str, label: str) -> None:
    """Click the first button of a table that says so, in one script for the same reason."""
    script = (
        "const buttons = [...document.querySelectorAll(`#${arguments[0]} button`)];"
        "const button = buttons.find(b => b.innerText === arguments[1]);"
        "button?.click(); return Boolean(button)"
    )
    wait(browser).until(lambda _: browser.execute_script(script, table, label), f"no button {label}")


def test_page_allows_only_its_own_script(gateway: Gateway) -> None:
    answer = httpx.get(gateway.url)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "innerHTML" not in answer.text
    assert not re.search(r"(src|href)=\"?(https?:)?//", answer.text), "it works offline"


def test_dashboard_from_the_key_to_a_requeued_job(
    browser: webdriver.Chrome, gateway: Gateway, story_redis: RedisServer
) -> None:
    browser.get(gateway.url)
    until(browser, "#key", "asks for a key")
    browser.find_element(By.ID, "key-field").send_keys("nobody-has-this-key")
    browser.find_element(By.CSS_SELECTOR, "#key-form button").click()
    until(browser, "#trouble", "nobody has this key")
    browser.find_element(By.ID, "key-field").send_keys(OPERATOR_KEY)
    browser.find_element(By.CSS_SELECTOR, "#key-form button").click()
    until(browser, "#health", "1 worker")
    until(browser, "#workers code", ".")
    assert browser.execute_script("return document.querySelector('#workers meter').title")

    field = browser.find_element(By.ID, "prompt")
    field.clear()
    field.send_keys("The miller found a lantern")
    browser.find_element(By.ID, "go").click()
    until(browser, "#play-text", r"completed: \d+ tokens")
    assert browser.find_element(By.ID, "answer").text
    until(browser, "#latency-text", "median")
    wait(browser).until(lambda _: points(browser, "rate") >= 3 and points(browser, "latency") >= 2)

    with Client(story_redis.url, queue="penstock-story") as client:
        waiting = client.submit("later", tenant="mill", delay_s=3600)
        until(browser, "#jobs td.state", "delayed")
        until(browser, "#jobs td", "^mill$")
        press(browser, "jobs", "Cancel")
        wait(browser).until(lambda _: waiting.status().state is JobState.CANCELLED)
    assert not [entry for entry in browser.get_log("browser") if "Content Security" in entry["message"]]


def test_dead_job_is_shown_as_text_and_put_back_in_line(
    browser: webdriver.Chrome, story_redis: RedisServer, tmp_path: Path
) -> None:
    """A job's message is never markup. This queue has no worker, so the job stays where the button puts it."""
    keys = QueueKeys("dashboard-dead")
    with Client(story_redis.url, queue=keys.queue) as client, story_redis.client() as redis:
        job = client.submit("doomed")
        worker = ScriptedWorker(redis, keys)
        held = worker.claim_one(job.id)
        ended = encode_event(JobEnded(JobState.DEAD, held.attempt, None, JobFailure("poison", EVIL)))
        assert run(redis, bury(keys, worker.id, [BuryRecord(job.id, held.attempt, "poison", EVIL, ended)])) == ["ok"]
        gateway = Gateway(story_redis.url, tmp_path, "--queue", keys.queue)
        gateway.start()
        try:
            browser.get(gateway.url)
            assert EVIL in until(browser, "#dead", "onerror")
            assert browser.title == "Penstock"
            press(browser, "dead", "Requeue")
            wait(browser).until(lambda _: job.status().state is JobState.QUEUED)
            until(browser, "#lines", "default")
        finally:
            gateway.stop()
            job.cancel()


def test_a_tenant_sees_its_own_jobs_and_limits_and_nothing_else(
    browser: webdriver.Chrome, gateway: Gateway, http: httpx.Client, stranger: httpx.Client
) -> None:
    theirs = stranger.post("/v1/jobs", json={"prompt": "secret", "delay_s": 3600}).json()
    mine = http.post("/v1/jobs", json={"prompt": "mine", "delay_s": 3600}).json()
    try:
        show(browser, gateway, KEY)
        until(browser, "#health", "tenant mill")
        until(browser, "#quota", "jobs waiting")
        until(browser, "#jobs code", mine["id"][-7:])
        assert theirs["id"][-7:] not in browser.find_element(By.ID, "jobs").text
        for hidden in ("workers", "rate"):
            assert not browser.find_element(By.ID, hidden).is_displayed()
    finally:
        http.delete(mine["status_url"])
        stranger.delete(theirs["status_url"])


def show(browser: webdriver.Chrome, gateway: Gateway, key: str) -> None:
    """Open the page with a key in the tab."""
    browser.get(gateway.url)
    browser.execute_script("sessionStorage.setItem('penstock-api-key', arguments[0])", key)
    browser.get(gateway.url)


@pytest.mark.parametrize(("name", "width", "height", "scheme"), PICTURES)
def test_nothing_is_cut_off_and_text_stands_out(
    browser: webdriver.Chrome, gateway: Gateway, http: httpx.Client, name: str, width: int, height: int, scheme: str
) -> None:
    """With PENSTOCK_SCREENSHOTS=<folder>, keeps the pictures of the docs."""
    folder = os.environ.get("PENSTOCK_SCREENSHOTS")
    for n in range(200 if folder else 1):
        http.post("/v1/jobs", json={"prompt": f"Letter {n}", "max_tokens": 300, "priority": n % 10, "n": 4})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.set_window_size(width, height)
    show(browser, gateway, OPERATOR_KEY)
    until(browser, "#health", "worker")
    until(browser, "#latency-text", "median")
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"{name} is {wide} pixels too wide"
    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    background, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in browser.execute_script(colours))
    assert (background < 64) == (scheme == "dark")
    assert abs(background - ink) > 128
    if folder:
        wait(browser).until(lambda _: points(browser, "rate") > 12)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_the_page_of_routes_describes_every_route_and_loads_nothing_from_elsewhere(
    browser: webdriver.Chrome, gateway: Gateway
) -> None:
    """The story: /docs was a script of another host's, on the origin of the dashboard with its keys."""
    page = httpx.get(f"{gateway.url}/docs")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "://" not in page.text
    browser.get(f"{gateway.url}/docs")
    described = httpx.get(f"{gateway.url}/openapi.json").json()["paths"]
    wanted = sum(len(methods) for methods in described.values())
    wait(browser).until(
        lambda _: browser.execute_script("return document.querySelectorAll('details').length") == wanted, "every route"
    )
    assert "The miller lost her" in str(browser.execute_script("return document.body.textContent"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

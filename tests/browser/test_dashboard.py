"""The dashboard in a real browser, against the real gateway as a process and fake providers.

Not part of `make test`: it needs Chromium and its driver, which `make test-browser` installs where they are missing.
Selenium blocks, so the gateway and the providers live in a loop of their own, in another thread. One browser and one
gateway serve every test that can do with the usual platforms; before each of them the gateway is as it was at first,
but for its log. At the end of each test the console must be silent and nobody but the gateway may have been asked.
"""

import asyncio
import json
import shutil
import sqlite3
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from conftest import API_KEY, Process, catalog_of, end
from fake_provider import DONE, FakeProvider, Wait, answer, body, chunk, error, event, sse, usage_chunk
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 15  # for everything that is waited for; a healthy run needs a fraction of it
WIDE, PHONE = (1280, 900), (390, 844)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PASSWORD_MANAGER = (
    "credentials_enable_service", "profile.password_manager_enabled", "profile.password_manager_leak_detection",
)  # fmt: skip
PLATFORMS = {  # two models in each pool, in this order
    name: {"model": {"model_id": f"{name}-model", "name": name.title(), "speed_rank": speed, "intelligence_rank": wits}}
    for name, speed, wits in [
        ("quick", 1, 90), ("rapid", 2, 80), ("clever", 90, 1), ("wise", 80, 2), ("middle", 70, 70), ("usual", 75, 75),
    ]
}  # fmt: skip


# Texts whose contrast with what is behind them is below WCAG's AA. A canvas mixes the colours as the page does.
FAINT_TEXT = """
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true}), faint = [];
    const paint = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
    const linear = (part) => part <= 10.3 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4;
    const brightness = () => {
        const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement, style = getComputedStyle(element), behind = [];
        if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
        if (element.closest(":disabled, option, .sr, .skip, noscript, #toasts")) continue;
        for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
        behind.forEach(paint);
        const back = brightness();
        paint(style.color);
        const front = brightness(), contrast = Math.max(back, front) / Math.min(back, front);
        const isLarge = parseFloat(style.fontSize) >= 24;
        if (contrast < (isLarge ? 3 : 4.5)) faint.push(`${texts.currentNode.data}: ${contrast.toFixed(2)}`);
    }
    return faint;
"""


@dataclass
class Browser:
    """One page, and what a person does with it."""

    driver: webdriver.Chrome
    url: str

    def open(self, view: str = "") -> None:
        self.driver.get(f"{self.url}/#{view}")

    def log_in(self, view: str = "overview", key: str = API_KEY) -> None:
        self.open(view)
        self.one("#key").send_keys(key, Keys.ENTER)
        self.one("nav")

    def go(self, view: str) -> None:
        self.one(f"nav a[href='#{view}']").click()
        self.one(f"nav a[href='#{view}'][aria-current]")

    def until(self, condition, message: str = ""):
        ignored = (StaleElementReferenceException, AssertionError, IndexError, StopIteration)
        try:
            return WebDriverWait(self.driver, WAIT_S, 0.03, ignored).until(lambda _: condition())
        except TimeoutException:
            shown = self.run("return `${location} ${document.visibilityState}: ${document.body.innerText}`")
            raise AssertionError(f"waited in vain for {message or 'a condition'} at {shown[:2000]}") from None

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.until(lambda: self.all(css)[0], css)

    def labelled(self, name: str) -> WebElement:
        return self.one(f"[aria-label='{name}']")

    def named(self, words: str, tag: str = "button") -> WebElement:
        return self.until(lambda: next((e for e in self.all(tag) if e.text == words), None), words)

    def sees(self, words: str, css: str = "body") -> None:
        self.until(lambda: words in self.one(css).text, f"{words!r} in {css}")

    def misses(self, words: str, css: str = "body") -> None:
        self.until(lambda: words not in self.one(css).text, f"no {words!r} in {css}")

    def names(self, pool: str) -> list[str]:
        """The models of one pool, from top to bottom."""
        return [e.text for e in self.all(f"[data-pool={pool}] td.name b")]

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def choose(self, css: str, value: str) -> None:
        self.until(lambda: Select(self.one(css)).select_by_value(value) is None, f"{value} can be chosen")

    def say(self, text: str, model: str = "") -> None:
        """Send a message from the playground and wait for the whole answer."""
        if model:
            self.choose("#model", model)
        self.one("#say").send_keys(text, Keys.ENTER)
        self.sees("whole answer", "#talk")

    def offline(self, is_offline: bool) -> None:
        conditions = {"offline": is_offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def requested(self) -> set[str]:
        """Hosts and schemes of everything the page has asked for since the last call."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return {f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, urls)}

    def complaints(self) -> list[str]:
        """Errors and warnings in the console since the last call; not the browser's note of each refused request."""
        entries = [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        return [message for message in entries if "the server responded with a status of" not in message]


class World:
    """The gateway as a process, and its providers, in a thread of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.url = ""
        self._chain: list[dict] = []
        self.fake: FakeProvider = self.run(self._stack.enter_async_context(FakeProvider().serving()))

    def run(self, work: Coroutine):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def start(self, platforms=PLATFORMS, **settings: str) -> str:
        """Start `python gateway.py`; gives its address."""
        self.url = self.run(self._start(platforms, settings))
        self._chain = self.call("GET", "/api/fallback")
        return self.url

    def call(self, method: str, path: str, body: object = None):
        """What the gateway itself says, past the browser."""
        return self.run(self._call(method, path, body))

    async def _call(self, method: str, path: str, body: object):
        authorized = {"authorization": f"Bearer {API_KEY}"}
        async with aiohttp.request(method, self.url + path, json=body, headers=authorized) as response:
            return await response.json()

    def entry(self, model_id: str) -> dict:
        """One model in the chain."""
        return next(entry for entry in self.call("GET", "/api/fallback") if entry["model_id"] == model_id)

    def reset(self) -> None:
        """Back to the chain of the first start, without cooldowns and scripts."""
        self.call("DELETE", "/api/protection/cooldowns")
        order = [{name: entry[name] for name in ("model_db_id", "priority", "enabled")} for entry in self._chain]
        self.call("PUT", "/api/fallback", order)
        for name in PLATFORMS:
            self.fake.script(name, answer())
        self.fake.clear()

    async def _start(self, platforms, settings: dict[str, str]) -> str:
        catalog = self.folder / "catalog.json"
        catalog.write_text(json.dumps(catalog_of(platforms, self.fake)))
        environ = {
            "GATEWAY_PORT": "0",
            "GATEWAY_API_KEY": API_KEY,
            "LOG_LEVEL": "error",
            "GATEWAY_CATALOG": str(catalog),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "gateway.py"), cwd=self.folder, env=environ | settings,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        running = Process(process)
        self._stack.push_async_callback(end, running)
        return await running.ready()

    def event(self) -> asyncio.Event:
        return asyncio.Event()

    def set(self, event: asyncio.Event) -> None:
        self._loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    options.add_experimental_option("prefs", dict.fromkeys(PASSWORD_MANAGER, False))  # nothing may pop up over the page
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    """The gateway that the tests share."""
    world = World(tmp_path_factory.mktemp("gateway"))
    world.start(TRANSIENT_COOLDOWN_MS="5000")
    yield world
    world.close()


@pytest.fixture
def own_world(tmp_path) -> Iterator[World]:
    """For a gateway that has to be another one."""
    world = World(tmp_path)
    yield world
    world.close()


@contextmanager
def watched(driver: webdriver.Chrome, url: str) -> Iterator[Browser]:
    """A tab of its own, wide and light; it must have nothing to complain of in the end."""
    browser, before = Browser(driver, url), driver.current_window_handle
    driver.switch_to.new_window("tab")
    tab = driver.current_window_handle
    driver.switch_to.window(before)
    driver.close()
    driver.switch_to.window(tab)
    browser.size(*WIDE)
    browser.prefer("light")
    browser.requested(), browser.complaints()
    yield browser
    driver.get("about:blank")
    assert browser.requested() <= {browser.url, "data://", "about://"}
    assert browser.complaints() == []


@pytest.fixture
def browser(driver, world) -> Iterator[Browser]:
    world.reset()
    with watched(driver, world.url) as browser:
        yield browser


@pytest.fixture
def open_browser(driver, own_world):
    """Open the dashboard of a gateway with these platforms and settings."""
    with ExitStack() as stack:
        yield lambda platforms=PLATFORMS, **settings: stack.enter_context(
            watched(driver, own_world.start(platforms, **settings))
        )


# --- Coming in ------------------------------------------------------------------------------------------------------


def test_only_the_right_key_opens_it_and_the_tab_alone_keeps_it(browser):
    browser.open()
    browser.one("#key").send_keys("wrong", Keys.ENTER)
    browser.sees("That is not the key.", "[role=alert]")
    browser.one("#key").clear()
    browser.one("#key").send_keys(API_KEY, Keys.ENTER)
    browser.sees("Requests", ".tiles")
    assert browser.run("return Object.values(sessionStorage)") == [API_KEY]
    assert browser.run("return localStorage.length + document.cookie.length") == 0
    browser.driver.refresh()
    browser.sees("Requests", ".tiles")
    assert API_KEY not in browser.run("return document.documentElement.outerHTML")
    browser.named("Log out").click()
    browser.one("#key")
    assert browser.run("return sessionStorage.length") == 0


def test_nothing_injected_runs(browser):
    browser.log_in()
    browser.run("""
        window.broken = [];
        document.addEventListener("securitypolicyviolation", (event) => broken.push(event.violatedDirective));
        const script = document.createElement("script");
        try { script.text = "window.ran = true" } catch { broken.push("trusted types") }
        document.body.append(script);
        document.body.setAttribute("style", "color: red");
        fetch("https://elsewhere.invalid/").catch(() => {});
    """)
    browser.until(lambda: "connect-src" in browser.run("return broken"))
    assert browser.run("return window.ran") is None
    assert {"trusted types", "connect-src"} <= set(browser.run("return broken"))
    assert browser.run("return document.body.style.color") == ""
    browser.complaints()  # these were asked for
    browser.requested()


def test_what_a_provider_says_is_text_and_never_markup(browser, world):
    for name in PLATFORMS:
        world.fake.script(name, error(400, "<img src=x onerror='window.ran=1'><b>bold</b>"))
    browser.log_in("playground")
    browser.one("#say").send_keys("hi", Keys.ENTER)
    browser.sees("<b>bold</b>", "#talk")
    browser.go("requests")
    browser.one("details summary").click()
    browser.sees("<b>bold</b>", "details")
    assert browser.run("return window.ran ?? document.querySelectorAll('main img').length") == 0


# --- Overview -------------------------------------------------------------------------------------------------------


def test_an_empty_gateway_says_what_to_do_next(open_browser):
    browser = open_browser({"quick": PLATFORMS["quick"] | {"keys": []}})
    browser.log_in()
    browser.sees("No provider key yet.")
    browser.sees("No requests in the last 24h.")
    browser.one("main a[href='#keys']").click()
    browser.sees("No keys yet.")
    browser.go("requests")
    browser.sees("No requests yet.")
    browser.go("playground")
    browser.sees("Say something.")


def test_the_charts_show_what_happened(browser, world):
    world.fake.script("quick", error(503), answer())
    browser.log_in("playground")
    browser.say("hi")
    browser.go("overview")
    browser.until(lambda: len(browser.all(".figure svg")) == 3)
    report = world.call("GET", "/api/analytics")
    latest = f"{report['series'][-1]['requests']} request"
    assert [e.get_attribute("role") for e in browser.all(".figure svg")] == ["img"] * 3
    browser.until(lambda: f"Latest: {latest}" in browser.one(".figure svg").get_attribute("aria-label"))
    browser.until(lambda: browser.one(".tiles").text.startswith(f"Requests\n{report['totals']['requests']}\n"))
    browser.run("document.querySelector('.figure svg').focus()")
    browser.keys(Keys.ARROW_LEFT)
    browser.sees(latest, ".grid .panel")
    browser.named("7d").click()
    browser.until(lambda: "last 7d" in browser.one(".figure svg").get_attribute("aria-label"))


def test_a_cooldown_appears_counts_down_and_goes(browser, world):
    browser.log_in("playground")
    world.fake.script("quick", error(503, "overloaded"))
    browser.say("hi", model="quick/quick-model")
    browser.go("overview")
    browser.sees("quick-model", ".cooldown")
    browser.run("document.querySelector('.cooldown').marked = true")
    first = browser.one(".cooldown .num").text
    browser.until(lambda: browser.one(".cooldown .num").text != first, "it counts down")
    assert browser.run("return document.querySelector('.cooldown').marked"), "it is the same row, not a new one"
    browser.sees("None: every model may be tried.")


def test_cooldowns_are_cleared_by_a_button(browser, world):
    browser.log_in("playground")
    world.fake.script("quick", error(429, headers={"retry-after": "600"}), answer())
    browser.say("hi", model="quick/quick-model")
    browser.go("overview")
    browser.sees("quick-model", ".cooldown")
    browser.one("#clear").click()
    browser.sees("None has hit its limit.")
    assert world.call("GET", "/api/protection")["key_cooldowns"] == []


# --- Routing --------------------------------------------------------------------------------------------------------


def test_the_chain_is_shown_by_pool_and_sorted_by_any_column(browser):
    browser.log_in("routing")
    browser.until(lambda: browser.names("fast") == ["Rapid", "Quick"])  # by wits at the first start
    assert browser.names("smart") == ["Clever", "Wise"]
    assert browser.names("balanced") == ["Middle", "Usual"]
    sorter = browser.one("[data-pool=fast] [data-sort=display_name]")
    sorter.click()
    assert browser.names("fast") == ["Quick", "Rapid"]
    assert browser.one("[data-pool=fast] th[aria-sort]").get_attribute("aria-sort") == "ascending"
    browser.one("[data-pool=fast] [data-sort=display_name]").click()
    assert browser.names("fast") == ["Rapid", "Quick"]
    assert browser.names("smart") == ["Wise", "Clever"]
    assert not browser.labelled("Move Quick up").is_enabled()
    browser.one("#search").send_keys("wis")
    assert browser.names("smart") == ["Wise"]
    browser.sees("No model of this lane matches.", ".lane.fast")


def test_a_switch_takes_a_model_out_of_the_chain_and_puts_it_back(browser, world):
    browser.log_in("routing")
    browser.labelled("Quick in the chain").click()
    browser.until(lambda: not world.entry("quick-model")["enabled"])
    assert not browser.labelled("Quick in the chain").is_selected()
    browser.labelled("Quick in the chain").click()
    browser.until(lambda: world.entry("quick-model")["enabled"])


def test_a_switch_goes_back_when_the_gateway_refuses(browser, world):
    browser.log_in("routing")
    switch = browser.labelled("Quick in the chain")
    with closing(sqlite3.connect(world.folder / "gateway.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert browser.run("arguments[0].click(); return arguments[0].checked", switch) is False, "it moves at once"
        browser.sees("Nothing was changed", "#toasts")
    browser.until(lambda: browser.labelled("Quick in the chain").is_selected())
    assert world.entry("quick-model")["enabled"]


def test_models_are_reordered_by_dragging(browser, world):
    browser.log_in("routing")
    browser.until(lambda: browser.names("fast") == ["Rapid", "Quick"])
    row = browser.one("[data-pool=fast] tr[data-id]")
    grip = browser.labelled("Drag Quick")
    ActionChains(browser.driver).click_and_hold(grip).move_to_element(row).release().perform()
    browser.until(lambda: browser.names("fast") == ["Quick", "Rapid"])
    browser.until(lambda: world.entry("quick-model")["priority"] < world.entry("rapid-model")["priority"])
    grip = browser.labelled("Drag Quick")
    ActionChains(browser.driver).click_and_hold(grip).move_by_offset(0, 60).perform()
    browser.until(lambda: browser.names("fast") == ["Rapid", "Quick"])
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).release().perform()
    browser.until(lambda: browser.names("fast") == ["Quick", "Rapid"], "Escape lets go without a change")
    assert world.entry("quick-model")["priority"] < world.entry("rapid-model")["priority"]


def test_models_are_reordered_by_keyboard_and_keep_the_focus(browser, world):
    browser.log_in("routing")
    browser.labelled("Move Quick up").send_keys(Keys.ENTER)
    browser.until(lambda: browser.names("fast") == ["Quick", "Rapid"])
    browser.run("arguments[0].focus()", browser.labelled("Drag Quick"))
    browser.keys(Keys.ARROW_DOWN)
    browser.until(lambda: browser.names("fast") == ["Rapid", "Quick"])
    assert browser.focused().get_attribute("aria-label") == "Drag Quick"
    browser.until(lambda: world.entry("rapid-model")["priority"] < world.entry("quick-model")["priority"])
    browser.until(lambda: "Quick is now" in browser.run("return document.querySelector('#toasts .sr').textContent"))


def test_a_change_made_elsewhere_arrives_and_leaves_rows_focus_scroll_and_typing_alone(browser, world):
    browser.log_in("routing")
    browser.size(WIDE[0], 420)
    browser.one("[data-pool=smart] tr[data-id]")
    browser.run("document.querySelectorAll('tr[data-id]').forEach((row) => { row.marked = true })")
    browser.one("#search").send_keys("i")
    shown = browser.run("scrollTo(0, 120); return document.querySelectorAll('tr[data-id]').length")
    quick = world.entry("quick-model")["model_db_id"]
    world.call("PUT", "/api/fallback", [{"model_db_id": quick, "enabled": False}])
    browser.until(lambda: not browser.labelled("Quick in the chain").is_selected())
    marked = browser.run("return [...document.querySelectorAll('tr[data-id]')].filter((row) => row.marked).length")
    assert marked == shown > 2
    assert browser.focused().get_attribute("id") == "search"
    assert browser.focused().get_attribute("value") == "i"
    assert browser.run("return scrollY") == 120


# --- Keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_added_checked_switched_off_and_deleted(browser, world):
    world.fake.script("quick", body({"object": "list", "data": []}))
    browser.log_in("keys")
    browser.choose("#new-platform", "quick")
    browser.one("#new-key").send_keys("sk-brand-new-0001")
    browser.one("#new-label").send_keys("spare", Keys.ENTER)
    browser.sees("spare", "#keys")
    browser.until(lambda: key_row(browser, "spare").text.count("healthy") == 1, "checked at once")
    assert world.fake.requests[-1].path == "/quick/v1/models"
    assert browser.one("#new-key").get_attribute("value") == ""
    assert "sk-brand-new-0001" not in browser.run("return document.documentElement.outerHTML")

    world.fake.script("quick", error(401, "no such key"))
    browser.labelled("Check quick spare").click()
    browser.sees("no such key", "#keys")
    assert "invalid" in key_row(browser, "spare").text
    browser.labelled("Use quick spare").click()
    browser.until(lambda: not stored(world, "spare")["enabled"])

    browser.labelled("Delete quick spare").click()
    browser.sees("Really delete?", "#keys")
    browser.labelled("Really delete quick spare").click()
    browser.misses("spare", "#keys")
    browser.until(lambda: stored(world, "spare") is None)


def test_a_key_that_cannot_be_right_is_refused_with_a_reason(browser):
    browser.log_in("keys")
    browser.choose("#new-platform", "quick")
    browser.one("#new-key").send_keys("sk with blanks", Keys.ENTER)
    browser.sees("printable ASCII", "#toasts")
    assert browser.one("#new-key").get_attribute("value") == "sk with blanks"


# --- Requests and playground ----------------------------------------------------------------------------------------


def test_a_message_streams_in_with_its_route_and_trail(browser, world):
    go = world.event()
    world.fake.script("quick", error(503, "overloaded"))
    halves = "Grüße, 🌍!".encode()
    world.fake.script(
        "rapid",
        sse(event(chunk("Hello ")), event(chunk(halves.decode())), Wait(go), event(chunk(" and bye")),
            event(chunk(finish="stop")), event(usage_chunk(5, 6)), DONE, done=False),
    )  # fmt: skip
    for name in ("clever", "wise", "middle", "usual"):
        world.fake.script(name, error(503, "overloaded"))
    browser.log_in("playground")
    browser.choose("#model", "quick/quick-model")
    browser.one("#say").send_keys("Say hello", Keys.ENTER)
    browser.sees("Hello Grüße, 🌍!", "#talk")
    assert "and bye" not in browser.one("#talk").text, "half of it is here while the rest is not even sent"
    assert browser.one("#talk").get_attribute("aria-busy") == "true"
    browser.sees("✕ quick/quick-model server error", "#talk .trail")
    world.set(go)
    browser.sees("Hello Grüße, 🌍! and bye", "#talk")
    browser.sees("rapid/rapid-model", "#talk .trail")
    browser.until(lambda: browser.one("#talk").get_attribute("aria-busy") == "false")
    failed = [name for name in world.fake.called if name != "rapid"]
    for name in failed:
        browser.sees(f"{name}/{name}-model", "#talk .trail")
    assert world.fake.requests[-1].json["messages"] == [{"role": "user", "content": "Say hello"}]

    browser.go("requests")
    browser.sees("rapid/rapid-model", "details .trail")
    browser.one("details summary").click()
    browser.sees("first token", "details[open] ol")
    assert len(browser.all("details[open] ol li")) == len(failed) + 1 >= 2


def test_a_message_can_be_stopped_and_the_provider_hears_of_it(browser, world):
    for name in PLATFORMS:
        world.fake.script(name, sse(event(chunk("Once upon ")), Wait(world.event()), done=False))
    browser.log_in("playground")
    browser.one("#say").send_keys("Tell me a story", Keys.ENTER)
    browser.sees("Once upon", "#talk")
    browser.named("Stop").click()
    browser.sees("Stopped.", "#talk")
    browser.until(lambda: world.fake.requests[-1].closed_at)
    browser.named("Send")


def test_a_stream_that_breaks_says_so(browser, world):
    for name in PLATFORMS:
        world.fake.script(name, sse(event(chunk("Half an ")), event({"error": {"message": "boom", "code": 500}})))
    browser.log_in("playground")
    browser.one("#say").send_keys("hi", Keys.ENTER)
    browser.sees("The answer is incomplete", "#talk")
    browser.sees("Half an", "#talk")


def test_where_clients_have_a_key_of_their_own_the_playground_asks_for_it(open_browser):
    browser = open_browser(GATEWAY_ADMIN_KEY="operators-own-key-0001")
    browser.log_in("playground", key="operators-own-key-0001")
    browser.one("#say").send_keys("hi", Keys.ENTER)
    browser.one("#client-key").send_keys(API_KEY)
    browser.say("hi again")


# --- Everyone -------------------------------------------------------------------------------------------------------


def test_everything_can_be_done_by_keyboard(browser, world):
    browser.open()
    browser.one("#key")
    browser.keys(API_KEY, Keys.ENTER)
    browser.one("nav")
    walked = []
    for _ in range(30):
        browser.keys(Keys.TAB)
        element = browser.focused()
        outline = browser.run("return getComputedStyle(arguments[0]).outlineStyle", element)
        assert outline != "none", f"no visible focus on {element.get_attribute('outerHTML')[:100]}"
        walked.append(element.text or element.get_attribute("id"))
        if element.text == "Routing":
            break
    assert walked[:1] == ["Skip to content"]
    browser.keys(Keys.ENTER)
    browser.sees("The fallback chain")
    for _ in range(60):
        browser.keys(Keys.TAB)
        if browser.focused().get_attribute("aria-label") == "Rapid in the chain":
            break
    browser.keys(Keys.SPACE)
    browser.until(lambda: not world.entry("rapid-model")["enabled"])


@pytest.mark.parametrize("view", ["overview", "routing", "keys", "requests", "playground"])
def test_every_view_can_be_read_wide_or_on_a_phone_in_light_and_dark(browser, world, view):
    world.fake.script("quick", error(503, "overloaded"))
    browser.log_in("playground")
    browser.say("hi", model="quick/quick-model")
    browser.go(view)
    browser.one("main .panel")
    if view == "requests":
        browser.one("details summary").click()
    for size in (WIDE, PHONE):
        browser.size(*size)
        assert browser.run("return document.documentElement.scrollWidth") <= size[0], "nothing to scroll sideways"
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            assert browser.run(FAINT_TEXT) == []
    controls = browser.all("main button, main input, main select, main textarea, nav a")
    assert all(control.accessible_name for control in controls if control.is_displayed())


def test_it_is_dark_where_darkness_is_preferred(browser):
    browser.log_in()
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.prefer("dark")
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert sum(rgb(dark)) < 150 < 600 < sum(rgb(light))


def test_a_gateway_that_has_gone_is_reported_and_forgiven(browser):
    browser.open()
    browser.one("#key")
    browser.offline(True)
    browser.one("#key").send_keys(API_KEY, Keys.ENTER)
    browser.sees("The gateway does not answer.", "[role=alert]")
    browser.offline(False)
    browser.one("#key").send_keys(Keys.ENTER)
    browser.sees("Requests", ".tiles")
    browser.offline(True)
    browser.sees("The gateway does not answer.", "[role=alert]")
    browser.offline(False)
    browser.misses("The gateway does not answer.")
    browser.complaints()  # the failed calls


def rgb(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def key_row(browser: Browser, label: str) -> WebElement:
    return next(row for row in browser.all("#keys tbody tr") if label in row.text)


def stored(world: World, label: str) -> dict | None:
    return next((key for key in world.call("GET", "/api/keys") if key["label"] == label), None)

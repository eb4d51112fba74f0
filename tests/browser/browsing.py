"""The dashboard in a real browser, against the real gateway as a process and fake providers.

Not part of `make test`: it needs Chromium and its driver, which `make test-browser` installs where they are missing.
Selenium blocks, so the gateway and the providers live in a loop of their own, in another thread. One browser and one
gateway serve every test that can do with the usual platforms; before each of them the gateway is as it was at first,
but for its log. At the end of each test the console must be silent and nobody but the gateway may have been asked.
"""

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from conftest import API_KEY, Process, catalog_of, end
from fake_provider import FakeProvider, answer
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

    def ask(self, prompt: str = "hi", **fields: object):
        """Send a chat request and wait for all of its answer."""
        return self.run(self._ask(prompt, fields))

    def begin(self, prompt: str = "hi", **fields: object) -> None:
        """Send a chat request and let it go on; it ends with the gateway at the latest."""
        asyncio.run_coroutine_threadsafe(self._ask(prompt, fields), self._loop)

    async def _ask(self, prompt: str, fields: dict[str, object]) -> bytes:
        body = {"model": "auto-priority", "messages": [{"role": "user", "content": prompt}]} | fields
        authorized = {"authorization": f"Bearer {API_KEY}"}
        async with aiohttp.request(
            "POST", f"{self.url}/v1/chat/completions", json=body, headers=authorized
        ) as response:
            return await response.read()

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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Iterator[World]:
    """The gateway that the tests share."""
    world = World(tmp_path_factory.mktemp("gateway"))
    world.start(TRANSIENT_COOLDOWN_MS="5000", WAIT_FOR_CAPACITY_MS="0")  # no test wants to see a request wait
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


def fits_and_reads(browser) -> None:
    """Nothing scrolls sideways and no text is faint, wide or on a phone, in light and dark."""
    for size in (WIDE, PHONE):
        browser.size(*size)
        assert browser.run("return document.documentElement.scrollWidth") <= size[0]
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            assert browser.run(FAINT_TEXT) == []
    controls = browser.all("main button, main input, main select")
    assert all(control.accessible_name for control in controls if control.is_displayed())


def rgb(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def key_row(browser: Browser, label: str) -> WebElement:
    return next(row for row in browser.all("#keys tbody tr") if label in row.text)


def stored(world: World, label: str) -> dict | None:
    return next((key for key in world.call("GET", "/api/keys") if key["label"] == label), None)

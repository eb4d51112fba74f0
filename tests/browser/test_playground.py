"""The dashboard's requests and playground; and what holds of every view: keyboard, phone, dark, a gateway gone."""

import pytest
from browsing import FAINT_TEXT, PHONE, PLATFORMS, WIDE, rgb
from conftest import API_KEY
from fake_provider import DONE, Wait, chunk, error, event, sse, usage_chunk
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browsing"]


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

"""The dashboard's views of what is: coming in, the overview, routing and keys."""

import sqlite3
from contextlib import closing

from browsing import PLATFORMS, WIDE, key_row, stored
from conftest import API_KEY
from fake_provider import answer, body, error
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browsing"]


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

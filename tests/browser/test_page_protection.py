"""What the dashboard shows of protection, and the whole chain in auto-priority's order."""

from browsing import PLATFORMS, WIDE
from fake_provider import error
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browsing"]

CONVERSATION = [  # bans are for conversations, not for a single question
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "go on"},
]  # fmt: skip


def ids_by_priority(world) -> list[str]:
    """Those that have a key, which are the ones that the page shows at first."""
    chain = world.call("GET", "/api/fallback")
    return [entry["model_id"] for entry in chain if entry["platform"] in PLATFORMS]


# --- Right now ------------------------------------------------------------------------------------------------------


def test_a_ban_is_shown_with_its_reason_and_time_and_lifted_by_a_button(open_browser, own_world):
    browser = open_browser({"quick": {"protection": "provider-ban", "model": {"prefer_in": ["smart"]}}, "other": {}})
    own_world.fake.script("quick", error(503, "overloaded"))
    own_world.call("POST", "/v1/chat/completions", {"model": "auto-smart", "messages": CONVERSATION})
    browser.log_in()
    browser.sees("quick", ".ban")
    browser.sees("server error before the answer", ".ban")
    first = browser.one(".ban .num").text
    browser.until(lambda: browser.one(".ban .num").text != first, "it counts down")
    browser.one("#lift").click()
    browser.sees("No conversation avoids a platform.")
    assert own_world.call("GET", "/api/protection")["bans"] == []
    assert not browser.one("#lift").is_enabled()


def test_a_waiting_request_is_shown_with_its_eta(open_browser, own_world):
    browser = open_browser({"quick": PLATFORMS["quick"]}, WAIT_FOR_CAPACITY_MS="60000")
    own_world.fake.script("quick", error(429, headers={"retry-after": "40"}))
    browser.log_in("playground")
    browser.one("#say").send_keys("hi", Keys.ENTER)
    browser.go("overview")
    browser.sees("Waiting requests · 1")
    browser.sees("left", ".waiter")


# --- The whole chain ------------------------------------------------------------------------------------------------


def test_the_whole_chain_is_reordered_across_pools_by_keyboard(browser, world):
    browser.log_in("routing")
    browser.named("By priority").click()
    browser.until(lambda: len(browser.names("chain")) == len(PLATFORMS))
    before = browser.names("chain")
    grip = f"Drag {before[-1]}"
    browser.run("arguments[0].focus()", browser.labelled(grip))
    browser.keys(Keys.HOME)
    browser.until(lambda: browser.names("chain") == [before[-1], *before[:-1]])
    browser.until(lambda: ids_by_priority(world)[0] == f"{before[-1].lower()}-model")
    assert browser.focused().get_attribute("aria-label") == grip
    browser.keys(Keys.ARROW_DOWN)
    browser.until(lambda: browser.names("chain")[:2] == [before[0], before[-1]])
    browser.until(lambda: ids_by_priority(world)[:2] == [f"{name.lower()}-model" for name in (before[0], before[-1])])
    browser.named("By pool").click()
    browser.until(lambda: browser.names("fast") and not browser.names("chain"))


def test_the_whole_chain_is_reordered_across_pools_by_dragging(browser, world):
    browser.size(WIDE[0], 1400)
    browser.log_in("routing")
    browser.named("By priority").click()
    browser.until(lambda: len(browser.names("chain")) == len(PLATFORMS))
    before = browser.names("chain")
    row = browser.one("[data-pool=chain] tr[data-id]")
    grip = browser.labelled(f"Drag {before[3]}")
    ActionChains(browser.driver).click_and_hold(grip).move_to_element_with_offset(row, 0, -8).release().perform()
    browser.until(lambda: browser.names("chain")[0] == before[3])
    browser.until(lambda: ids_by_priority(world)[0] == f"{before[3].lower()}-model")


def test_a_model_without_ranks_shows_a_dash(open_browser):
    unranked = {"model": {"model_id": "new-model", "name": "New", "speed_rank": None, "intelligence_rank": None}}
    browser = open_browser(PLATFORMS | {"new": unranked})
    browser.log_in("routing")
    browser.named("By priority").click()
    browser.until(lambda: "New" in browser.names("chain"))
    row = next(row for row in browser.all("tr[data-id]") if "New" in row.text)
    cells = row.find_elements("css selector", "td")
    told = {cell.get_attribute("data-label"): cell.get_attribute("textContent") for cell in cells}
    assert (told["Wits"], told["Speed"]) == ("–", "–")

"""What the dashboard shows of protection, and the whole chain in auto-priority's order."""

from browsing import PLATFORMS, WIDE, fits_and_reads
from continuing import PROSE, broken, repeats_anchor, served
from fake_provider import PAUSE, ROLE, answer, error, sse
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


def test_an_open_gate_is_shown_with_its_next_trial_and_closed_by_a_button(browser, world):
    world.fake.script("quick", answer(""))
    while not world.call("GET", "/api/protection")["gates"]:
        world.ask(model="quick-model")
    browser.log_in()
    browser.sees("Health gates · 1")
    browser.sees("quick-model", ".gated")
    browser.sees("closed to most for", ".gated")
    first = browser.one(".gated .num").text
    assert first.startswith("trial in ")
    browser.until(lambda: browser.one(".gated .num").text != first, "it counts down")
    fits_and_reads(browser)
    browser.size(*WIDE)
    browser.one("#clear").send_keys(Keys.ENTER)
    browser.sees("None: no model fails more than it should.")
    browser.until(lambda: world.call("GET", "/api/protection")["gates"] == [])


def test_a_trial_of_what_rests_is_shown_while_others_wait_for_it(open_browser, own_world):
    settings = {"TRANSIENT_COOLDOWN_MS": "60000", "WAIT_FOR_CAPACITY_MS": "60000", "HEDGE_PERCENT": "0"}
    browser = open_browser({"quick": PLATFORMS["quick"]}, **settings)
    own_world.fake.script("quick", error(503, "down"), sse(ROLE, PAUSE))
    browser.log_in()
    own_world.begin(stream=True)
    browser.sees("Trials · 1")
    own_world.begin("another", stream=True)
    browser.sees("quick-model", ".trial")
    browser.sees("Waiting requests · 1")
    browser.sees("left", ".waiter")
    fits_and_reads(browser)


def test_a_rescue_is_shown_with_what_broke_and_from_where_it_goes_on(open_browser, own_world):
    browser = open_browser({"quick": PLATFORMS["quick"], "usual": PLATFORMS["usual"]}, HEDGE_PERCENT="0")
    own_world.fake.script("quick", broken(at=40))
    own_world.fake.script("usual", served(repeats_anchor(PROSE), break_at=100, how="stall"))  # it joins, and pauses
    browser.log_in()
    own_world.begin(model="quick-model", stream=True)
    browser.sees("Rescues · 1")
    browser.sees("usual-model", ".rescue")
    browser.sees("goes on after 40 characters: quick/quick-model broke off, connection", ".rescue")
    fits_and_reads(browser)


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

"""What the dashboard tells of why and of what comes: explanations, quota, clients, privacy, the drill."""

import pytest
from browsing import PLATFORMS, WIDE, fits_and_reads, key_row
from conftest import case
from fake_provider import error
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browsing"]


def client_row(browser, name):
    return next(row for row in browser.all("#clients tbody tr") if name in row.text)


def test_opening_a_request_tells_why_that_model_and_not_another(browser, world):
    world.fake.script("quick", error(503, "overloaded"), error(503, "overloaded"))
    browser.log_in("playground")
    browser.say("hi", model="quick/quick-model")
    browser.go("requests")
    browser.one("details summary").send_keys(Keys.ENTER)
    browser.sees("answered: after", "details[open] .explain")
    asked = [e.text for e in browser.all(".explain .candidate") if "answered" in e.text]
    assert len(asked) == 1
    browser.sees("1 · Free", ".explain")
    assert browser.all(".explain .score i")
    fits_and_reads(browser)


def candidate(name: str, rung: int, score: float | None, excluded: str | None = None) -> dict:
    return {"platform": name, "model_id": "m", "rung": rung, "score": score, "parts": None, "excluded": excluded}


NO_KEY = "no key with capacity; may be asked in 12.0 s"
PASSED_OVER = {  # the candidates beside b, which has answered; what is said of the one that might have been asked
    "none": ([candidate("b", 1, 0.9), candidate("a", 1, 0.5)], None),
    "no key": ([candidate("b", 1, 0.9), candidate("a", 1, 1.2, NO_KEY)], f"a/m was passed over: {NO_KEY}."),
    "a lower rung": ([candidate("b", 1, 0.9), candidate("a", 5, 1.2)], "a/m was passed over: rests after a failure."),
    "no key, and worse": ([candidate("b", 1, 0.9), candidate("a", 1, 0.2, NO_KEY)], None),
    "in the chain's order": ([candidate("a", 1, None, NO_KEY), candidate("b", 1, None)], f"passed over: {NO_KEY}."),
}  # fmt: skip


def test_a_better_model_that_was_passed_over_is_named_with_the_reason(browser, world):
    world.ask()
    browser.log_in("requests")
    summary = browser.one("details summary")
    for name, (candidates, said) in PASSED_OVER.items():
        with case(name):
            answered = {"platform": "b", "model_id": "m", "status": 200, "kind": None, "ms": 5, "rung": 1}
            told = {"candidates": candidates, "attempts": [answered], "mode": "smart", "waited_ms": 0, "cached": False}
            browser.run(
                """
                const real = window.real ??= window.fetch, told = arguments[0];
                window.fetch = (url, rest) =>
                    url.includes("/explain") ? Promise.resolve(Response.json(told)) : real(url, rest);
                """,
                told,
            )
            if name == "none":
                summary.send_keys(Keys.ENTER)
            else:
                browser.named("Ask again").click()
            browser.sees(said or "b/m answered: it stood first on the ladder.", ".explain p")
            browser.until(lambda said=said: ("passed over" in browser.one(".explain p").text) == bool(said))


def test_a_request_that_is_no_longer_kept_says_so(browser, world):
    browser.log_in("playground")
    browser.say("hi")
    browser.go("requests")
    browser.run("""
        const real = window.fetch;
        window.fetch = (url, rest) => real(url.includes("/explain") ? "/api/requests/unknown/explain" : url, rest);
    """)
    browser.one("details summary").click()
    browser.sees("no longer knows why", ".explain")


def test_quota_bars_show_what_is_left_of_each_limit(open_browser):
    model = {"model_id": "quick-model", "name": "Quick", "rpd": 100, "tpd": 5000}
    browser = open_browser({"quick": {"model": model}, "usual": PLATFORMS["usual"]})
    browser.log_in("playground")
    browser.say("hi", model="quick/quick-model")
    browser.go("quota")
    browser.sees("1 of 100 requests/day, 99 left", "#quota")
    meter = browser.labelled("quick/quick-model, requests/day")
    assert (meter.get_attribute("aria-valuenow"), meter.get_attribute("aria-valuemax")) == ("1", "100")
    browser.sees("priority", ".modes")
    fits_and_reads(browser)


def test_a_client_is_added_with_a_key_shown_once_switched_off_and_deleted(browser, world):
    browser.log_in("clients")
    browser.one("#client-name").send_keys("laptop")
    browser.one("#client-rpm").send_keys("7")
    browser.one("#client-models").send_keys("auto-smart, auto", Keys.ENTER)
    key = browser.one("#client-key-once").text
    assert key.startswith("fwc-")
    (client,) = world.call("GET", "/api/clients")
    assert (client["name"], client["limits"]["rpm"], client["models"]) == ("laptop", 7, ["auto-smart", "auto"])
    browser.sees("0 of 7 requests/min", "#clients")
    fits_and_reads(browser)
    browser.named("I have it").click()
    browser.until(lambda: key not in browser.run("return document.documentElement.outerHTML"))
    browser.size(*WIDE)
    browser.labelled("Let laptop in").click()
    browser.until(lambda: not world.call("GET", "/api/clients")[0]["enabled"])
    browser.labelled("Delete client laptop").click()
    browser.labelled("Really delete client laptop").click()
    browser.sees("No clients yet.")
    browser.until(lambda: world.call("GET", "/api/clients") == [])


def test_what_a_platforms_terms_say_of_training_is_shown_with_its_source(open_browser, own_world):
    terms = {"terms_url": "https://quick.test/terms", "terms_checked": "2026-11-02"}
    told = {"quick": ("trains on prompts", True), "usual": ("no training", False), "middle": ("training unknown", None)}
    browser = open_browser(
        {name: PLATFORMS[name] | terms | {"trains_on_prompts": says} for name, (_, says) in told.items()}
    )
    browser.log_in("keys")
    for name, (words, _) in told.items():
        browser.until(lambda name=name, words=words: words in key_row(browser, name).text, words)
    link = browser.labelled("Terms of quick")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == (terms["terms_url"], "noopener noreferrer")
    browser.sees("read 2 Nov 2026", "#keys")
    fits_and_reads(browser)


@pytest.mark.parametrize(("trains", "told"), [(False, "no training"), (True, "trains on prompts")])
def test_a_key_shows_whether_prompts_may_be_trained_on(browser, world, trains, told):
    (key,) = (key for key in world.call("GET", "/api/keys") if key["platform"] == "quick")
    world.call("PATCH", f"/api/keys/{key['id']}", {"trains_on_prompts": trains})
    browser.log_in("keys")
    browser.until(lambda: told in key_row(browser, "quick").text or told in browser.one("#keys").text)


def test_a_drill_shows_its_table(open_browser):
    browser = open_browser(MAX_STREAM_STALL_MS="300")
    browser.log_in()
    browser.one("#drill").send_keys(Keys.ENTER)
    browser.until(lambda: len(browser.all("#drilled tbody tr")) == 6)
    browser.sees("429", "#drilled")
    assert browser.one("#drill").is_enabled()
    fits_and_reads(browser)

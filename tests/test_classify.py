"""Which name a provider's failing answer gets (SPEC 5.2, 7.8)."""

import pytest
from conftest import both_ways
from fake_provider import error

from protection import RULES, Failure, Kind, classify

NAMED = [
    (500, None, "", Failure.SERVER_ERROR),
    (503, "rate_limit_exceeded", "", Failure.SERVER_ERROR),
    (529, None, "overloaded", Failure.SERVER_ERROR),
    (500, None, "output truncated", Failure.SERVER_ERROR),
    (502, "context_length_exceeded", "", Failure.SERVER_ERROR),
    (429, None, "", Failure.RATE_LIMITED),
    (429, "context_length_exceeded", "", Failure.RATE_LIMITED),
    (401, None, "", Failure.AUTH),
    (401, None, "truncated", Failure.AUTH),
    (402, None, "", Failure.OUT_OF_CREDIT),
    (403, None, "", Failure.FORBIDDEN),
    (404, None, "", Failure.NOT_FOUND),
    (400, "model_not_found", "", Failure.NOT_FOUND),
    (400, None, "", Failure.BAD_REQUEST),
    (409, None, "", Failure.BAD_REQUEST),
    (405, None, "", Failure.BAD_REQUEST),
    (413, None, "", Failure.BAD_REQUEST),
    (418, None, "", Failure.BAD_REQUEST),
    (408, None, "", Failure.SERVER_ERROR),
    (425, None, "Too Early", Failure.SERVER_ERROR),
    (498, "capacity_exceeded", "", Failure.SERVER_ERROR),
    (499, None, "client closed request", Failure.SERVER_ERROR),
    (422, None, "", Failure.BAD_REQUEST),
    (301, None, "", Failure.BAD_REQUEST),
    (400, "content_filter", "", Failure.CONTENT_FILTER),
    (400, "content_policy_violation", "", Failure.CONTENT_FILTER),
    (400, "Content_Filter", "", Failure.CONTENT_FILTER),
    (400, "context_length_exceeded", "", Failure.CONTEXT_LENGTH),
    (400, None, "This model's maximum context length is 8192 tokens", Failure.CONTEXT_LENGTH),
    (413, None, "the response was TRUNCATED", Failure.TRUNCATED),
    (400, None, "Truncation happened", Failure.TRUNCATED),
    (400, None, "the answer was cut off", Failure.TRUNCATED),
    (400, None, "token_limit reached", Failure.TRUNCATED),
    (400, "response_length_limit", "", Failure.TRUNCATED),
    (422, None, "reached the maximum length", Failure.TRUNCATED),
    (200, None, "something odd", Failure.WRAPPED),
    (200, None, "the response was truncated", Failure.TRUNCATED),
]


# How servers say that the prompt is too long: one row for each.
TOO_LONG = [
    "Invalid request: Your request exceeded model token limit: 131072",
    "The number of tokens to keep from the initial prompt is greater than the context length.",
    "Trying to keep the first 4523 tokens when context the overflows. However, the model is loaded with context length "
    "of only 4096 tokens, which is not enough.",
    "n_keep: 5000 >= n_ctx: 4096",
    "the request exceeds the available context size, try increasing it",
    "prompt is too long: 208310 tokens > 200000 maximum",
    "Input is too long for requested model.",
    "Your input exceeds the context window of this model.",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
    "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
    "Please reduce the length of the messages or completion.",
    "prompt token count of 217354 exceeds the limit of 128000",
    "The decoder prompt (length 40000) is longer than the maximum model length of 32768.",
    "The prompt (total length 5000) is too long to fit into the model",
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
    "Input validation error: `inputs` must have less than 1024 tokens. Given: 1530",
    "too many tokens: size limit exceeded by 1000 tokens. Try using shorter or fewer inputs.",
    "Range of input length should be [1, 98304]",
    "Requested token count exceeds the model's maximum context length of 8192 tokens.",
    "Prompt contains 40960 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
    "Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested 9000",
    "Request body too large for small-4o model. Max size: 8000 tokens.",
    "prompt too long; exceeded max context length by 4 tokens",
    "Token limit exceeded",
    "input length and `max_tokens` exceed context limit: 199000 + 20000 > 200000",
    "invalid params, context window exceeds limit (2013)",
]
# What only sounds like it.
NOT_TOO_LONG = [
    "max_tokens is too large: 65536. This model supports at most 16384 completion tokens.",
    "The tool name is too long: 65 characters, at most 64.",
    "Unknown field: context",
    "No endpoints found that support tool use",
    "Invalid token in the Authorization header",
]


@pytest.mark.parametrize("message", TOO_LONG)
@pytest.mark.parametrize("status", [400, 413, 422, 200])
def test_a_prompt_that_is_too_long_is_recognised_in_every_servers_words(status, message):
    assert classify(status, None, message) is Failure.CONTEXT_LENGTH


@pytest.mark.parametrize("message", NOT_TOO_LONG)
def test_what_only_sounds_like_a_prompt_that_is_too_long_is_a_bad_request(message):
    assert classify(400, None, message) is Failure.BAD_REQUEST


NO_MONEY = [
    "Your account org-1 is suspended due to insufficient balance, please recharge your account.",
    "Insufficient credits. Add more at https://example.com/credits",
    "Your credit balance is too low to access the API.",
    "This request requires more credits, or fewer max_tokens.",
    "余额不足或无可用资源包,请充值。",
]


@pytest.mark.parametrize("message", NO_MONEY)
@pytest.mark.parametrize("status", [400, 402, 403, 429, 200])
def test_an_account_without_money_is_recognised_whatever_its_status(status, message):
    assert classify(status, None, message) is Failure.OUT_OF_CREDIT


@pytest.mark.parametrize(
    "message",
    ["You exceeded your current quota, please check your plan and billing details.", "You have 3 credits left today"],
)
def test_a_quota_that_comes_back_is_a_rate_limit(message):
    assert classify(429, None, message) is Failure.RATE_LIMITED


@pytest.mark.parametrize(("status", "code", "message", "failure"), NAMED)
def test_a_failing_answer_gets_one_name(status, code, message, failure):
    assert classify(status, code, message) is failure


@pytest.mark.parametrize(
    "text", ["truncated", "truncation", "cut off", "context_length_exceeded", "token_limit", "maximum length"]
)
@pytest.mark.parametrize("spelled", [str.lower, str.upper, str.title])
def test_an_error_whose_text_speaks_of_truncation_is_one_in_any_case(text, spelled):
    failure = classify(400, None, f"sorry: {spelled(text)}.")

    assert RULES[failure].kind is Kind.TRUNCATION


WORDS = [
    "Invalid request: Your request exceeded model token limit: 131072",
    "Trying to keep the first 4523 tokens when context the overflows. However, the model is loaded with context length "
    "of only 4096 tokens, which is not enough.",
    "n_keep: 5000 >= n_ctx: 4096",
]


@both_ways
async def test_three_servers_whose_windows_are_too_small_outvote_no_fourth(start_gateway, fake, streaming):
    windows = {name: {"model": {"context_window": 8_000 * 2**place}} for place, name in enumerate("abcd")}
    gateway = await start_gateway(windows)
    for platform, words in zip("abc", WORDS, strict=True):
        fake.script(platform, error(400, words))

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from d"
    assert fake.called == ["a", "b", "c", "d"]
    assert got.headers["X-Fallback-Trail"].count("context_length") == 3


async def test_a_window_that_is_not_larger_is_not_tried(start_gateway, fake):
    gateway = await start_gateway(
        {"a": {"model": {"context_window": 16_000}}, "b": {"model": {"context_window": 8_000}}}
    )
    fake.script("a", error(400, WORDS[0]))

    got = await gateway.chat()

    assert (got.status, fake.called) == (400, ["a"])
    assert got.error["code"] == "context_length_exceeded"

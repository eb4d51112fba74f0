"""SPEC 7.1: by which of its names a conversation is known."""

import pytest
from conftest import API_KEY

from dialects.chat import ChatDialect
from dialects.messages import MessagesDialect
from dialects.responses import ResponsesDialect
from engine.conversation import session_key
from wire.chat import Chat

RESPONSES = ResponsesDialect(lambda: "t" * 48)
CHAT = b'{"model": "auto-smart", "messages": [{"role": "user", "content": "hi"}]}'
NAMED = b'{"model": "auto-smart", "prompt_cache_key": "k", "messages": [{"role": "user", "content": "hi"}]}'


def chat(raw: bytes = CHAT) -> Chat:
    return ChatDialect().parse(raw, 0.0)


def key(headers: dict[str, str] | None = None, of: Chat | None = None, client: str = "") -> str:
    given = {name.encode(): value.encode() for name, value in (headers or {}).items()}
    return session_key(of or chat(), given, client)


# The most telling first.
SOURCES = ["x-session-id", "x-claude-code-session-id", "session-id", "thread-id", "x-session-affinity"]


@pytest.mark.parametrize("place", range(len(SOURCES)))
def test_a_header_that_names_the_conversation_counts_more_than_all_behind_it(place):
    header, *behind = SOURCES[place:]

    alone = key({header: "one"})

    assert alone not in ("", key(), key({header: "two"}), key(of=chat(NAMED)))
    assert key({header: "one", **dict.fromkeys(behind, "other")}, of=chat(NAMED)) == alone


@pytest.mark.parametrize("name", ["session", "thread"])
def test_an_underscore_in_such_a_header_makes_no_difference(name):
    assert key({f"{name}_id": "one"}) == key({f"{name}-id": "one"})


def test_an_agents_helpers_have_conversations_of_their_own():
    session = {"x-claude-code-session-id": "one"}

    keys = {
        key(session),
        key(session | {"x-claude-code-agent-id": "a"}),
        key(session | {"x-claude-code-agent-id": "b"}),
    }

    assert len(keys) == 3


REQUESTS = {
    "chat": lambda name: ChatDialect().parse(NAMED.replace(b'"k"', name), 0.0),
    "responses": lambda name: RESPONSES.parse(
        b'{"model": "auto-smart", "input": "hi", "prompt_cache_key": ' + name + b"}", 0.0
    ),
    "messages": lambda name: MessagesDialect(lambda: "t" * 48).parse(
        b'{"model": "auto-smart", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], '
        b'"metadata": {"user_id": ' + name + b"}}", 0.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("parse", REQUESTS.values(), ids=REQUESTS)
def test_a_body_may_name_the_conversation(parse):
    assert key(of=parse(b'"one"')) not in (key(), key(of=parse(b'"two"')))
    assert key(of=parse(b'""')) == key(of=parse(b"5")) == key()  # no name: the first message's text


def test_the_first_message_is_a_name_where_there_is_no_other():
    parts = b'{"model": "auto-smart", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}'

    assert key(of=chat(parts)) == key()
    assert key(of=chat(CHAT.replace(b"hi", b"ho"))) != key()
    assert key({"x-session-id": "hi"}) != key()  # a name is no text


def test_a_conversation_belongs_to_its_client_and_its_mode():
    named = {"x-session-id": "one"}
    fast = chat(CHAT.replace(b"auto-smart", b"auto-fast"))

    assert len({key(named), key(named, client="7"), key(named, client="8"), key(named, of=fast)}) == 4


@pytest.mark.parametrize("model", [b"auto", b"auto-priority", b"some-model"])
def test_other_modes_and_pinned_models_have_no_sessions(model):
    assert key({"x-session-id": "one"}, of=chat(CHAT.replace(b"auto-smart", model))) == ""


async def test_sessions_of_one_folder_are_apart_by_their_cache_key(start_gateway):
    gateway = await start_gateway(["a"])
    for name in ("one", "two", "one"):
        request = {"model": "auto-smart", "input": "the same environment", "prompt_cache_key": name}
        assert (await gateway.send(request, path="/v1/responses")).status == 200

    assert gateway.api_key == API_KEY
    assert (await gateway.protection())["sessions"]["count"] == 2

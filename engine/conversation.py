"""Which requests belong to one conversation (SPEC 7.1). Pure."""

from __future__ import annotations

from hashlib import blake2b

from engine.address import Given
from wire.chat import Chat, Mode

SESSION_MODES = (Mode.SMART, Mode.FAST)  # the others have no sessions
AGENT_HEADER = b"x-claude-code-agent-id"  # an agent's helpers have conversations of their own under its session's id
# In which a client names the conversation, the most telling first; some write an underscore.
SESSION_HEADERS = (
    b"x-session-id", b"x-claude-code-session-id", b"session-id", b"session_id", b"thread-id", b"thread_id",
    b"x-session-affinity",
)  # fmt: skip


def session_key(chat: Chat, headers: Given, client: str) -> str:
    """A conversation's key: whose it is, its mode, and the client's own name for it, else its first user message.
    Empty: no session. `client` tells client keys apart."""
    if chat.need.pinned is not None or chat.need.mode not in SESSION_MODES:
        return ""
    source, name = conversation_of(chat, headers)
    if not name:
        return ""
    text = "\0".join((client, chat.need.mode, source, name))
    return blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def conversation_of(chat: Chat, headers: Given) -> tuple[str, str]:
    """Where a conversation's name comes from, and the name."""
    for header in SESSION_HEADERS:
        if value := headers.get(header):
            return "id", (value + b"\0" + headers.get(AGENT_HEADER, b"")).decode("latin-1")
    if chat.conversation:
        return "id", chat.conversation + "\0"
    return "text", chat.first_user_text

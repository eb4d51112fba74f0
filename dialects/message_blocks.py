"""A Messages request's turns and blocks as chat's messages.

What is judged here are the shapes that only this API has; limits, numbers and the pairing of calls with results are
chat.chat_from's affair. A request is rebuilt from what is known: marks for prompt caches, fields of betas and whatever
else only Anthropic's own servers read are left out (SPEC 16.2). No I/O.
"""

from __future__ import annotations

from wire.errors import InvalidRequest
from wire.jsontext import JSON, dump

TURNS = "Input should be 'user', 'assistant' or 'system'"
ATTRIBUTION = "x-anthropic-billing-header:"  # how a system block begins that tells Anthropic who is asking
NO_FILES = "Files are not kept here: send the content itself, as base64, text or a URL."
TOOL_ERROR = "[The tool reported an error]"
SYSTEM_ROLES = ("system", "developer")


def invalid(path: str, words: str) -> InvalidRequest:
    """An error in this API's words: the place, then what is wrong with it."""
    return InvalidRequest(f"{path}: {words}", param=path)


def text_in(block: JSON, name: str, path: str) -> str:
    """A text that has to be there."""
    if name not in block or block[name] is None:
        raise invalid(f"{path}.{name}", "Field required")
    if not isinstance(block[name], str):
        raise invalid(f"{path}.{name}", "Input should be a valid string")
    return str(block[name])


def blocks_of(content: object, path: str) -> list[JSON]:
    """Content as blocks, each an object with a type."""
    if content is None:
        raise invalid(path, "Field required")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise invalid(path, "Input should be a valid string or a list of blocks")
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    for place, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise invalid(f"{path}.{place}", "Input should be an object")
        if not isinstance(block.get("type"), str):
            raise invalid(f"{path}.{place}.type", "Field required")
    return blocks


# --- Turns ----------------------------------------------------------------------------------------------------------
def chat_messages(request: JSON) -> list[JSON]:
    """The conversation in chat's form."""
    turns = request.get("messages")
    if turns is None:
        raise invalid("messages", "Field required")
    if not isinstance(turns, list):
        raise invalid("messages", "Input should be a valid list")
    if not turns:
        raise invalid("messages", "at least one message is required")
    system = system_text(request.get("system") or [], "system")
    messages = [{"role": "system", "content": system}] if system else []
    last_user = max((place for place, turn in enumerate(turns) if is_users(turn)), default=-1)
    for place, turn in enumerate(turns):
        if place > last_user or not (isinstance(turn, dict) and turn.get("clear_at") == "next_user_message"):
            messages += turn_messages(turn, f"messages.{place}")
    return messages


def is_users(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "user"


def system_text(content: object, path: str) -> str:
    """All of a system prompt but the block that tells Anthropic who is asking: elsewhere that is noise."""
    texts = [text_in(b, "text", f"{path}.{n}") for n, b in enumerate(blocks_of(content, path)) if b["type"] == "text"]
    return "\n\n".join(text for text in texts if text and not text.startswith(ATTRIBUTION))


def turn_messages(turn: object, path: str) -> list[JSON]:
    if not isinstance(turn, dict):
        raise invalid(path, "Input should be an object")
    role = turn.get("role")
    if role is None:
        raise invalid(f"{path}.role", "Field required")
    if role in SYSTEM_ROLES:  # may be there for its wishes alone, which are read elsewhere
        text = system_text(turn.get("content") or [], f"{path}.content")
        return [{"role": "system", "content": text}] if text else []
    blocks = blocks_of(turn.get("content"), f"{path}.content")
    if role == "user":
        return user_messages(blocks, f"{path}.content")
    if role == "assistant":
        return [assistant_message(blocks, f"{path}.content")]
    raise invalid(f"{path}.role", TURNS)


def user_messages(blocks: list[JSON], path: str) -> list[JSON]:
    """Results of tools come first, whatever their place in the turn: in chat they stand right behind their calls."""
    results, parts = [], []
    for place, block in enumerate(blocks):
        if block["type"] == "tool_result":
            results.append(tool_message(block, f"{path}.{place}"))
        else:
            parts += user_parts(block, f"{path}.{place}")
    if parts or not results:
        results.append({"role": "user", "content": text_or_parts(parts)})
    return results


def text_or_parts(parts: list[JSON]) -> str | list[JSON]:
    """Parts that are text alone as one text, which every platform takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def user_parts(block: JSON, path: str) -> list[JSON]:
    """One block of a user, or of a tool's result, as chat's parts."""
    match block["type"]:
        case "text":
            return [text_part(text_in(block, "text", path))]
        case "image":
            return [image_part(block, path)]
        case "image_url" if isinstance(image := block.get("image_url"), dict | str):  # as OpenAI's chat has it
            return [{"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}]
        case "document":
            return document_parts(block, path)
        case "search_result":
            texts = [text_in(b, "text", path) for b in blocks_of(block.get("content", []), f"{path}.content")]
            return [text_part("\n".join([*headings(block, "title", "source"), *texts]))]
        case "thinking" | "redacted_thinking":
            return []
        case "tool_reference":  # what a search for tools has found
            return [text_part(f"The tool {text_in(block, 'tool_name', path)} can be called now.")]
        case _:  # of a kind that is not known here: better as it stands than not at all
            return [text_part(dump(block).decode())]


def text_part(text: str) -> JSON:
    return {"type": "text", "text": text}


def headings(block: JSON, *names: str) -> list[str]:
    return [block[name] for name in names if isinstance(block.get(name), str) and block[name]]


def source_of(block: JSON, path: str) -> JSON:
    source = block.get("source")
    if not isinstance(source, dict):
        raise invalid(f"{path}.source", "Input should be an object" if "source" in block else "Field required")
    if source.get("type") == "file" or "file_id" in source:
        raise invalid(f"{path}.source", NO_FILES)
    return source


def address_in(source: JSON, path: str) -> str:
    """Where the content is: a URL, or itself as one."""
    if source.get("type") == "url" or "url" in source:
        return text_in(source, "url", path)
    data = text_in(source, "data", path)
    return f"data:{source.get('media_type') or 'image/png'};base64,{data}"


def image_part(block: JSON, path: str) -> JSON:
    source = source_of(block, path)
    return {"type": "image_url", "image_url": {"url": address_in(source, f"{path}.source")}}


def document_parts(block: JSON, path: str) -> list[JSON]:
    """A document as text, where it is text; a PDF as a file, for the platforms that read some."""
    source = source_of(block, path)
    told = headings(block, "title", "context")
    match source.get("type"):
        case "text":
            return [text_part("\n".join([*told, text_in(source, "data", f"{path}.source")]))]
        case "content":
            inner = blocks_of(source.get("content"), f"{path}.source.content")
            parts = [part for n, b in enumerate(inner) for part in user_parts(b, f"{path}.source.content.{n}")]
            return [*map(text_part, told), *parts]
        case _:
            name = block.get("title") if isinstance(block.get("title"), str) else None
            address = address_in({"media_type": "application/pdf", **source}, f"{path}.source")
            return [{"type": "file", "file": {"filename": name or "document.pdf", "file_data": address}}]


def tool_message(block: JSON, path: str) -> JSON:
    """A tool's result. Its images stay in it: history.paired puts them where a provider sees them."""
    call_id = text_in(block, "tool_use_id", f"{path}.tool_result")
    content = block.get("content")
    if content is None:
        content = ""
    parts: list[JSON] = []
    if isinstance(content, str):
        parts = [text_part(content)]
    elif isinstance(content, int | float) or (
        isinstance(content, dict) and "type" not in content
    ):  # handed over as it is
        parts = [text_part(dump(content).decode())]
    else:
        for place, inner in enumerate(blocks_of(content, f"{path}.content")):
            parts += user_parts(inner, f"{path}.content.{place}")
    if block.get("is_error") is True:
        parts.insert(0, text_part(TOOL_ERROR))
    return {"role": "tool", "tool_call_id": call_id, "content": text_or_parts(parts)}


def assistant_message(blocks: list[JSON], path: str) -> JSON:
    """What the model said in one turn. Its thoughts go back to the platforms that want to see them again, and only to
    them; what Anthropic's servers did within the turn is told by the text around it."""
    texts, thoughts, calls = [], [], []
    for place, block in enumerate(blocks):
        match block["type"]:
            case "text":
                texts.append(text_in(block, "text", f"{path}.{place}"))
            case "thinking":
                thoughts += headings(block, "thinking")
            case "tool_use":
                calls.append(tool_call(block, f"{path}.{place}.tool_use"))
            case "compaction":  # what is left of the conversation before it
                texts += headings(block, "content")
    message: JSON = {"role": "assistant", "content": "\n".join(filter(None, texts)) or None}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message


def tool_call(block: JSON, path: str) -> JSON:
    function = {"name": text_in(block, "name", path), "arguments": block.get("input")}  # as text: history's affair
    return {"id": text_in(block, "id", path), "type": "function", "function": function}

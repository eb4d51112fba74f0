"""What messages are made of: parts of text, images, files and results of tools, in whichever API's form. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dialects.message_blocks import user_parts
from dialects.values import wrong_type
from wire.errors import InvalidRequest
from wire.jsontext import JSON, dump

TEXT_PART_TYPES = frozenset({"text", "input_text", "output_text", "refusal"})
IMAGE_PART_TYPES = frozenset({"image_url", "input_image", "image"})
AUDIO_PART_TYPES = frozenset({"input_audio", "audio"})
FILE_PART_TYPES = frozenset({"file", "input_file"})
BLOCK_TYPES = frozenset({"document", "search_result"})  # of the Messages API
THOUGHT_PART_TYPES = frozenset({"thinking", "redacted_thinking", "reasoning"})  # replayed; nobody wants them back so
IMAGE_KINDS = {"/9j/": "jpeg", "R0lG": "gif", "UklG": "webp", "iVBO": "png"}  # by how their base64 begins
PDF_BEGINS = "JVBERi"  # in base64
MEDIA_TYPE_NAMES = ("mime_type", "mimeType", "media_type", "mediaType")
FILE_NAMES = ("file_data", "data", "file_url", "url")  # of a file's content, or of its address


def kind_of(part: object) -> str | None:
    """A part's type, also where it goes without saying."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        return None
    kind = part.get("type", "text" if "text" in part else "image_url" if "image_url" in part else None)
    return kind if isinstance(kind, str) else None


def mended_parts(part: object, param: str) -> list[JSON]:
    """A part in chat's form; some of other APIs become several."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    if not isinstance(part, dict):
        raise wrong_type(param, "an object")
    if not isinstance(part.get("type", ""), str):
        raise wrong_type(f"{param}.type", "a string")
    kind = kind_of(part)
    if kind in TEXT_PART_TYPES:
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise wrong_type(f"{param}.text", "a string")
        return [part if part.get("type") == "text" else {"type": "text", "text": text}]
    if kind in IMAGE_PART_TYPES:
        return [mended_image(part, param)]
    if kind in FILE_PART_TYPES:
        return [mended_file(part, param)]
    if kind in BLOCK_TYPES:
        return user_parts(part, param)
    if kind in AUDIO_PART_TYPES:
        raise InvalidRequest("Audio input is not supported by any platform here.", param=param)
    if kind is None:
        raise wrong_type(f"{param}.type", "given")
    return [part]


def result_content(content: object, param: str) -> str | list[JSON]:
    """A tool's result as text, or as parts where images are among it. What is neither is told as JSON: nothing that a
    tool has said gets lost."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and kind_of(content) in (*TEXT_PART_TYPES, *IMAGE_PART_TYPES):
        content = [content]
    if isinstance(content, dict):
        return json_text(content)
    if content is None:
        return ""
    if not isinstance(content, list):
        raise wrong_type(param, "a string, null or a list of parts")
    items = [item for item in content if item is not None]
    parts = [result_part(item, param) for item in items]
    if items and all(part is None for part in parts):  # no list of parts: data
        return json_text(content)
    told = [part or text_part(json_text(item)) for part, item in zip(parts, items, strict=True)]
    if all(part["type"] == "text" for part in told):
        return "\n".join(part["text"] for part in told)
    return told


def result_part(part: object, param: str) -> JSON | None:
    """A text or an image in a tool's result; None for anything else."""
    kind = kind_of(part)
    if kind not in TEXT_PART_TYPES and kind not in IMAGE_PART_TYPES:
        return None
    try:
        return mended_parts(part, param)[0]
    except InvalidRequest:  # it only looks like one
        return None


def text_part(text: str) -> JSON:
    return {"type": "text", "text": text}


def json_text(value: object) -> str:
    return dump(value).decode()


def media_type(part: Mapping[str, Any]) -> str | None:
    return next((part[name] for name in MEDIA_TYPE_NAMES if isinstance(part.get(name), str) and part[name]), None)


def mended_file(part: JSON, param: str) -> JSON:
    """A file part as `{"type": "file", "file": {"filename": …, "file_data": …}}`, flat or nested, whichever API it was
    written for."""
    file = part.get("file", part)
    if not isinstance(file, dict):
        raise wrong_type(f"{param}.file", "an object")
    data = next((file[name] for name in FILE_NAMES if isinstance(file.get(name), str) and file[name]), None)
    if data is None:
        raise InvalidRequest("Files by id are not supported: send the content as file_data.", param=param)
    is_address = ":" in data[:16]
    if is_address and file is not part and data is file.get("file_data") and part["type"] == "file":
        return part
    if not is_address:  # bare base64
        guess = "application/pdf" if data.startswith(PDF_BEGINS) else "application/octet-stream"
        data = f"data:{media_type(file) or guess};base64,{data}"
    named = {"filename": file["filename"]} if isinstance(file.get("filename"), str) else {}
    return {"type": "file", "file": {**named, "file_data": data}}


def mended_image(part: JSON, param: str) -> JSON:
    """An image part as `{"type": "image_url", "image_url": {"url": …}}`, whichever API it was written for."""
    image = part.get("image_url")
    if part.get("type") == "image_url" and isinstance(image, dict):
        url = image.get("url")
        if isinstance(url, str) and ":" in url[:16]:
            return part
    source, data = part.get("source"), part.get("data")
    if isinstance(image, dict):
        url = image.get("url")
    elif isinstance(source, dict):  # Anthropic's form
        data = f"data:{source.get('media_type', 'image/png')};base64,{source.get('data', '')}"
        url = source.get("url") if source.get("type") == "url" else data
    elif isinstance(data, str) and media_type(part) is not None:  # as MCP servers give it
        url = f"data:{media_type(part)};base64,{data}"
    else:
        url = next((part[name] for name in ("image_url", "image", "url") if part.get(name) is not None), None)
    if not isinstance(url, str) or not url:
        raise wrong_type(f"{param}.image_url", "an object with a url")
    if ":" not in url[:16] and url[:4] in IMAGE_KINDS:  # bare base64
        url = f"data:image/{IMAGE_KINDS[url[:4]]};base64,{url}"
    detail = {"detail": part["detail"]} if isinstance(part.get("detail"), str) else {}
    return {"type": "image_url", "image_url": {"url": url, **detail}}

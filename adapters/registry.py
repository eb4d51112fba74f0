"""The adapters there are: the one list of wire formats. Whoever writes another one adds it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapters.base import Adapter
from adapters.demo import DemoAdapter
from adapters.gemini import GeminiAdapter
from adapters.openai import OpenAIAdapter

ADAPTERS: Mapping[str, Callable[[Callable[[], float]], Adapter]] = {
    "openai": lambda utc: OpenAIAdapter(),
    "google": GeminiAdapter,
    "demo": DemoAdapter,
}  # by their names in the catalogue; each is made with a clock, UTC in seconds

"""`python gateway.py clients`: ready configuration for each client of the README, with this gateway's address.

The README is where the recipes stand, so that there is one of each. The key is never in them: it is asked for by a
placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

README_ADDRESS = "http://127.0.0.1:8000"
README_KEY = "fw-local-development"
PLACEHOLDER = "YOUR_FREEWAY_KEY"
SECTION = r"^## {name}\n(.*?)(?=^## |\Z)"
BLOCK = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)


def recipes(readme: str, address: str) -> str:
    """The recipes as text, `address` being the gateway's without a path. Raises ValueError for another README."""
    first = [
        block for block in BLOCK.findall(section(readme, "Start")) if README_ADDRESS in block and README_KEY in block
    ]
    paragraphs = ["# Clients of this gateway", *told(address), *first, section(readme, "Clients").strip()]
    return "\n\n".join(paragraphs).replace(README_ADDRESS, address).replace(README_KEY, PLACEHOLDER)


def told(address: str) -> Iterator[str]:
    yield f"Base URL {address}/v1. Put the gateway's key, or a client's, in the place of {PLACEHOLDER}."
    yield "With curl, and with openai for Python:"


def section(readme: str, name: str) -> str:
    found = re.search(SECTION.format(name=re.escape(name)), readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"the README has no section {name}")
    return found[1]

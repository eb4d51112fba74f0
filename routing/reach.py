"""What may be asked at all, before anything is known of a request: usable keys, and the models that have one.

Worked out once per snapshot, for two worlds: all routes, and those alone that are known not to train on prompts
(SPEC 21.4). A request that wants no training is routed in the second as if there were nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from routing.catalog import KEYLESS, Catalog, Key, KeyStatus, Model, is_demo, keeps_prompts_private
from wire.chat import Mode


@dataclass(frozen=True, slots=True)
class Reach:
    """One world. Models are in the order of the chain."""

    keys: Mapping[str, list[Key]] = field(default_factory=dict)  # usable ones, by platform
    candidates: Mapping[Mode, list[Model]] = field(default_factory=dict)
    excluded: Mapping[Mode, list[Model]] = field(default_factory=dict)  # from the mode: a last resort
    others: list[Model] = field(default_factory=list)  # that follow a pinned model

    def has_key(self, model: Model) -> bool:
        return bool(self.keys.get(model.platform.id))


def reach(catalog: Catalog, key_status: Mapping[int, KeyStatus], *, private: bool) -> Reach:
    """`private`: only what is known not to train on prompts."""
    keys = {}
    for platform in catalog.platforms.values():
        valid = [key for key in catalog.keys.get(platform.id, ()) if key_status.get(key.id) is not KeyStatus.INVALID]
        usable = valid or ([KEYLESS] if platform.keyless else [])
        keys[platform.id] = [key for key in usable if not private or keeps_prompts_private(platform, key)]
    routable = [m for m in catalog.auto_chain if keys.get(m.platform.id)]
    candidates = {mode: [m for m in routable if mode not in m.exclude_from] for mode in Mode}
    excluded = {mode: [m for m in routable if mode in m.exclude_from] for mode in Mode}
    return Reach(keys, candidates, excluded, [m for m in candidates[Mode.BALANCED] if not is_demo(m.platform)])

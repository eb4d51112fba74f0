"""One answer made of what every worker says (SPEC 20.4). Pure, but for the asking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from transport.siblings import Siblings

JSON = dict[str, Any]
# Gauges that each worker reads off the same state: the most that one of them sees, or the least. All others add up.
OF_ALL = ("cooldowns", "gateways", "routable_models", "gates_open", "bans", "sessions")
WORST = ("_up",)
# Lists in /api/protection: what makes two entries the same thing, of which the longest is shown.
SAME = {
    "transient_cooldowns": ("model_db_id",),
    "key_cooldowns": ("key_id", "platform", "model_id"),
    "gates": ("model_db_id",),
    "trials": ("model_db_id",),
}
LENGTHS = ("ms_left", "since_ms")
SUMS = ("log_queue", "log_dropped")


async def of_all(siblings: Siblings | None, question: str, own: JSON) -> list[JSON]:
    """This worker's answer and those of the others."""
    return [own] if siblings is None else [own, *map(orjson.loads, await siblings.ask(question))]


def status_of(answers: Sequence[JSON]) -> JSON:
    """/api/status."""
    sums = {name: sum(answer[name] for answer in answers) for name in SUMS}
    if len(answers) == 1:
        return answers[0]
    return {**answers[0], **sums, "uptime_s": max(answer["uptime_s"] for answer in answers), "workers": len(answers)}


def protection_of(answers: Sequence[JSON]) -> JSON:
    """/api/protection."""
    if len(answers) == 1:
        return answers[0]
    merged = dict(answers[0])
    for name in ("waiting", "active", "rescues"):
        merged[name] = [entry for answer in answers for entry in answer[name]]
    for name, same in SAME.items():
        merged[name] = distinct((entry for answer in answers for entry in answer[name]), same)
    merged["bans"] = bans_of(answers)
    by_model: dict[tuple[str, str], JSON] = {}
    for entry in (entry for answer in answers for entry in answer["sessions"]["by_model"]):
        known = by_model.setdefault((entry["platform"], entry["model_id"]), {**entry, "count": 0})
        known["count"] += entry["count"]
    count = sum(answer["sessions"]["count"] for answer in answers)
    merged["sessions"] = {"count": count, "by_model": sorted(by_model.values(), key=lambda entry: -entry["count"])}
    return merged


def bans_of(answers: Sequence[JSON]) -> list[JSON]:
    """A conversation that several workers know has the bans of all."""
    sessions: dict[str, list[JSON]] = {}
    for ban in (ban for answer in answers for ban in answer["bans"]):
        sessions.setdefault(ban["session"], []).extend(ban["platforms"])
    return [{"session": key, "platforms": distinct(found, ("platform",))} for key, found in sessions.items()]


def distinct(entries: Iterable[JSON], same: Sequence[str]) -> list[JSON]:
    """One of those that are the same: the longest."""
    found: dict[tuple[Any, ...], JSON] = {}
    for entry in entries:
        name = tuple(entry[part] for part in same)
        if name not in found or length(entry) > length(found[name]):
            found[name] = entry
    return list(found.values())


def length(entry: Mapping[str, Any]) -> int:
    return max((entry[name] for name in LENGTHS if name in entry), default=0)


def metrics_of(texts: Sequence[bytes]) -> bytes:
    """Prometheus' text: every series of any of them, in the order of the first that has it."""
    if len(texts) == 1:
        return texts[0]
    heads: dict[str, list[str]] = {}  # by family
    series: dict[str, dict[str, float]] = {}
    for text in texts:
        family = ""
        for line in text.decode().splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
                continue
            name, _, value = line.rpartition(" ")
            known = series.setdefault(family, {})
            known[name] = joined(family, known[name], float(value)) if name in known else float(value)
    lines = []
    for family, head in heads.items():
        lines += [*head, *(f"{name} {value}" for name, value in series.get(family, {}).items())]
    return ("\n".join(lines) + "\n").encode()


def joined(family: str, known: float, value: float) -> float:
    if family.endswith(WORST):
        return min(known, value)
    return max(known, value) if family.endswith(OF_ALL) else known + value

"""The same ratios as `make bench`, on a machine that is shared: floor and gateway run at once and take turns of half a
second, so that a busy neighbour or a slow minute meets both.

    make turns                                 twenty rounds, some five minutes, written to bench/TURNS.md
    python bench/turns.py --rounds 5           a look
    python bench/turns.py --before ../before   with another checkout of the gateway in the same turns

A neighbour only ever adds to a figure, so the lowest of all turns says most; the median of the rounds' own ratios
stands beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "harness")]

import compare  # noqa: E402
from run import MOCK_PORT, RATIOS, peers  # noqa: E402

BEFORE_PORT = 18097
WARM_REQUESTS = 1500  # more than what is kept of the latest requests
LOADS = {  # by run.py's phases: seconds of a turn, an answer's chunks and the milliseconds between them, the load
    "plain_c16": (0.5, 200, 0, ({}, 16, {})),
    "plain_c64": (0.5, 200, 0, ({}, 64, {})),
    "agent": (0.5, 200, 0, ({"agent": True}, 16, {})),
    "burst_1": (0.5, 1, 0, ({"stream": True}, 8, {"chunks": 1})),
    "burst_200": (0.5, 200, 0, ({"stream": True}, 8, {"chunks": 200})),
    "paced": (3.0, 100, 20, ({"stream": True}, 100, {"chunks": 100, "stagger": 20})),
}
# What, its phase and figure, and what is aimed at.
PHASES = [(name, *path.split("."), aim) for name, path, _, aim in RATIOS if path.split(".")[0] in LOADS]
START, MEMORY = "first answer after start", "memory, idle"

ABOUT = """All run at once on one core and take turns of half a second (3 s for chunks that arrive alone); CPU of each
one's process, the lowest of all turns, then its ratio to the floor and the median of the rounds' own ratios. A busy
neighbour meets all, and only ever adds."""


def turn(peer: compare.Peer, phase: tuple[Any, ...]) -> float:
    _, load, figure, _ = phase
    seconds, chunks, pause_ms, (request, connections, options) = LOADS[load]
    compare.mock_control(peer, chunks=chunks, delay_ms=pause_ms)
    return compare.load(peer, peer.raw(**request), connections, seconds, **options)[figure]


def contestants(before: Path | None) -> list[dict[str, Any]]:
    """Floor and gateway, and the gateway as it was in another checkout."""
    floor, gateway = peers()[:2]
    if before is None:
        return [floor, gateway]
    command = gateway["cmd"].replace(str(HERE.parent / "gateway.py"), str(before.resolve() / "gateway.py"))
    return [floor, gateway, {**gateway, "name": "before", "cmd": command, "port": BEFORE_PORT}]


def measured(rounds: int, before: Path | None) -> dict[str, list[tuple[float, ...]]]:
    """The figures of (floor, gateway, and what was before) of each round, by phase; of start and memory one."""
    os.sched_setaffinity(0, {compare.LOAD_CORE})
    told: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        context = {"build": compare.build(), "mock_port": MOCK_PORT, "peers_dir": Path(), "tmp": Path(folder)}
        mock = compare.spawn([str(context["build"] / "mock_upstream"), str(MOCK_PORT)], compare.LOAD_CORE)
        context |= {"mock_pid": mock.pid, "max_noise": 1000, "retries": 0, "wait_quiet": 0}
        running: list[compare.Peer] = []
        try:
            compare.wait_for_mock(mock, MOCK_PORT)
            starts, memory = [], []
            for spec in contestants(before):
                peer = compare.Peer(spec, context)
                compare.mock_control(peer, chunks=200, delay_ms=0, latency_ms=0, status=200)
                peer.total = 0
                starts.append(peer.start())
                running.append(peer)
                time.sleep(compare.SETTLE_S)
                memory.append(compare.rss_mb(peer.proc.pid))
                compare.load(peer, peer.raw(), 16, 20, count=WARM_REQUESTS)
            told[START], told[MEMORY] = [tuple(starts)], [tuple(memory)]
            for _ in range(rounds):
                for phase in PHASES:
                    told[phase[0]].append(tuple(turn(peer, phase) for peer in running))
        finally:
            for peer in running:
                compare.stop(peer.proc)
            compare.stop(mock)
    return told


def table(told: dict[str, list[tuple[float, ...]]], rounds: int) -> str:
    names = ("floor", "freeway", "before")[: len(told[START][0])]
    heads = [f"{name} | ratio | of the rounds" for name in names[1:]]
    lines = [
        "# Floor and gateway in turns",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {rounds} rounds. {ABOUT}",
        "",
        f"| CPU per | aim | floor | {' | '.join(heads)} |",
        f"|---|---:|---:|{'---:|' * 3 * len(heads)}",
    ]
    for name, *_, aim in PHASES:
        floor, *others = zip(*told[name], strict=True)
        cells = [name, f"≤ {aim}", f"{min(floor):.1f} µs"]
        for values in others:
            paired = median(value / bare for value, bare in zip(values, floor, strict=True))
            cells += [f"{min(values):.1f} µs", f"**{min(values) / min(floor):.2f}**", f"{paired:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| | aim | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for name, unit, aim in ((MEMORY, "MB", 60), (START, "s", 0.5)):
        lines.append(f"| {name} | ≤ {aim} {unit} | {' | '.join(f'{value:.2f} {unit}' for value in told[name][0])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--before", type=Path, help="another checkout of the gateway, to run beside this one")
    options = parser.parse_args()
    text = table(measured(options.rounds, options.before), options.rounds)
    (HERE / "TURNS.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

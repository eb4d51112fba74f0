"""The same ratios as `make bench`, on a machine that is shared: floor and gateway run at once and take turns of half a
second, so that a busy neighbour or a slow minute meets both.

    make turns                         twenty rounds, some five minutes, written to bench/TURNS.md
    python bench/turns.py --rounds 5   a look

A neighbour only ever adds to a figure, so the lowest of all turns says most; the median of the rounds' own ratios
stands beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "harness")]

import compare  # noqa: E402
from run import MOCK_PORT, RATIOS, peers  # noqa: E402

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

ABOUT = """Both run at once on one core and take turns of half a second (3 s for chunks that arrive alone); CPU of each
one's process, the lowest of all turns, and the median of the rounds' own ratios. A busy neighbour meets both, and only
ever adds."""


def turn(peer: compare.Peer, phase: tuple[Any, ...]) -> float:
    _, load, figure, _ = phase
    seconds, chunks, pause_ms, (request, connections, options) = LOADS[load]
    compare.mock_control(peer, chunks=chunks, delay_ms=pause_ms)
    return compare.load(peer, peer.raw(**request), connections, seconds, **options)[figure]


def measured(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(floor, gateway) of each round, by phase."""
    os.sched_setaffinity(0, {compare.LOAD_CORE})
    told: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        context = {"build": compare.build(), "mock_port": MOCK_PORT, "peers_dir": Path(), "tmp": Path(folder)}
        mock = compare.spawn([str(context["build"] / "mock_upstream"), str(MOCK_PORT)], compare.LOAD_CORE)
        context |= {"mock_pid": mock.pid, "max_noise": 1000, "retries": 0, "wait_quiet": 0}
        running: list[compare.Peer] = []
        try:
            compare.wait_for_mock(mock, MOCK_PORT)
            for spec in peers()[:2]:
                peer = compare.Peer(spec, context)
                compare.mock_control(peer, chunks=200, delay_ms=0, latency_ms=0, status=200)
                peer.total = 0
                peer.start()
                running.append(peer)
                compare.load(peer, peer.raw(), 16, 20, count=WARM_REQUESTS)
            for _ in range(rounds):
                for phase in PHASES:
                    floor, gateway = (turn(peer, phase) for peer in running)
                    told[phase[0]].append((floor, gateway))
        finally:
            for peer in running:
                compare.stop(peer.proc)
            compare.stop(mock)
    return told


def table(told: dict[str, list[tuple[float, float]]], rounds: int) -> str:
    lines = [
        "# Floor and gateway in turns",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {rounds} rounds. {ABOUT}",
        "",
        "| CPU per | floor | freeway | ratio | of the rounds | aim |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, *_, aim in PHASES:
        floor, gateway = (min(values) for values in zip(*told[name], strict=True))
        paired = median(gateway / floor for floor, gateway in told[name])
        lines.append(
            f"| {name} | {floor:.1f} µs | {gateway:.1f} µs | **{gateway / floor:.2f}** | {paired:.2f} | ≤ {aim} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    text = table(measured(rounds), rounds)
    (HERE / "TURNS.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

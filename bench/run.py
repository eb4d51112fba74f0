"""What the gateway costs over the floor, the smallest pass-through on the same stack, in the same run on the same core.

    make bench                                   five interleaved runs, written to bench/RESULTS.md
    python bench/run.py --reps 1 --scale 0.3     a look

Beside it a gateway that has been used for long (bench/crowd.py): 200 models, 500 keys, 10,000 conversations, a million
rows of log. Harness and floor are in bench/harness; everything stays on 127.0.0.1 and needs two cores, a C compiler and
taskset.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from crowd import KEYS, MODELS, ROWS, SESSIONS, catalog, fill  # noqa: E402

OUT = HERE / "out"
FILLED = OUT / "crowd.db"
KEY = "fw-bench-0123456789abcdef"
FREEWAY_PORT, CROWD_PORT, FLOOR_PORT = 18095, 18096, 18092
PEERS = ("floor", "freeway", "crowd")
MODEL = "mock-model"
MOCK_PORT = 18080
PROVIDER = f"http://127.0.0.1:{MOCK_PORT}/v1"
CATALOG = {
    "platforms": [{"id": "mock", "adapter": "openai", "base_url": PROVIDER, "protection": "off"}],
    "models": [{"platform": "mock", "model_id": MODEL, "context_window": 1_000_000}],
    "keys": [{"platform": "mock", "key": "sk-mock-0123456789", "label": "bench"}],
}
RATIOS = [  # what, where in a run's record, unit, what is aimed at
    ("request, 1 connection", "plain_c1.cpu_us_per_req", "µs", None),
    ("request, 16 connections", "plain_c16.cpu_us_per_req", "µs", 1.7),
    ("request, 64 connections", "plain_c64.cpu_us_per_req", "µs", 1.7),
    ("request with a 100 KB prompt", "big_c16.cpu_us_per_req", "µs", None),
    ("agent's request: 122 KB, 202 messages, 30 tools", "agent.cpu_us_per_req", "µs", 3.5),
    ("stream of one chunk", "burst_1.cpu_us_per_req", "µs", 1.7),
    ("chunk in a burst", "burst_200.cpu_us_per_chunk", "µs", 2.0),
    ("chunk that arrives alone", "paced.cpu_us_per_chunk", "µs", 1.35),
]
ABSOLUTES = [
    ("time to first token, p50", "ttft_c1.ttft_us.p50", "µs"),
    ("age of a paced chunk on arrival, p99", "paced.chunk_age_us.p99", "µs"),
    ("memory, idle", "rss_idle_mb", "MB"),
    ("memory after 20,000 requests", "rss_20k_mb", "MB"),
    ("first answer after start", "startup_s", "s"),
]


def peers() -> list[dict[str, Any]]:
    """How the harness starts the two; both run on this Python."""
    floor = (
        f"{sys.executable} -m uvicorn --app-dir {HERE / 'harness'} floor:app --host 127.0.0.1 --port {{port}} "
        "--loop uvloop --http httptools --no-access-log --log-level warning --backlog 4096"
    )
    gateway = (
        f"{sys.executable} {HERE.parent / 'gateway.py'} --port {{port}} --db {{dir}}/gateway.db "
        "--catalog {dir}/catalog.json"
    )
    freeway = {
        "name": "freeway",
        "cmd": gateway,
        "port": FREEWAY_PORT,
        "key": KEY,
        "model": MODEL,
        "env": {"GATEWAY_API_KEY": KEY},
        "files": {"catalog.json": CATALOG},
    }
    crowd = {
        **freeway,
        "name": "crowd",
        "port": CROWD_PORT,
        "files": {"catalog.json": catalog(PROVIDER, MODEL)},
        "prepare": f"cp {FILLED} gateway.db; rm -f gateway.db-*",
        "warm": f"{sys.executable} {HERE / 'crowd.py'} sessions http://127.0.0.1:{CROWD_PORT} {KEY}",
    }
    return [
        {"name": "floor", "cmd": floor, "port": FLOOR_PORT, "env": {"UPSTREAM": "{mock}"}},
        freeway,
        crowd,
    ]


def dig(record: Any, path: str) -> float | None:
    for name in path.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def middle(runs: list[dict[str, Any]], peer: str, path: str) -> float | None:
    values = [v for run in runs if run["peer"] == peer and (v := dig(run, path)) is not None]
    return median(values) if values else None


def tables(runs: list[dict[str, Any]], reps: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "aiohttp", "orjson"))
    lines = [
        "# What the gateway costs",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {packages}. Median of {reps} interleaved "
        "runs of floor and gateway on the same core; everything on (routing, protection, log rows, error checks). "
        "Times are CPU of the gateway's process and only comparable within a run: read the ratio.",
        "",
        "| CPU per | floor | freeway | ratio | aim | in a crowd | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for what, path, unit, aim in RATIOS:
        floor, freeway, crowd = (middle(runs, peer, path) for peer in PEERS)
        if floor and freeway:
            cells = [what, f"{floor:.1f} {unit}", f"{freeway:.1f} {unit}", f"**{freeway / floor:.2f}**"]
            cells += [f"≤ {aim}" if aim else "", f"{crowd:.1f} {unit}", f"{crowd / floor:.2f}"] if crowd else []
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | floor | freeway | in a crowd |", "|---|---:|---:|---:|"]
    for what, path, unit in ABSOLUTES:
        found = [middle(runs, peer, path) for peer in PEERS]
        if any(value is not None for value in found):
            cells = ["" if value is None else f"{value:.2f} {unit}" for value in found]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += [
        "",
        f"In a crowd: the same with {MODELS} models, {KEYS} keys, {SESSIONS:,} conversations and {ROWS:,} rows in the "
        "log, whose statistics are worked out in a hundredth of the time.",
    ]
    errors = sum(dig(run, f"{phase}.errors") or 0 for run in runs for phase in run if isinstance(run[phase], dict))
    failed = [f"{run['peer']}: {run['error']}" for run in runs if "error" in run]
    lines += ["", f"Errors in all phases: {errors:.0f}.", *failed]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every phase's length")
    parser.add_argument("--phases", help="some phases only, separated by commas")
    parser.add_argument("--no-soak", action="store_true", help="skip the run up to 20,000 requests")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    FILLED.unlink(missing_ok=True)
    fill(FILLED, MODEL)
    (OUT / "peers.json").write_text(json.dumps(peers()))
    results = OUT / "results.json"
    command = [
        sys.executable, HERE / "harness" / "compare.py", "--peers-file", OUT / "peers.json", "--out", results,
        "--only", ",".join(PEERS), "--reps", options.reps, "--scale", options.scale,
    ]  # fmt: skip
    command += ["--phases", options.phases] if options.phases else []
    command += ["--no-soak"] if options.no_soak else []
    subprocess.run([str(part) for part in command], check=True)
    report = tables(json.loads(results.read_text())["runs"], options.reps)
    print(report)
    if options.reps >= 3 and not options.phases:
        (HERE / "RESULTS.md").write_text(report)
    FILLED.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

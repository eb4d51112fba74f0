"""What the process asks of the operating system: a listening socket, file descriptors, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource as resource_limits
import socket

BACKLOG = 2048  # connections waiting to be accepted; uvicorn's own figure
FILES_MAX = 65_536  # open at once, where the system allows it
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def bind(host: str, port: int, *, together: bool = False) -> socket.socket:
    """A socket on this port; `together` with others of ours. Whoever asks closes it. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if together:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def listen(host: str, port: int, *, together: bool = False) -> socket.socket:
    """A socket that clients can connect to from now on: they wait for the server instead of being refused. Raises
    OSError."""
    listener = bind(host, port, together=together)
    try:
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def allow_many_files() -> None:
    """Each request holds two connections, and the usual limit of a shell's children is 1024 files, or 256."""
    _, most = resource_limits.getrlimit(resource_limits.RLIMIT_NOFILE)
    wanted = FILES_MAX if most == resource_limits.RLIM_INFINITY else min(FILES_MAX, most)
    with contextlib.suppress(OSError, ValueError):
        resource_limits.setrlimit(resource_limits.RLIMIT_NOFILE, (wanted, most))


def trim_memory() -> None:
    """Give the system back what a burst of large requests has left free: glibc keeps it, a hundred megabytes and more.
    10 us when there is nothing, 1 ms for 15 MB; other C libraries have no such call."""
    if MALLOC_TRIM is not None:
        MALLOC_TRIM(0)


def spare_the_collector() -> None:
    """What stands at the start stays; walking through it again and again took a thirtieth of the time under load. A
    request leaves no cycles (tests/test_garbage.py), so there is little to find: the young are looked at in portions of
    which each holds up the streams for a millisecond. What the start itself has left behind is not worth the 30 ms of
    looking for it."""
    gc.freeze()
    gc.set_threshold(5_000, 50, 50)
    gc.enable()

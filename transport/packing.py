"""Bodies that a client has compressed, by their Content-Encoding, never unpacked to more than is allowed. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import brotli  # type: ignore[import-untyped]
from backports import zstd

from wire.errors import InvalidRequest

LAYERS_MAX = 3  # a body packed more often than that is an attack
ZSTD_WINDOW_LOG_MAX = 25  # 32 MB of memory to unpack one body, as much as the largest may have
BROKEN = (zlib.error, brotli.error, zstd.ZstdError, EOFError)
Unpack = Callable[[bytes, int], bytes]  # at most so many bytes, though there may be more; raises what is in BROKEN


def unpacked(raw: bytes, encodings: bytes, bytes_max: int) -> bytes:
    """The body itself. Raises InvalidRequest, as soon as it turns out too large."""
    names = [name.strip().lower() for name in encodings.split(b",")]
    layers = [name for name in names if name not in (b"", b"identity")]
    if unknown := [name for name in layers if name not in UNPACKERS] or layers[LAYERS_MAX:]:
        words = f"Content-Encoding {unknown[0].decode('latin-1')!r} is not supported: send gzip, deflate, br or zstd."
        raise InvalidRequest(words, code="unsupported_encoding", status=415)
    for name in reversed(layers):
        try:
            raw = UNPACKERS[name](raw, bytes_max + 1)
        except BROKEN:
            words = "The body is not what its Content-Encoding says, or incomplete."
            raise InvalidRequest(words, code="invalid_encoding") from None
        if len(raw) > bytes_max:
            raise too_large(bytes_max)
    return raw


def too_large(bytes_max: int) -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {bytes_max} bytes.", code="request_too_large", status=413)


def inflate(raw: bytes, bytes_max: int, wbits: int = zlib.MAX_WBITS | 32) -> bytes:
    """gzip, in which one member may follow another, and zlib."""
    pieces, room = [], bytes_max
    while room > 0:
        unpacker = zlib.decompressobj(wbits)
        pieces.append(unpacker.decompress(raw, room))
        room -= len(pieces[-1])
        if room > 0 and not unpacker.eof:
            raise EOFError
        raw = unpacker.unused_data
        if not raw:
            break
    return b"".join(pieces)


def inflate_bare(raw: bytes, bytes_max: int) -> bytes:
    """deflate, of which some leave out the zlib header."""
    return inflate(raw, bytes_max, zlib.MAX_WBITS if raw[:1] == b"\x78" else -zlib.MAX_WBITS)


def unbrotli(raw: bytes, bytes_max: int) -> bytes:
    unpacker = brotli.Decompressor()
    data: bytes = unpacker.process(raw, output_buffer_limit=bytes_max)
    if len(data) < bytes_max and not unpacker.is_finished():
        raise EOFError
    return data


def unzstd(raw: bytes, bytes_max: int) -> bytes:
    """Frames that follow one another."""
    pieces, room = [], bytes_max
    while room > 0:
        unpacker = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})
        pieces.append(unpacker.decompress(raw, max_length=room))
        room -= len(pieces[-1])
        if room > 0 and not unpacker.eof:
            raise EOFError
        raw = unpacker.unused_data
        if not raw:
            break
    return b"".join(pieces)


UNPACKERS: dict[bytes, Unpack] = {
    b"gzip": inflate, b"x-gzip": inflate, b"deflate": inflate_bare, b"br": unbrotli, b"zstd": unzstd,
}  # fmt: skip

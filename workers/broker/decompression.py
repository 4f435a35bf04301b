"""Bounds the decompression of messages: two codecs, and no more bytes than a job may have.

kombu decompresses a message with any codec and to any size: 3 kB become 100 MB. Here its table of decoders is
replaced, in this process, by decoders that stop at a limit. Producers write zstd; gzip is read for those that have no
zstd. Knows nothing of jobs.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu import compression

from embedq.core.errors import InvalidInput, JobTooLarge

#: Content types as kombu names them.
_ZSTD, _GZIP = "application/zstd", "application/x-gzip"

Decoder = Callable[[bytes], bytes]

#: Largest window a zstd frame may ask for, as a power of two: 32 MiB of memory before the first byte.
_MAX_WINDOW_LOG = 25


def restrict(max_bytes: int) -> None:
    """Make this process decompress messages with the two codecs alone, and to `max_bytes` at most.

    The decoders raise JobTooLarge or InvalidInput, which becomes the job's result.
    """
    known: dict[str, Decoder] = {_GZIP: partial(inflate_gzip, max_bytes=max_bytes)}
    if zstd := _zstd():
        known[_ZSTD] = partial(inflate_zstd, zstd, max_bytes=max_bytes)
    for name in compression.encoders():
        compression.register(compression.get_encoder(name)[0], known.get(name) or partial(_refuse, name), name)


def inflate_zstd(zstd: Any, data: bytes, max_bytes: int) -> bytes:
    """Decompress one zstd frame. JobTooLarge before anything is decompressed if the frame states its size."""
    try:
        stated_bytes = zstd.get_frame_info(data).decompressed_size
        if stated_bytes is not None and stated_bytes > max_bytes:
            raise _too_large(max_bytes)
        stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})
        inflated: bytes = stream.decompress(data, max_length=max_bytes + 1)
    except zstd.ZstdError:
        raise InvalidInput("the message is no zstd frame, or asks for a window above 32 MiB") from None
    return _whole(inflated, stream.eof and not stream.unused_data, max_bytes)


def inflate_gzip(data: bytes, max_bytes: int) -> bytes:
    """Decompress one zlib stream, which kombu calls gzip."""
    stream = zlib.decompressobj()
    try:
        inflated = stream.decompress(data, max_bytes + 1)
    except zlib.error:
        raise InvalidInput("the message is no zlib stream") from None
    return _whole(inflated, stream.eof and not stream.unused_data, max_bytes)


def _whole(inflated: bytes, is_whole: bool, max_bytes: int) -> bytes:
    if len(inflated) > max_bytes:
        raise _too_large(max_bytes)
    if not is_whole:
        raise InvalidInput("the compressed message is cut short, or something follows it")
    return inflated


def _too_large(max_bytes: int) -> JobTooLarge:
    return JobTooLarge(f"a compressed job may hold {max_bytes:,} bytes; this one holds more. Send several jobs.")


def _refuse(name: str, data: bytes) -> bytes:
    raise InvalidInput(f"workers read messages compressed with zstd or gzip, not {name}")


def _zstd() -> Any:
    """The standard library's zstd (from Python 3.14), or the package that carries it to older ones."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None

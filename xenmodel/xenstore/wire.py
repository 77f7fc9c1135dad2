"""wire.py: bytes <-> messages of xenstore; io/xs_wire.h, docs/misc/xenstore.txt. Pure: no store, no transport.

Parser takes bytes as they come and hands out whole messages; pack() makes the bytes of one. A message that says it is
longer than XENSTORE_PAYLOAD_MAX cannot be skipped: whoever reads the stream has lost it, and its connection ends.
Used by peer.py (server side) and by clients.
"""

from __future__ import annotations

from typing import NamedTuple

from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX

HEADER_BYTES = SOCKMSG.size
MESSAGE_MAX = HEADER_BYTES + XENSTORE_PAYLOAD_MAX


class ProtocolError(Exception):
    """The stream cannot be followed any further."""


class Message(NamedTuple):
    """`type` is an XsType for messages of the protocol, and any uint32_t for others."""

    type: int
    req_id: int
    tx_id: int
    body: bytes


class Parser:
    """Bytes in, messages out. Holds at most what feed() was given and next() has not taken."""

    def __init__(self) -> None:
        self._data = b""
        self._at = 0  # bytes of _data that were taken

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More of the stream."""
        if self._at < len(self._data):
            self._data = self._data[self._at :] + data
        else:
            self._data = bytes(data)
        self._at = 0

    @property
    def pending(self) -> int:
        """Bytes that were fed and not taken."""
        return len(self._data) - self._at

    def next(self) -> Message | None:
        """The next whole message, or None if more bytes are needed. ProtocolError for one that is too long."""
        at = self._at
        left = len(self._data) - at
        if left < HEADER_BYTES:
            return None
        kind, req_id, tx_id, length = SOCKMSG.unpack_from(self._data, at)
        if length > XENSTORE_PAYLOAD_MAX:
            raise ProtocolError(f"a message of {length} bytes: at most {XENSTORE_PAYLOAD_MAX} are allowed")
        end = at + HEADER_BYTES + length
        if left < HEADER_BYTES + length:
            return None
        self._at = end
        return Message(kind, req_id, tx_id, self._data[at + HEADER_BYTES : end])


def pack(kind: int, req_id: int, tx_id: int, body: bytes) -> bytes:
    """The bytes of one message."""
    assert len(body) <= XENSTORE_PAYLOAD_MAX, f"{len(body)} bytes of body"
    return SOCKMSG.pack(kind, req_id, tx_id, len(body)) + body


def strings(body: bytes) -> list[bytes]:
    """The NUL-terminated strings of a body; what follows the last NUL is left out, as in the daemon."""
    return body.split(b"\0")[:-1]


def join(*parts: str | bytes) -> bytes:
    """The body of a request of several strings, each with its NUL."""
    return b"".join((part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part) + b"\0" for part in parts)

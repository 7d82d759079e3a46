"""The outside of an Arrow IPC stream, read by hand before pyarrow sees it.

pyarrow would decompress a small body into any size, make a whole new dictionary of each of many deltas, and hand
extension types to whoever registered them in the process: Ray Data's may unpickle. So a stream is let through only if
it has none of these, and no more rows than allowed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.errors import ServiceError

_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3


def check_frames(raw: bytes, max_rows: int) -> None:
    """Raises ServiceError malformed_arrow: no stream; compression, deltas, extension types, over max_rows rows."""
    if raw.startswith(b"ARROW1"):
        raise malformed("it is a file (Feather); write the stream format instead")
    rows = 0
    try:
        for index, metadata in enumerate(_messages(raw)):
            message = _root(metadata)
            kind = message.unsigned(1, "B")
            header = message.table(2)
            if (kind == _SCHEMA) != (index == 0) or header is None:
                raise malformed("the first message must be the schema, and the only one")
            if kind == _SCHEMA and b"ARROW:extension" in metadata:
                raise malformed("extension types are not read: send plain columns")
            if kind == _DICTIONARY:
                if header.unsigned(2, "B"):
                    raise malformed("write whole dictionaries, not deltas")
                header = header.table(1)
            elif kind == _RECORDS:
                rows += header.unsigned(0, "Q")
            elif kind != _SCHEMA:
                raise malformed("it holds a message that is neither schema, dictionary nor records")
            if kind != _SCHEMA and (header is None or header.has(3)):
                raise malformed("write the stream without compression")
            if rows > max_rows:
                raise malformed(f"it has more than {max_rows} rows, see /v1/info")
    except (struct.error, IndexError):
        raise malformed("it is cut short or damaged") from None


def malformed(reason: str) -> ServiceError:
    return ServiceError("malformed_arrow", f"the body is not an Arrow IPC stream that can be read: {reason}")


def _messages(raw: bytes) -> Iterator[bytes]:
    """The metadata of each message; the bodies are skipped."""
    position = 0
    while position < len(raw):
        marker, size = struct.unpack_from("<Ii", raw, position)
        position += 8
        if marker != _CONTINUATION or size < 0 or position + size > len(raw):
            raise malformed("it is cut short or damaged")
        if size == 0:
            return
        metadata = raw[position : position + size]
        position += size + _root(metadata).unsigned(3, "Q")
        if position > len(raw):
            raise malformed("it is cut short or damaged")
        yield metadata


@dataclass(frozen=True)
class _Table:
    """A FlatBuffers table: fields are found by their slot, in the order of Arrow's Message.fbs."""

    data: bytes
    position: int

    def _field(self, slot: int) -> int | None:
        vtable = self.position - _unpack(self.data, "i", self.position)
        if 4 + 2 * slot >= _unpack(self.data, "H", vtable):
            return None
        offset = _unpack(self.data, "H", vtable + 4 + 2 * slot)
        return self.position + offset if offset else None

    def has(self, slot: int) -> bool:
        return self._field(slot) is not None

    def unsigned(self, slot: int, kind: str) -> int:
        """A number; 0 if it is absent. A negative one reads as a huge one, which no limit lets through."""
        place = self._field(slot)
        return 0 if place is None else _unpack(self.data, kind, place)

    def table(self, slot: int) -> _Table | None:
        place = self._field(slot)
        return None if place is None else _Table(self.data, place + _unpack(self.data, "I", place))


def _root(metadata: bytes) -> _Table:
    return _Table(metadata, _unpack(metadata, "I", 0))


def _unpack(data: bytes, kind: str, position: int) -> int:
    if position < 0:
        raise IndexError
    value: int = struct.unpack_from("<" + kind, data, position)[0]
    return value

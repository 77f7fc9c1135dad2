"""Goal: the stream of xenstore's messages: whole messages whatever pieces it comes in, and nothing but ProtocolError.
Method: hypothesis chooses messages, bytes and where the stream is cut; tables for lengths around the limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.wire import HEADER_BYTES, MESSAGE_MAX, Message, Parser, ProtocolError, join, pack, strings

U32 = st.integers(0, 2**32 - 1)
KINDS = st.one_of(st.sampled_from([int(kind) for kind in XsType]), U32)
BODIES = st.one_of(
    st.binary(max_size=40),
    st.integers(0, XENSTORE_PAYLOAD_MAX).map(bytes),
    st.sampled_from([b"", b"\0", b"x" * XENSTORE_PAYLOAD_MAX, SOCKMSG.pack(2, 1, 0, 5) + b"data\0"]),
)
MESSAGES = st.lists(st.builds(Message, KINDS, U32, U32, BODIES), max_size=8)
CUTS = st.lists(st.integers(0, 5000), max_size=40)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The stream in pieces that begin and end at `cuts`, which are taken round."""
    at = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def whole(parser: Parser) -> list[Message]:
    found = []
    while (message := parser.next()) is not None:
        found.append(message)
    return found


@given(MESSAGES, CUTS, st.booleans())
def test_any_pieces_give_the_same_messages(messages: list[Message], cuts: list[int], eager: bool) -> None:
    """Goal: pieces mean nothing.  Method: any cuts, taken after each piece or all at the end; every buffer type."""
    parser, found = Parser(), []
    kinds = (bytes, bytearray, memoryview)
    for number, piece in enumerate(pieces(b"".join(pack(*message) for message in messages), cuts)):
        buffer = bytearray(piece)
        parser.feed(kinds[number % 3](buffer))
        buffer[:] = bytes(len(buffer))  # it is the caller's again
        found += whole(parser) if eager else []
    assert found + whole(parser) == messages and parser.pending == 0 and parser.next() is None


@given(st.lists(st.binary(max_size=60), max_size=20), st.integers(0, 7))
def test_any_bytes(chunks: list[bytes], taken: int) -> None:
    """Goal: no bytes raise anything else, lose anything, or are kept after they were taken.
    Method: random pieces; the messages so far and what is pending make up the stream again."""
    parser, found, stream = Parser(), [], b"".join(chunks)
    try:
        for number, chunk in enumerate(chunks):
            parser.feed(chunk)
            if number % 8 != taken:
                found += whole(parser)
        found += whole(parser)
    except ProtocolError as error:
        at = sum(HEADER_BYTES + len(message.body) for message in found)
        assert SOCKMSG.unpack_from(stream, at)[3] > XENSTORE_PAYLOAD_MAX and "4096" in str(error)
    else:
        done = b"".join(pack(*message) for message in found)
        assert stream.startswith(done) and parser.pending == len(stream) - len(done)


@pytest.mark.parametrize("length", [XENSTORE_PAYLOAD_MAX + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_length_that_is_too_long(length: int) -> None:
    """Goal: it is an error as soon as the header is there, and again whenever one asks.  Method: byte by byte."""
    parser = Parser()
    for byte in pack(2, 1, 0, b"x\0") + SOCKMSG.pack(2, 2, 0, length)[:-1]:
        parser.feed(bytes([byte]))
        parser.next()
    assert parser.next() is None and parser.pending == HEADER_BYTES - 1
    parser.feed(b"\0" if length < 2**24 else bytes([length >> 24]))
    for _ in range(3):
        with pytest.raises(ProtocolError):
            parser.next()
        parser.feed(b"more")


@pytest.mark.parametrize("length", [0, 1, XENSTORE_PAYLOAD_MAX - 1, XENSTORE_PAYLOAD_MAX])
def test_lengths_that_are_legal(length: int) -> None:
    parser = Parser()
    data = pack(XsType.READ, 7, 9, b"z" * length)
    assert len(data) == HEADER_BYTES + length <= MESSAGE_MAX
    parser.feed(data[:-1])
    assert parser.next() is None
    parser.feed(data[-1:])
    assert parser.next() == Message(XsType.READ, 7, 9, b"z" * length)


def test_the_header_is_xs_wire_h_s() -> None:
    """Goal: struct xsd_sockmsg: four little-endian words.  Method: the bytes by hand."""
    data = bytes.fromhex("0b000000 04030201 ffffffff 05000000".replace(" ", "")) + b"/a\x001\0"
    assert pack(XsType.WRITE, 0x01020304, 0xFFFFFFFF, b"/a\x001\0") == data
    with pytest.raises(AssertionError):
        pack(XsType.WRITE, 1, 0, bytes(XENSTORE_PAYLOAD_MAX + 1))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", []),
        (b"a", []),
        (b"\0", [b""]),
        (b"a\0", [b"a"]),
        (b"a\0rest", [b"a"]),
        (b"a\0\0b\0", [b"a", b"", b"b"]),
        (b"\0\0", [b"", b""]),
    ],
)
def test_strings_of_a_body(body: bytes, expected: list[bytes]) -> None:
    """Goal: get_strings(): as many strings as there are NULs.  Method: a table."""
    assert strings(body) == expected and len(expected) == body.count(b"\0")


@given(st.lists(st.one_of(st.binary(max_size=9).map(lambda part: part.replace(b"\0", b"")), st.text("aä\udc80\udcff/"))))
def test_join_is_the_other_way_round(parts: list[str | bytes]) -> None:
    """Goal: what join() made, strings() gives back.  Method: bytes, and text as the store holds names that are no UTF-8."""
    plain = [part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts]
    assert strings(join(*parts)) == plain

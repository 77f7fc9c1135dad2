"""Goal: BytePipe, one direction of a console or xenstore ring: bytes in order, and nothing believed of the other end.
Method: two ends of one ring with indices around 0, 2**31 and 2**32, compared with a plain queue; and memory that another
processor changes between any two looks at it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenmodel.ring import U32, BytePipe
from xenmodel.types import PeerFault

STARTS = [0, 1, 1000, 2**31 - 3, 2**31, 2**32 - 1000, 2**32 - 1]
CONS, PROD = 1, 2  # words 0 and 3 are somebody else's
GUARD = 0x5A5A5A5A


def pipe(size: int = 1024, start: int = 0) -> BytePipe:
    words = memoryview(bytearray(16)).cast("I")
    words[0] = words[3] = GUARD
    words[CONS] = words[PROD] = start
    return BytePipe(memoryview(bytearray(size)), words, CONS, PROD)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", [1, 2, 16, 1024, 2048])
def test_bytes_come_out_as_they_went_in(size: int, start: int) -> None:
    """Goal: a queue of `size` bytes.  Method: random writes of every buffer type, and reads, against a bytearray."""
    random, ring, model, given_out = Random(size * 31 + start), pipe(size, start), bytearray(), 0
    data, words = ring.data, ring.words
    while given_out < 20 * size:
        piece = random.randbytes(random.randrange(2 * size + 2))
        taken = ring.write(random.choice((bytes, bytearray, memoryview))(piece))
        assert taken == min(len(piece), size - len(model))
        model += piece[:taken]
        assert ring.waiting() == len(model)
        if random.random() < 0.5:
            assert ring.read() == model
            given_out += len(model) + 1
            model.clear()
    assert ring.data is data and (words[0], words[3]) == (GUARD, GUARD)
    assert 0 <= words[CONS] <= words[PROD] <= U32 or words[PROD] < words[CONS]


@pytest.mark.parametrize("start", STARTS)
def test_full_and_empty(start: int) -> None:
    """Goal: the indices tell full from empty.  Method: fill to the brim, once round, and nothing more goes in or out."""
    ring = pipe(16, start)
    assert (ring.waiting(), ring.read(), ring.write(b"")) == (0, b"", 0)
    assert ring.write(bytes(range(20))) == 16
    assert (ring.waiting(), ring.write(b"x")) == (16, 0)
    assert ring.words[PROD] == (start + 16) & U32
    assert ring.read() == bytes(range(16)) and ring.words[CONS] == (start + 16) & U32
    assert ring.read() == b""


def test_reset_empties_it() -> None:
    ring = pipe(16, 77)
    ring.write(b"lost")
    ring.reset()
    assert (ring.words[CONS], ring.words[PROD], ring.read()) == (0, 0, b"")


USES: list[Callable[[BytePipe], object]] = [BytePipe.waiting, BytePipe.read, lambda ring: ring.write(b"data")]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("cons", "prod"), [(0, 1025), (1, 0), (0, U32), (2**31, 0), (1025, 0), (U32, 1024), (2**32 - 5, 1020)]
)
def test_indices_that_cannot_be(cons: int, prod: int, use: Callable[[BytePipe], object]) -> None:
    """Goal: more bytes than the ring has are a PeerFault, and nothing was touched.  Method: a table around the limits."""
    ring = pipe()
    ring.words[CONS], ring.words[PROD] = cons, prod
    with pytest.raises(PeerFault, match="1024"):
        use(ring)
    assert (ring.words[CONS], ring.words[PROD]) == (cons, prod) and not any(ring.data)


@pytest.mark.parametrize(("cons", "prod"), [(0, 1024), (2**32 - 1024, 0), (U32, 1023), (2**31 - 7, 2**31 + 1017)])
def test_indices_that_only_just_can(cons: int, prod: int) -> None:
    ring = pipe()
    ring.words[CONS], ring.words[PROD] = cons, prod
    assert (ring.waiting(), ring.write(b"x"), len(ring.read()), ring.waiting()) == (1024, 0, 1024, 0)


class Fickle:
    """Words that another processor changes all the time: each look gives the next value, and writes are only noted."""

    def __init__(self, values: list[int]) -> None:
        self.values = values
        self.looks: list[int] = []
        self.written: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        self.looks.append(index)
        return self.values[(len(self.looks) - 1) % len(self.values)]

    def __setitem__(self, index: int, value: int) -> None:
        self.written[index] = value


VALUES = st.lists(st.one_of(st.integers(0, U32), st.integers(0, 1100), st.integers(U32 - 1100, U32)), min_size=1, max_size=6)


@given(VALUES, st.binary(max_size=1100), st.booleans())
def test_indices_that_change_meanwhile(values: list[int], data: bytes, reading: bool) -> None:
    """Goal: each index is looked at once, so what was checked is what is used.  Method: any values, look by look."""
    words = Fickle(values)
    ring = BytePipe(memoryview(bytearray(1024)), words, CONS, PROD)  # type: ignore[arg-type]
    try:
        done = len(ring.read()) if reading else ring.write(data)
    except PeerFault:
        assert not words.written
    else:
        assert 0 <= done <= 1024 and len(words.written) == 1
        cons, prod = (dict(zip(words.looks, [*values * 2], strict=False))[index] for index in (CONS, PROD))
        waiting = (prod - cons) & U32
        assert done == (waiting if reading else min(len(data), 1024 - waiting))
        index, before = (CONS, cons) if reading else (PROD, prod)
        assert words.written == {index: (before + done) & U32}
    assert sorted(words.looks) == [CONS, PROD]

"""client.py: what drivers and the toolstack use of the store: text, numbers, retried transactions, callbacks.

Over one Connection, whose on_event it takes over. What lies in the store is the peer's to write, so reading
a number checks it. Text is UTF-8; bytes that are not survive a read and a write unchanged
(surrogateescape).
Errors are the connection's (XsError) unless a method says that something missing is fine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from xenmodel.types import PeerFault
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.perms import Perm

T = TypeVar("T")

_DIGITS_MAX = 20  # a uint64_t has as many; bounds the conversion


class Client:
    """One user of the store; watches have callbacks here instead of tokens."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._callbacks: dict[str, tuple[str, Callable[[str], None]]] = {}
        self._watches_made = 0
        connection.on_event = self._event

    def read(self, path: str, tx: int = 0) -> str | None:
        """The value, or None if there is no such node."""
        try:
            return self.connection.read(path, tx).decode("utf-8", "surrogateescape")
        except XsError as error:
            if error.errno is XsErrno.ENOENT:
                return None
            raise

    def read_int(self, path: str, default: int, tx: int = 0, *, minimum: int = 0, maximum: int = 2**32 - 1) -> int:
        """A decimal number, or `default` without such a node. Anything else is the fault of its writer."""
        text = self.read(path, tx)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
            raise PeerFault(f"{path} is {shown(text)}, not a number")
        value = int(text)
        if not minimum <= value <= maximum:
            raise PeerFault(f"{path} is {value}, outside {minimum}..{maximum}")
        return value

    def write(self, path: str, value: str | int, tx: int = 0) -> None:
        self.connection.write(path, str(value).encode("utf-8", "surrogateescape"), tx)

    def rm(self, path: str, tx: int = 0) -> None:
        """Make sure that the node is gone; that it, or even its parent, never was is fine."""
        try:
            self.connection.rm(path, tx)
        except XsError as error:
            if error.errno is not XsErrno.ENOENT:
                raise

    def directory(self, path: str, tx: int = 0) -> list[str]:
        """Names of the children; none if there is no such node."""
        try:
            return self.connection.directory(path, tx)
        except XsError as error:
            if error.errno is XsErrno.ENOENT:
                return []
            raise

    def exists(self, path: str, tx: int = 0) -> bool:
        return self.read(path, tx) is not None

    def set_perms(self, path: str, perms: Sequence[Perm], tx: int = 0) -> None:
        self.connection.set_perms(path, perms, tx)

    def transact(self, work: Callable[[int], T], attempts: int = 16) -> T:
        """Run `work(tx)` and commit; again from the start if somebody interfered, EAGAIN after the last.

        `work` may therefore run several times and must have no effect but through `tx`. If it raises,
        nothing is committed.
        """
        for _ in range(attempts):
            tx = self.connection.transaction_start()
            try:
                result = work(tx)
            except BaseException:
                self._abort(tx)
                raise
            try:
                self.connection.transaction_end(tx, True)
            except XsError as error:
                if error.errno is not XsErrno.EAGAIN:
                    raise
            else:
                return result
        raise XsError(XsErrno.EAGAIN, f"a transaction met conflicts {attempts} times")

    def watch(self, path: str, callback: Callable[[str], None]) -> str:
        """Call `callback(event_path)` for each event, the first of them soon. The result names the watch."""
        self._watches_made += 1
        token = f"w{self._watches_made}"
        self.connection.watch(path, token)
        self._callbacks[token] = (path, callback)
        return token

    def unwatch(self, token: str) -> None:
        """No callback after this. Fine on a closed connection: things are undone in any order."""
        if token not in self._callbacks:
            raise XsError(XsErrno.ENOENT, f"there is no watch {shown(token)}")
        path, _ = self._callbacks.pop(token)
        if not self.connection.closed:
            self.connection.unwatch(path, token)

    def close(self) -> None:
        self._callbacks.clear()
        self.connection.close()

    def _abort(self, tx: int) -> None:
        """The exception on its way out is the one to see, not that the transaction is gone already."""
        if tx in self.connection.transactions:
            self.connection.transaction_end(tx, False)

    def _event(self, path: str, token: str) -> None:
        watch = self._callbacks.get(token)
        if watch is not None:  # watches made on the connection directly have no callback
            watch[1](path)

"""The programs at the two ends of a transfer, for the host tests: bytes that follow a pattern, and a receiver that knows it.

    take ADDRESS PORT SIZE      listen, receive one connection, compare each byte with what belongs in its place
    send ADDRESS PORT SIZE      connect and send; says how many seconds it took until the receiver had it all
    hear KIND ADDRESS PORT N [INTERFACE]
                                receive N datagrams and say them, one JSON list; KIND: plain, group4, group6
A socket that makes no progress for STUCK_S seconds is a failure. Says what was wrong, and where.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
import struct
import sys
import time

PERIOD = (4 << 20) - 3  # odd, so that no page, segment or frame looks like its neighbour
PART = 1 << 20
STUCK_S = 30.0
SO_RCVBUFFORCE = 33  # Python does not know it


def pattern() -> bytes:
    return random.Random(PERIOD).randbytes(PERIOD)


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address.partition("%")[0]).version == 6 else socket.AF_INET


def where(address: str, port: int) -> tuple[object, ...]:
    kind = family(address)
    return tuple(socket.getaddrinfo(address, port, kind, socket.SOCK_STREAM)[0][4])


def take(address: str, port: int, size: int) -> str | None:
    """What is wrong, or None."""
    with socket.socket(family(address)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where(address, port))
        listener.listen(1)
        listener.settimeout(STUCK_S)
        print("listening", flush=True)
        wire, _ = listener.accept()
    twice = pattern() * 2
    buffer, done = bytearray(PART), 0
    with wire:
        wire.settimeout(STUCK_S)
        while got := wire.recv_into(buffer):
            place = done % PERIOD
            if buffer[:got] != twice[place : place + got]:
                bad = next(i for i in range(got) if buffer[i] != twice[place + i])
                return f"byte {done + bad} is wrong"
            done += got
        wire.sendall(struct.pack("<Q", done))
    return None if done == size else f"{done} bytes came, not {size}"


def send(address: str, port: int, size: int) -> str | None:
    file = os.memfd_create("pattern")
    os.write(file, pattern())
    with socket.socket(family(address)) as wire, os.fdopen(file, "rb") as source:
        wire.settimeout(STUCK_S)
        wire.connect(where(address, port))
        began, left = time.monotonic(), size
        while left:
            left -= wire.sendfile(source, 0, min(left, PERIOD))
        wire.shutdown(socket.SHUT_WR)
        (arrived,) = struct.unpack("<Q", wire.recv(8, socket.MSG_WAITALL) or bytes(8))
        if arrived != size:
            return f"{arrived} bytes have arrived of {size}"
        print(time.monotonic() - began)
    return None


def hear(kind: str, address: str, port: int, count: int, interface: str = "") -> None:
    group = ipaddress.ip_address(address).packed
    with socket.socket(family(address), socket.SOCK_DGRAM) as wire:
        wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        wire.bind(("", port) if kind != "plain" else (address, port))
        if kind == "group4":
            member = group + bytes(4) + struct.pack("=i", socket.if_nametoindex(interface))
            wire.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        elif kind == "group6":
            member = group + struct.pack("=i", socket.if_nametoindex(interface))
            wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
        wire.settimeout(STUCK_S)
        print("listening", flush=True)
        print(json.dumps([wire.recv(1 << 16).decode() for _ in range(count)]))


def main(what: str, *words: str) -> str | None:
    if what == "hear":
        kind, address, port, count, *interface = words
        hear(kind, address, int(port), int(count), *interface)
        return None
    address, port, size = words
    return {"take": take, "send": send}[what](address, int(port), int(size))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

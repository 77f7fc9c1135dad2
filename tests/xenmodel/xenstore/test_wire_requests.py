"""Goal: each message of the protocol is taken apart and answered as C xenstored does: 4.17, and 4.22 for what is newer.
Method: tables of scripts (wireworld.py): requests byte for byte from domain 0 and from a guest's ring; what is expected was
read from the daemon's do_*() functions. The store's rules have tests of their own; here it is about bodies and headers."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore.wireworld import World, run, text_of
from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.requests import HANDLERS, PRIVILEGED
from xenmodel.xenstore.wire import join

ONE_STRING = ("READ", "DIRECTORY", "GET_PERMS", "MKDIR", "RM")  # onearg(): exactly one NUL, and that at the end

SCRIPTS = {
    "one string with its NUL": "".join(
        f"""
        0 {kind} -> EINVAL
        0 {kind} | -> EINVAL
        0 {kind} /local -> EINVAL
        0 {kind} /local|x -> EINVAL
        0 {kind} /local|| -> EINVAL
        0 {kind} /local|/tool| -> EINVAL
        0 {kind} || -> EINVAL
        0 {kind} /loc\\xffal| -> EINVAL
        0 {kind} /local/| -> EINVAL
        0 {kind} //local| -> EINVAL
        0 {kind} . -> EINVAL
        1 {kind} -> EINVAL
        1 {kind} data -> EINVAL
        """
        for kind in ONE_STRING
    ),
    "READ gives the bytes and nothing else": """
        0 WRITE /a|x\\x00y\\xff
        0 READ /a| -> x|y\\xff
        0 WRITE /a|
        0 READ /a| -> ""
        0 READ /b| -> ENOENT
        1 READ /local/domain/2/data| -> EACCES
        1 READ data| -> ""
        0 READ data| -> ENOENT
    """,
    "WRITE: a path, and all that follows": """
        0 WRITE -> EINVAL
        0 WRITE /a -> EINVAL
        0 WRITE |value -> EINVAL
        0 WRITE /a|one|two|
        0 READ /a| -> one|two|
        0 WRITE /b/c|
        0 DIRECTORY /b| -> c|
        1 WRITE data/x|1
        1 WRITE name|1 -> EACCES
        1 WRITE @releaseDomain|1 -> EINVAL
        1 WRITE data/\\xff|1 -> EINVAL
    """,
    "MKDIR and RM": """
        0 MKDIR /m/n|
        0 MKDIR /m/n|
        0 DIRECTORY /m| -> n|
        0 RM /m/x|
        0 RM /m/x/y| -> ENOENT
        0 RM /m|
        0 DIRECTORY /m| -> ENOENT
        0 RM /| -> EINVAL
        1 RM data| -> OK|
        1 MKDIR other| -> EACCES
    """,
    "DIRECTORY": """
        0 MKDIR /d|
        0 DIRECTORY /d| -> ""
        0 MKDIR /d/b|
        0 MKDIR /d/a|
        0 DIRECTORY /d| -> b|a|
        0 DIRECTORY /| -> tool|local|d|
        1 DIRECTORY /| -> EACCES
        1 DIRECTORY @releaseDomain| -> EINVAL
    """,
    "GET_PERMS": """
        0 GET_PERMS /| -> n0|
        1 GET_PERMS data| -> n1|
        0 GET_PERMS /local/domain/1| -> n0|r1|
        0 GET_PERMS @releaseDomain| -> n0|
        0 GET_PERMS @introduceDomain| -> n0|
        1 GET_PERMS @releaseDomain| -> EACCES
        0 GET_PERMS @nothing| -> ENOENT
    """,
    "SET_PERMS: a path and at least one, and what follows the last NUL is nothing": """
        0 WRITE /p|1
        0 SET_PERMS -> EINVAL
        0 SET_PERMS /p -> EINVAL
        0 SET_PERMS /p| -> EINVAL
        0 SET_PERMS /p|n0 -> EINVAL
        0 SET_PERMS /p|| -> EINVAL
        0 SET_PERMS /p|n0|| -> EINVAL
        0 SET_PERMS /p|x0| -> EINVAL
        0 SET_PERMS /p|n| -> EINVAL
        0 SET_PERMS /p|0| -> EINVAL
        0 SET_PERMS /p|n0x| -> EINVAL
        0 SET_PERMS /p|rw0| -> EINVAL
        0 SET_PERMS /p|n0|r1|w2
        0 GET_PERMS /p| -> n0|r1|
        0 SET_PERMS /p|b2|r1|w1|n1|b0|
        0 GET_PERMS /p| -> b2|r1|w1|n1|b0|
        0 SET_PERMS /p|n9| -> ENOENT
        0 SET_PERMS /p|n0|r9|
        0 SET_PERMS /none|n0| -> ENOENT
        0 SET_PERMS @releaseDomain|n0|r1|
        1 GET_PERMS @releaseDomain| -> n0|r1|
        1 SET_PERMS @releaseDomain|n0| -> EACCES
        1 SET_PERMS data|n1|r2|
        1 SET_PERMS data|n0| -> EPERM
        1 SET_PERMS data|n1|r0|r2|r3|r4|
        1 SET_PERMS data|n1|r0|r2|r3|r4|r5| -> ENOSPC
        2 SET_PERMS /local/domain/1/data|n2| -> EACCES
    """,
    "WATCH: two strings, or three": """
        0 WATCH -> EINVAL
        0 WATCH /a -> EINVAL
        0 WATCH /a| -> EINVAL
        0 WATCH /a|t -> EINVAL
        0 WATCH |t| -> EINVAL
        0 WATCH /a/|t| -> EINVAL
        0 WATCH /a|t|-1| -> EINVAL
        0 WATCH /a|t|0|x| -> EINVAL
        0 WATCH /a|t|4294967295| -> EINVAL
        0 events -> none
        0 WATCH /a|t|what follows is nothing
        0 WATCH /a|t| -> EEXIST
        0 WATCH /a|t|1| -> EEXIST
        0 WATCH /a||
        0 WATCH @releaseDomain|t|
        0 WATCH @anything|t|
        0 events -> /a:t /a: @releaseDomain:t @anything:t
        1 WATCH data/x|\\xff\\x80|
        1 WATCH /local/domain/1/data/x|\\xff\\x80| -> EEXIST
        1 WATCH @releaseDomain|t|
    """,
    "WATCH: depth": """
        0 WATCH /a|zero|0|
        0 WATCH /a|one|1|
        0 WATCH /a|two| 2nonsense|
        0 WATCH /a|none||
        0 WATCH /a|all|
        0 events -> /a:zero /a:one /a:two /a:none /a:all
        0 WRITE /a|1
        0 events -> /a:zero /a:one /a:two /a:none /a:all
        0 WRITE /a/b|1
        0 events -> /a/b:one /a/b:two /a/b:all
        0 WRITE /a/b/c|1
        0 events -> /a/b/c:two /a/b/c:all
        0 WRITE /a/b/c/d|1
        0 events -> /a/b/c/d:all
        0 RM /a|
        0 events -> /a:zero /a:one /a:two /a:none /a:all
    """,
    "WATCH: paths of events are as the watch's": """
        1 WATCH data|rel|
        1 WATCH /local/domain/1/data|abs|
        1 events -> data:rel /local/domain/1/data:abs
        1 WRITE data/x|1
        1 events -> data/x:rel /local/domain/1/data/x:abs
        1b WATCH data|\\x09|
        1b events -> data:\\x09
    """,
    "UNWATCH": """
        1 WATCH data|t|
        1 UNWATCH -> EINVAL
        1 UNWATCH data|t -> EINVAL
        1 UNWATCH data|t|0| -> EINVAL
        1 UNWATCH data|u| -> ENOENT
        1 UNWATCH data/|t| -> ENOENT
        1b UNWATCH data|t| -> ENOENT
        1 UNWATCH /local/domain/1/data|t|rest
        1 UNWATCH data|t| -> ENOENT
    """,
    "WATCH and UNWATCH have no transaction": """
        0.77 WATCH /a|t|
        0.77 UNWATCH /a|t|
        0 TRANSACTION_START | -> $t
        0.$t WATCH /a|t|
        0.$t TRANSACTION_END F|
        0 events -> /a:t /a:t
        0.$t WATCH /b|t|
    """,
    "RESET_WATCHES takes whatever body": """
        1 WATCH data|t|
        1 TRANSACTION_START | -> $t
        1.$t RESET_WATCHES nonsense
        1.$t READ data| -> ENOENT
        1.$t RESET_WATCHES | -> ENOENT
        1 UNWATCH data|t| -> ENOENT
        1 RESET_WATCHES
    """,
    "TRANSACTION_START": """
        0 TRANSACTION_START -> $t
        0.$t TRANSACTION_START | -> EBUSY
        0.77 TRANSACTION_START | -> ENOENT
        0 TRANSACTION_START whatever -> $u
        0b.$t READ /| -> ENOENT
        1.$t READ data| -> ENOENT
        0.$t TRANSACTION_END T|
        0.$t READ /| -> ENOENT
        0.$u TRANSACTION_END T|
    """,
    "TRANSACTION_END": """
        0 TRANSACTION_START | -> $t
        0.$t TRANSACTION_END -> EINVAL
        0.$t TRANSACTION_END T -> EINVAL
        0.$t TRANSACTION_END | -> EINVAL
        0.$t TRANSACTION_END T|| -> EINVAL
        0.$t TRANSACTION_END t| -> EINVAL
        0.$t TRANSACTION_END TF| -> EINVAL
        0.$t TRANSACTION_END T|F| -> EINVAL
        0 TRANSACTION_END T| -> ENOENT
        0 TRANSACTION_END F| -> ENOENT
        0 TRANSACTION_END X| -> EINVAL
        0.77 TRANSACTION_END X| -> ENOENT
        0.$t WRITE /a|1
        0 READ /a| -> ENOENT
        0.$t TRANSACTION_END T|
        0.$t TRANSACTION_END T| -> ENOENT
        0 READ /a| -> 1
        0 TRANSACTION_START | -> $t
        0.$t WRITE /a|2
        0.$t TRANSACTION_END F|
        0 READ /a| -> 1
        0 TRANSACTION_START | -> $t
        0.$t READ /a| -> 1
        0b WRITE /a|3
        0.$t READ /a| -> 1
        0.$t TRANSACTION_END T| -> EAGAIN
        0.$t TRANSACTION_END T| -> ENOENT
    """,
    "a transaction that is nobody's": "".join(
        f"0.77 {kind} whatever -> ENOENT\n1.77 {kind} whatever -> {'EACCES' if XsType[kind] in PRIVILEGED else 'ENOENT'}\n"
        for kind in XsType.__members__
        if XsType[kind] in HANDLERS and kind not in ("WATCH", "UNWATCH")
    ),
    "GET_DOMAIN_PATH": """
        0 GET_DOMAIN_PATH -> EINVAL
        0 GET_DOMAIN_PATH 7 -> EINVAL
        0 GET_DOMAIN_PATH 7|8| -> EINVAL
        0 GET_DOMAIN_PATH 7| -> /local/domain/7|
        0 GET_DOMAIN_PATH | -> /local/domain/0|
        0 GET_DOMAIN_PATH  +007x| -> /local/domain/7|
        0 GET_DOMAIN_PATH x| -> /local/domain/0|
        0 GET_DOMAIN_PATH -1| -> /local/domain/4294967295|
        0 GET_DOMAIN_PATH 4294967303| -> /local/domain/7|
        1 GET_DOMAIN_PATH 2| -> /local/domain/2|
    """,
    "IS_DOMAIN_INTRODUCED": """
        0 IS_DOMAIN_INTRODUCED -> EINVAL
        0 IS_DOMAIN_INTRODUCED 1 -> EINVAL
        0 IS_DOMAIN_INTRODUCED 1|2| -> EINVAL
        0 IS_DOMAIN_INTRODUCED 0| -> T|
        0 IS_DOMAIN_INTRODUCED 1| -> T|
        0 IS_DOMAIN_INTRODUCED 3| -> F|
        0 IS_DOMAIN_INTRODUCED 32752| -> T|
        0 IS_DOMAIN_INTRODUCED 65535| -> F|
        0 IS_DOMAIN_INTRODUCED -1| -> F|
        create 3
        0 IS_DOMAIN_INTRODUCED 3| -> F|
        destroy 1
        0 IS_DOMAIN_INTRODUCED 1| -> F|
    """,
    "unknown types": """
        0 #15 /a|t| -> ENOSYS
        0 #16 ENOENT| -> ENOSYS
        0 #20 | -> ENOSYS
        0 #27 | -> ENOSYS
        0 #65535 | -> ENOSYS
        0 #4294967295 | -> ENOSYS
        0.77 #99 | -> ENOSYS
        1 #15 /a|t| -> ENOSYS
        1.77 #16 -> ENOSYS
        1 READ data| -> ""
    """,
    "what only domain 0 may ask": "".join(
        f"1 {XsType(kind).name} {body}-> EACCES\n1b {XsType(kind).name} {body}-> EACCES\n"
        for kind in PRIVILEGED
        for body in ("", "1| ", "1|1|1| ", "help| ")
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_requests(name: str) -> None:
    run(SCRIPTS[name])


def test_every_type_has_a_reply() -> None:
    """Goal: the table of handlers is the daemon's.  Method: which types it lists, and which of them a guest may not send."""
    unsent = {XsType.WATCH_EVENT, XsType.ERROR, XsType.INVALID}
    assert set(HANDLERS) == set(XsType) - unsent
    assert {XsType(kind).name for kind in PRIVILEGED} == {
        "CONTROL", "INTRODUCE", "RELEASE", "IS_DOMAIN_INTRODUCED", "RESUME", "SET_TARGET", "SET_FEATURE", "GET_QUOTA",
        "SET_QUOTA",
    }  # fmt: skip


@pytest.mark.parametrize("who", ["0", "1"])
def test_the_longest_bodies(who: str) -> None:
    """Goal: 4096 bytes of body are served and whole values come back.  Method: WRITE, READ, an unknown type, a long name."""
    world = World()
    home = "/d" if who == "0" else "data"
    value = bytes(range(256)) * 15
    value += bytes(XENSTORE_PAYLOAD_MAX - len(value) - len(home) - 3)
    reply = world.ask(who, XsType.WRITE, f"{home}/x".encode() + b"\0" + value)
    if who == "0":
        assert reply.body == b"OK\0" and world.ask(who, XsType.READ, join(f"{home}/x")).body == value
    else:
        assert reply.body == b"ENOSPC\0", "a node's size is limited for guests"
    assert world.ask(who, 99, bytes(XENSTORE_PAYLOAD_MAX)).body == b"ENOSYS\0"
    assert world.ask(who, XsType.READ, b"/" + b"x" * 4094 + b"\0").body == b"EINVAL\0"


def test_a_directory_of_more_than_a_message() -> None:
    """Goal: DIRECTORY answers E2BIG beyond 4096 bytes, and DIRECTORY_PART gives the names in pieces of whole ones.
    Method: a list of exactly 4096 bytes, then one more; pieces joined as libxenstore does, and any offset."""
    world = World()
    names = [*(f"name-{number:03d}" for number in range(454)), "nine-chrs"]  # 9 bytes each with the NUL, and 10
    for name in names:
        world.ask("0", XsType.MKDIR, join(f"/d/{name}"))
    whole = join(*names)
    assert len(whole) == XENSTORE_PAYLOAD_MAX and world.ask("0", XsType.DIRECTORY, join("/d")).body == whole
    world.ask("0", XsType.MKDIR, join("/d/x"))
    assert world.ask("0", XsType.DIRECTORY, join("/d")).body == b"E2BIG\0"
    whole += b"x\0"

    def part(offset: int) -> tuple[bytes, bytes]:
        reply = world.ask("0", XsType.DIRECTORY_PART, join("/d", str(offset)))
        assert reply.type == XsType.DIRECTORY_PART and len(reply.body) <= XENSTORE_PAYLOAD_MAX
        generation, _, rest = reply.body.partition(b"\0")
        return generation, rest

    found, generations = b"", set()
    while not found.endswith(b"\0\0"):
        generation, rest = part(len(found))
        found += rest
        generations.add(generation)
    assert found == whole + b"\0" and len(generations) == 1
    assert 4096 - 10 - len(*generations) - 2 < len(part(0)[1]) < 4096, "as many names as fit"
    assert part(4096)[1] == b"x\0\0" and part(3)[1].startswith(b"e-000\0"), "offsets within a name are taken as they are"
    assert {part(offset)[1] for offset in (4098, 4099, 100_000, -1, 2**32 - 1)} == {b"\0"}
    world.ask("0", XsType.RM, join("/d/x"))
    assert world.ask("0", XsType.DIRECTORY, join("/d")).body == whole[:-2]
    assert part(0)[0] not in generations


def test_directory_part_bodies() -> None:
    """Goal: DIRECTORY_PART has exactly two strings, the second a number as atoi() reads it.  Method: a script."""
    world = run("""
        0 MKDIR /d/a|
        0 MKDIR /d/bb|
        0 DIRECTORY_PART -> EINVAL
        0 DIRECTORY_PART /d| -> EINVAL
        0 DIRECTORY_PART /d|0 -> EINVAL
        0 DIRECTORY_PART /d|0|0| -> EINVAL
        0 DIRECTORY_PART /none|0| -> ENOENT
        1 DIRECTORY_PART /local|0| -> EACCES
    """)
    for offset, expected in (("0", "a|bb||"), ("x", "a|bb||"), ("", "a|bb||"), (" 2y", "bb||"), ("5", "|"), ("99", "|")):
        body = world.ask("0", XsType.DIRECTORY_PART, join("/d", offset)).body
        assert text_of(body.partition(b"\0")[2]) == expected, offset


def test_headers_come_back() -> None:
    """Goal: req_id and tx_id are the request's, also in errors.  Method: extreme numbers; the bytes of the header."""
    world = World()
    client = world.stream("0")
    client.log.clear()
    for req_id in (0, 1, 2**31, 2**32 - 1):
        client.send(SOCKMSG.pack(XsType.READ, req_id, 2**32 - 1, 6) + b"/tool\0")
        client.send(SOCKMSG.pack(XsType.READ, req_id, 0, 6) + b"/tool\0")
    assert [message[:3] for message in client.log] == [
        (kind, req_id, tx)
        for req_id in (0, 1, 2**31, 2**32 - 1)
        for kind, tx in ((XsType.ERROR, 2**32 - 1), (XsType.READ, 0))
    ]

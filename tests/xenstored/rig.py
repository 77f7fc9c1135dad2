"""rig.py: two stores side by side, Debian's and ours: every request goes to both, and all they say must be the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from bench.realstore import STORE_PORT, RealXenstored, WireClient
from tests.xenstored.ours import OurStore
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, join, strings

Tx = tuple[int, int]
NO_TX = (0, 0)


class Twins:
    def __init__(self, real: RealXenstored, ours: OurStore) -> None:
        self.real, self.ours = real, ours
        self.stores = (real, ours)
        self.clients: dict[str, tuple[WireClient, WireClient]] = {}
        self.names: dict[str, None] = {}
        self.requests = 0
        self.events = 0
        self.history: list[str] = []
        self.generations: dict[object, tuple[bytes, bytes]] = {}
        self.dead: set[int] = set()
        self.open("a")
        self.open("b")
        self.clients["0"] = (WireClient(real.rings[0]), WireClient(ours.rings[0]))

    def open(self, name: str) -> None:
        self.clients[name] = (WireClient(self.real.socket), self.ours.client())

    def close(self, name: str) -> None:
        for client in self.clients.pop(name):
            client.stream.close()
        self.history.append(f"{name} closes")
        time.sleep(0.002)
        self.compare("a", 0)

    # ---
    def create(self, domid: int) -> None:
        self.history.append(f"create {domid}")
        self.real.create_domain(domid)
        self.ours.create_domain(domid)

    def introduce(self, domid: int) -> None:
        self.ask("a", XsType.INTRODUCE, join(str(domid), "1", "1"))

    def fresh(self, domid: int) -> None:
        self.clients[str(domid)] = (WireClient(self.real.rings[domid]), WireClient(self.ours.rings[domid]))

    def quota(self, name, value):
        self.history.append(f"quota {name} {value}")
        d={"watches":-1,"transactions":-1,"node-size":25}.get(name,0)
        p=[]
        for i,v in enumerate((value+d,value)):
            c=self.clients["a"][i]
            r=c.request(XsType.CONTROL, join("quota","set",name,str(v)))
            assert r.body==b"OK\0", (i,r,name,v)
            c.log.clear()
    def shutdown(self, domid: int) -> None:
        self.history.append(f"shutdown {domid}")
        for store in self.stores:
            store.shutdown_domain(domid)
        self.compare("a", 0)

    def destroy(self, domid: int) -> None:
        self.history.append(f"destroy {domid}")
        self.dead.add(domid)
        self.clients.pop(str(domid), None)
        for store in self.stores:
            store.destroy_domain(domid)
        self.compare("a", 0)
        self.ask("a", XsType.WRITE, join("/tool"))

    def ask(self, who: str, kind: int, body: bytes, tx: Tx = NO_TX) -> tuple[Message, Message]:
        self.history.append(f"{who} {XsType(kind).name if kind in list(XsType) else kind} {body[:100]!r} tx {tx}")
        posted = [c.post(kind, body, t) for c, t in zip(self.clients[who], tx, strict=True)]
        self.requests += 1
        if kind in (XsType.INTRODUCE, XsType.RELEASE):
            # may concern other rings
            for c, p in zip(self.clients[who], posted, strict=True):
                while c.next().req_id != p: pass
            reply = self.clients[who][0].log[-1]
            if reply.body == b"OK\0":
                import re
                domid = int(re.match(rb"\s*([+-]?\d+)", body)[1])
                self.clients.pop(str(domid), None)
                if kind==XsType.RELEASE:
                    self.dead.add(domid); self.compare(who, kind); self.ask(who, XsType.WRITE, join("/tool")); return None
                if kind == XsType.INTRODUCE:
                    self.fresh(domid)
        logs = self.compare(who, kind)
        if not logs: return None
        return tuple(next(m for m in log if m.req_id == p) for log, p in zip(logs, posted))

    def compare(self, who, kind):
        logs = [self.sync(i, who) for i in (0, 1)]
        for name in logs[0]:
            a, b = ([self.normal(m) for m in log[name]] for log in logs)
            self.events += sum(m.type == XsType.WATCH_EVENT for m in a)
            if not self.equal(a, b):
                raise AssertionError(f"{self.history[-1]}\n  on {name}: real {a}\n  on {name}: ours {b}")
        if who in logs[0]:
            return logs[0][who], logs[1][who]

    def normal(self, m):
        return m

    def equal(self, a, b):
        def uniq(l):
            out=[]
            for m in l:
                if m.type==15 and m in out: continue
                out.append(m)
            return out
        a,b=uniq(a),uniq(b)
        if "destroy" in self.history[-1] or "RELEASE" in self.history[-1]:
            a=sorted(a,key=repr); b=sorted(b,key=repr)
        if len(a) != len(b): return False
        for x, y in zip(a, b):
            if x._replace(tx_id=0) == y._replace(tx_id=0): continue
            if (x.type, x.req_id) == (y.type, y.req_id):
                if x.type == XsType.TRANSACTION_START: continue
                if x.type == XsType.DIRECTORY_PART and x.body.split(b"\0", 1)[1] == y.body.split(b"\0", 1)[1]: continue
                if x.type == XsType.GET_PERMS:
                    p, q = strings(x.body), strings(y.body)
                    dead = {str(d).encode() for d in self.dead} | {b"9", b"8"}
                    if p[0] == q[0] and [e for e in p[1:] if e[1:] not in dead] == [e for e in q[1:] if e[1:] not in dead]: continue
            if (x.type, x.req_id)==(y.type, y.req_id) and x.type==16 and {x.body,y.body} == {b"E2BIG\0", b"ENOSPC\0"}: continue
            return False
        return True

    def sync(self, i, who):
        names = [who] if who in self.clients else []
        logs = {}
        for name in names: logs[name] = self.barrier(i, name, self.clients[name][i].post(XsType.GET_DOMAIN_PATH, b"0\0"))
        rest = [(n, self.clients[n][i].post(XsType.GET_DOMAIN_PATH, b"0\0")) for n in self.clients if n != who]
        for name, p in rest:
            logs[name] = self.barrier(i, name, p)
        return logs

    def barrier(self, i, name, p):
        client = self.clients[name][i]
        while client.next().req_id != p: pass
        log = client.log[:-1]
        client.log.clear()
        return log


@contextlib.contextmanager
def twins(directory: Path) -> Iterator[Twins]:
    ours = OurStore()
    try:
        with RealXenstored(directory) as real:
            yield Twins(real, ours)
    finally:
        ours.close()

"""Goal: the README's program of one's own works as it is printed there.
Method: cut it out, with the shell function around it, and run both ends in two guests."""

from __future__ import annotations

import re

from tests.host.devxen import served
from tests.host.served import REPOSITORY, Host


def test_a_program_of_your_own(host: Host):
    """Goal: one program hears what the other one's notify says, and is in the table meanwhile.
    Method: the lines of the README, in the order of the tour; what they print is what is printed there."""
    text = (REPOSITORY / "README.md").read_text()
    found = re.search(r"^\$ cat > hello\.py <<END\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\$ (IN=.*|as\(\).*)$", text, re.MULTILINE)
    assert found is not None and len(lines) == 2
    (host.root / "hello.py").write_text(found[1])
    with served(host) as xen:
        assert xen.served.mnt.name == "mnt", "as in the README"
        start = "\n".join([f"cd {xen.served.mnt.parent}", *lines])

        def run(words: str) -> list[str]:
            return ["bash", "-c", f"{start}\n{words}"]

        assert host.check(*run("as 1 xenstore-read domid")) == "1\n"
        listener = host.client(*run(f"as 1 python3 {host.root}/hello.py listen"))
        assert listener.stdout is not None
        said = listener.stdout.readline().split()
        assert said[:1] == ["port"]
        table = host.check("cat", xen.path(1, "inspect/evtchn")).splitlines()[-1].split()
        assert table[:3] == [said[1], "unbound", "2:-"] and table[-1].startswith("python3[")
        host.check(*run(f"as 2 python3 {host.root}/hello.py notify {said[1]}"))
        assert host.finish(listener).stdout == f"event on port {said[1]}\n"

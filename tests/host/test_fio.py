"""Goal: data that was written in any block size, in any order and with many requests at once reads back.
Method: fio with checksums in every block (verify=crc32c), buffered and direct, small sizes."""

from __future__ import annotations

import json

import pytest

from tests.host.served import MIB

pytestmark = pytest.mark.host

SIZES = ["bs=512", "bs=4k", "bs=64k", "bs=1m", "bsrange=512-256k"]


@pytest.mark.parametrize("engine", ["psync", "io_uring"])
@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_verify(host, size, direct, engine):
    """Goal: no block is lost, torn or exchanged.  Method: random writes, then reads that check each block's checksum."""
    server = host.disk(16 * MIB)
    total = {"bs=512": 1, "bs=4k": 4}.get(size, 16)
    output = host.check(
        "fio", "--name=verify", f"--filename={server.disk()}", f"--{size}", f"--size={total}m", f"--direct={direct}",
        f"--ioengine={engine}", "--iodepth=16", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--randseed=7", "--allow_file_create=0", "--output-format=json",
    )  # fmt: skip
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] == job["read"]["io_bytes"] == total * MIB
    server.stop()


def test_mixed_jobs(host):
    """Goal: several processes in one disk do not disturb one another.
    Method: four fio jobs at once, each in its own quarter, with different sizes, directness and mixtures."""
    server = host.disk(32 * MIB)
    jobs = []
    for i, (size, direct) in enumerate([("4k", 1), ("3k", 0), ("512-64k", 1), ("1m", 1)]):
        block = f"--bsrange={size}" if "-" in size else f"--bs={size}"
        jobs += [
            f"--name=job{i}", f"--filename={server.disk()}", f"--offset={i * 8}m", "--size=4m", block, f"--direct={direct}",
            "--ioengine=io_uring", "--iodepth=8", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--fsync=64",
            f"--randseed={i}", "--allow_file_create=0",
        ]  # fmt: skip
    host.check("fio", *jobs, timeout_s=120)
    server.stop()

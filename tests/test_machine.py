"""Cores are counted by affinity and by the CPU time that control groups allow."""

import os

import pytest

from hlm import machine


def system(tmp_path, monkeypatch, groups, mounts, files):
    """/proc/self and control groups, under `tmp_path`."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = [
        f"3{n} 23 0:{n} {root} {tmp_path}/{where} rw,relatime - {kind} none {options}"
        for n, (root, where, kind, options) in enumerate(mounts)
    ]
    (tmp_path / "mountinfo").write_text(
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n" + "".join(f"{x}\n" for x in lines)
    )
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


V2 = [("/", "fs", "cgroup2", "rw")]
V1 = [("/", "fs/cpu", "cgroup", "rw,cpu,cpuacct"), ("/", "fs/memory", "cgroup", "rw,memory")]


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota", "cores"),
    [
        (["0::/"], V2, {}, None, 8), (["0::/"], V2, {"fs/cpu.max": "max 100000\n"}, None, 8),
        (["0::/"], V2, {"fs/cpu.max": "200000 100000\n"}, 2.0, 2),  # a container with a name space of its own
        (["0::/a/b"], V2, {"fs/a/b/cpu.max": "100000 100000"}, 1.0, 1),
        (["0::/a/b"], V2, {"fs/a/cpu.max": "150000 100000", "fs/a/b/cpu.max": "max 100000"}, 1.5, 1),  # the one above
        (["0::/a/b"], V2, {"fs/a/cpu.max": "400000 100000", "fs/a/b/cpu.max": "350000 100000"}, 3.5, 3),
        (["0::/a"], V2, {"fs/a/cpu.max": "50000 100000"}, 0.5, 1),
        (["0::/a"], V2, {"fs/a/cpu.max": "6400000 100000"}, 64.0, 8),
        (["0::/a"], V2, {"fs/a/cpu.max": "nonsense"}, None, 8), (["nonsense"], V2, {}, None, 8),
        (["4:cpu,cpuacct:/k", "3:memory:/k", "0::/"], [*V1, ("/", "fs/unified", "cgroup2", "rw")],
         {"fs/cpu/k/cpu.cfs_quota_us": "300000\n", "fs/cpu/k/cpu.cfs_period_us": "100000\n"}, 3.0, 3),
        (["4:cpu,cpuacct:/k"], V1,
         {"fs/cpu/k/cpu.cfs_quota_us": "-1\n", "fs/cpu/k/cpu.cfs_period_us": "100000\n"}, None, 8),
        (["4:cpu,cpuacct:/docker/f00"], [("/docker/f00", "fs/cpu", "cgroup", "rw,cpu,cpuacct")],
         {"fs/cpu/cpu.cfs_quota_us": "200000", "fs/cpu/cpu.cfs_period_us": "100000"}, 2.0, 2),
        (["0::/../other"], V2, {"fs/cpu.max": "200000 100000"}, 2.0, 2),
        (["0::/my pod"], [("/", "f s".replace(" ", "\\040"), "cgroup2", "rw")],
         {"f s/my pod/cpu.max": "200000 100000"}, 2.0, 2),
    ],
)  # fmt: skip
def test_cores_by_quota(groups, mounts, files, quota, cores, tmp_path, monkeypatch):
    system(tmp_path, monkeypatch, groups, mounts, files)
    assert machine.cpu_quota() == quota and machine.cores() == cores


def test_without_control_groups_and_without_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert machine.cpu_quota() is None and machine.cores() == 2
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    assert machine.cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "limit_mib"),
    [
        (["0::/"], V2, {}, None),
        (["0::/a/b"], V2, {"fs/a/memory.max": "1073741824\n", "fs/a/b/memory.max": "max\n"}, 1024),  # the one above
        (["0::/a"], V2, {"fs/a/memory.max": str(2**62)}, None),  # more than there is
        (["3:memory:/k"], V1, {"fs/memory/k/memory.limit_in_bytes": "536870912\n"}, 512),
        (["3:memory:/k"], V1, {"fs/memory/k/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        (["4:cpu,cpuacct:/k"], V1, {"fs/cpu/k/memory.max": "536870912"}, None),
    ],
)
def test_memory_by_limit(groups, mounts, files, limit_mib, tmp_path, monkeypatch):
    system(tmp_path, monkeypatch, groups, mounts, files)
    assert machine.memory_limit_mib() == limit_mib

"""What the kernel says, on machines laid out as files: containers, old kernels, limits, pressure."""

from __future__ import annotations

from pathlib import Path

import pytest

from moei_core.hardware.disks import read_disk
from moei_core.hardware.memory import available_memory
from moei_core.hardware.system import read_cpu, read_memory, read_pressure
from tests.hardware.fakes import GIB, MEMINFO, lay_out


def test_a_bare_machine(tmp_path: Path) -> None:
    facts = read_memory(lay_out(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (facts.total, facts.available) == (16384000 << 10, 8192000 << 10)
    assert (facts.swap_total, facts.swap_free) == (4096000 << 10, 4000000 << 10)
    assert facts.cgroup is None
    assert facts.usable == facts.available


def test_a_kernel_without_available(tmp_path: Path) -> None:
    text = "".join(line for line in MEMINFO.splitlines(keepends=True) if "Available" not in line)
    assert read_memory(lay_out(tmp_path, {"proc/meminfo": text})).available == (2048000 + 1024000) << 10


def test_nothing_can_be_read(tmp_path: Path) -> None:
    assert read_memory(tmp_path).usable == 0
    assert read_pressure(tmp_path).stall is None
    assert read_cpu(tmp_path).cores == 1


V2 = "sys/fs/cgroup/app/job"


@pytest.mark.parametrize("line", ["0::/app/job\n", "1:name=systemd:/x\n0::/app/job\n"])
def test_a_version_2_limit_gives_back_file_pages(tmp_path: Path, line: str) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": line,
            f"{V2}/memory.max": f"{4 * GIB}\n",
            f"{V2}/memory.current": f"{3 * GIB}\n",
            f"{V2}/memory.stat": f"anon 1\ninactive_file {1 * GIB}\nactive_file 7\n",
        },
    )
    group = read_memory(root).cgroup
    assert group is not None
    assert (group.version, group.path, group.limit, group.used) == (2, f"/{V2}", 4 * GIB, 2 * GIB)
    assert read_memory(root).usable == 2 * GIB
    assert "v2" in read_memory(root).reason


def test_a_group_above_may_be_the_tighter_one(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/app/job\n",
            f"{V2}/memory.max": "max\n",
            f"{V2}/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/app/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/app/memory.current": f"{GIB}\n",
        },
    )
    assert read_memory(root).usable == GIB


@pytest.mark.parametrize("path", ["/", "/docker/0123abc"])
def test_a_container_of_version_1(tmp_path: Path, path: str) -> None:
    """Inside, the group is the top folder, whatever the host calls it."""
    top = "sys/fs/cgroup/memory"
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": f"9:memory:{path}\n4:cpu,cpuacct:{path}\n0::/\n",
            f"{top}/memory.limit_in_bytes": f"{GIB}\n",
            f"{top}/memory.usage_in_bytes": f"{GIB // 2}\n",
            f"{top}/memory.stat": f"cache 5\ntotal_inactive_file {GIB // 4}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    facts = read_memory(root)
    assert facts.cgroup is not None
    assert facts.cgroup.version == 1
    assert facts.usable == 3 * GIB // 4
    assert read_cpu(root).quota == 1.5


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
        },
    )
    assert read_memory(root).cgroup is None


def test_processors_of_version_2(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/cpuinfo": "".join(
                f"processor : {n}\nmodel name : A Chip\nflags : fpu avx2 avx512f\n\n" for n in range(4)
            ),
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
        },
    )
    cpu = read_cpu(root)
    assert (cpu.model, cpu.cores, cpu.quota, cpu.features) == ("A Chip", 4, 0.5, ("avx2", "avx512f"))
    (root / "sys/fs/cgroup/job/cpu.max").write_text("max 100000\n")
    assert read_cpu(root).quota is None


def test_pressure_of_the_group_comes_before_the_machines(tmp_path: Path) -> None:
    stat = "12 (a (strange) name) S " + " ".join(str(n) for n in range(100, 140))
    root = lay_out(
        tmp_path,
        {
            "proc/self/stat": stat,
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.current": "1\n",
            "proc/pressure/memory": "some avg10=1.50 avg60=0 avg300=0 total=1\nfull avg10=9 avg60=0 total=1\n",
        },
    )
    assert read_pressure(root).stall == pytest.approx(0.015)
    # man 5 proc: field 12 is majflt; state is field 3 and the first number here field 4.
    assert read_pressure(root).major_faults == 108
    lay_out(root, {"sys/fs/cgroup/job/memory.pressure": "some avg10=40.00 avg60=0 avg300=0 total=1\n"})
    assert read_pressure(root).stall == pytest.approx(0.4)


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory() <= read_memory().total


MOUNTS = """22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / {root}/ram rw - tmpfs tmpfs rw,size=1g
31 22 259:1 / {root}/a\\040disk rw,noatime shared:1 - xfs /dev/nvme0n1p1 rw
32 22 0:50 / {root}/net ro - nfs4 server:/models ro
33 22 8:1 / {root}/a\\040disk/inner ro,noatime - ext4 /dev/sda1 ro
"""


def test_the_disk_under_a_folder(tmp_path: Path) -> None:
    machine = lay_out(
        tmp_path / "machine",
        {
            "proc/self/mountinfo": MOUNTS.format(root=tmp_path),
            "sys/devices/nvme/nvme0n1/queue/rotational": "0\n",
            "sys/devices/nvme/nvme0n1/device/model": "Fast Disk\n",
            "sys/devices/nvme/nvme0n1/nvme0n1p1/partition": "1\n",
        },
    )
    (machine / "sys/dev/block").mkdir(parents=True)
    (machine / "sys/dev/block/259:1").symlink_to(machine / "sys/devices/nvme/nvme0n1/nvme0n1p1")
    for name in ("ram", "a disk/inner", "net"):
        (tmp_path / name).mkdir(parents=True)
    disk = read_disk(tmp_path / "a disk" / "not" / "there", machine)
    assert (disk.mount, disk.file_system, disk.number) == (f"{tmp_path}/a disk", "xfs", "259:1")
    assert (disk.rotational, disk.model, disk.read_only) == (False, "Fast Disk", False)
    assert read_disk(tmp_path / "a disk/inner", machine).read_only
    assert read_disk(tmp_path / "ram", machine).in_memory
    assert read_disk(tmp_path / "net", machine).file_system == "nfs4"
    # A name that only begins like a mount point is elsewhere.
    (tmp_path / "ram2").mkdir()
    assert read_disk(tmp_path / "ram2", machine).mount == "/"

"""Devices, profiles and the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_ctxopt import ConfigError
from hf_ctxopt.planner import hardware, profiles
from hf_ctxopt.planner.hardware import Device, best_device, bytes_of, copy_bandwidth, device_of, devices
from hf_ctxopt.planner.memory import host_memory

GIB = 1 << 30


def test_the_cpu_is_always_there() -> None:
    found = devices()
    assert found[-1].device == "cpu"
    assert 0 < found[-1].free <= found[-1].total
    one, other = device_of("cpu"), device_of(torch.device("cpu"))
    assert (one.device, one.name, one.total) == (other.device, other.name, other.total)  # what is free may change
    if not torch.cuda.is_available():
        assert not best_device().accelerator
    with pytest.raises(ConfigError, match="cpu"):
        device_of("cuda:99")


def test_bandwidth_is_measured_on_request() -> None:
    assert copy_bandwidth("cpu", seconds=0.01) > 1e8


def test_others_are_neither_free_nor_ours() -> None:
    there = Device(device="cuda:0", name="x", total=8 * GIB, free=3 * GIB, own=2 * GIB, context=GIB)
    assert there.others == 2 * GIB
    assert hardware.from_profile(profiles.profile("t4")).others == 0


@pytest.mark.parametrize(
    ("name", "gib", "gbs"),
    [("rtx4070-laptop", 8, 256), ("rtx4070", 12, 504), ("rtx4060ti-16gb", 16, 288), ("rtx3090", 24, 936),
     ("rtx4090", 24, 1008), ("t4", 16, 320), ("h100", 80, 3350)],
)  # fmt: skip
def test_profiles(name: str, gib: int, gbs: int) -> None:
    card = profiles.profile(name)
    assert (card.vram, card.bandwidth) == (gib * GIB, gbs * 1e9)
    assert profiles.profile(name.upper().replace("-", " ")) is card
    with pytest.raises(ConfigError, match="rtx4070-laptop"):
        profiles.profile("geforce 256")


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx4070-laptop"),
        ("NVIDIA GeForce RTX 4070", "rtx4070"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Quadro 9999", None),
    ],
)
def test_a_driver_s_name_finds_its_profile(driver: str, name: str | None) -> None:
    found = profiles.recognized(driver)
    assert (None if found is None else found.name) == name


def test_a_size_alone_stands_for_the_slowest_card_of_it() -> None:
    assert profiles.of_size(8 * GIB).name == "rtx4070-laptop"
    assert hardware.of_memory(16 * GIB).bandwidth == 288e9


def test_bytes() -> None:
    assert bytes_of("vram", "8GiB") == 8 * GIB
    assert bytes_of("vram", "8 GB") == 8 * 10**9
    assert bytes_of("vram", 5) == bytes_of("vram", "5") == 5
    for bad in ("", "8G", "-8", "9" * 5000, "-1GiB", 0, "0", True, 1.5):
        with pytest.raises(ConfigError, match="vram"):
            bytes_of("vram", bad)  # type: ignore[arg-type]


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"


def test_without_a_group_the_machine_s_memory_counts(tmp_path: Path) -> None:
    _write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert host_memory(tmp_path) == (16 * GIB, 8 * GIB)


def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    _write(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/outer/inner\n",
        f"{base}/outer/memory.max": f"{4 * GIB}\n", f"{base}/outer/memory.current": f"{3 * GIB}\n",
        f"{base}/outer/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        f"{base}/outer/inner/memory.max": "max\n", f"{base}/outer/inner/memory.current": "1\n",
    })  # fmt: skip
    assert host_memory(tmp_path) == (4 * GIB, 2 * GIB)  # a GiB of the three is the file cache's


def test_groups_of_the_first_kind(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/job"
    _write(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "3:cpu:/job\n2:memory:/job\n",
        f"{base}/memory.limit_in_bytes": f"{2 * GIB}\n", f"{base}/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert host_memory(tmp_path) == (2 * GIB, GIB)

"""The host's memory that this process may use: of the machine, or less where a cgroup limits it."""

from __future__ import annotations

import os
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes a number beyond any memory where there is no limit


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory in all and free, within the limits of every cgroup that this process is in.

    Args:
        root: where `proc` and `sys` are; another folder only in tests.
    """
    total, free = _machine(root)
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, min(total, free)


def _machine(root: Path) -> tuple[int, int]:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return _without_proc()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    total = sizes.get("MemTotal", 0)
    return total, sizes.get("MemAvailable", total)


def _without_proc() -> tuple[int, int]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows has no sysconf
        return 0, 0
    return total, total


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes used less the file cache) of the process's memory cgroup and of all above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = base / path.strip("/")
        for folder in [place, *place.parents]:
            if not folder.is_relative_to(base):
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and limit < _UNLIMITED:
                found.append((limit, max(0, (used or 0) - _file_cache(folder))))
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _file_cache(folder: Path) -> int:
    """Bytes of cached files, which go when memory is needed."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(sizes.get("total_inactive_file") or sizes.get("inactive_file") or 0)

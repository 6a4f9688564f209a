"""Checksums of a folder's files, in a file beside them."""

from __future__ import annotations

import zlib
from pathlib import Path

CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, list[int]]:
    """File below the folder -> [size, CRC-32]; not of what orbax writes last, a small JSON that it checks itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in files}
    return {
        name: [path.stat().st_size, _crc32(path)]
        for name, path in names.items()
        if name not in (CHECKSUMS, "_CHECKPOINT_METADATA")
    }


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def wrong_files(folder: Path, saved: dict[str, list[int]]) -> list[str]:
    """What is wrong with the files of which `saved` has the checksums."""
    wrong = []
    for name, (size, crc) in saved.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif _crc32(path) != crc:
            wrong.append(f"{name} has other bytes than were written")
    return wrong

"""Disk images after a power cut, computed from a record of a process's disk operations.

Synced data is kept. Unsynced data is kept in part: each sector has any of its contents since the sync, the
newest possibly torn; each file has any of its lengths; each folder has any of the files created or deleted
in it. ``preload/recorder.c`` writes the record.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

_HEAD = struct.Struct("=qqqq")
SECTORS = (512, 4096)
KEPT_SHARES = (0.0, 0.1, 0.5, 0.9, 0.99)
"""Fractions of unsynced sectors that reached the disk; one is chosen for each image."""


class Kind(IntEnum):
    """Kinds of disk operations; the numbers are those of recorder.c."""

    CREATED = 1
    OPENED = 2
    WRITTEN = 3
    TRUNCATED = 4
    SYNCED = 5
    DELETED = 6
    RENAMED = 7


@dataclass(frozen=True, slots=True)
class DiskOp:
    """One recorded disk operation."""

    kind: Kind
    file: int
    """The inode."""
    offset: int
    """The offset of a write, or the new length of a truncation."""
    data: bytes
    """The written data, or the path."""


def read_record(path: Path) -> list[DiskOp]:
    """All operations, in order."""
    content = path.read_bytes()
    ops, at = [], 0
    while at < len(content):
        number, file, offset, length = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        kind = Kind(number)
        if kind is Kind.RENAMED:
            raise ValueError("the record holds a rename, which is not modelled")
        ops.append(DiskOp(kind, file, offset, content[at : at + length]))
        at += length
    return ops


@dataclass(slots=True)
class _File:
    """One file: its synced content, and the writes since, in order."""

    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """The lengths since the last sync, in order."""

    @property
    def length(self) -> int:
        return self.lengths[-1] if self.lengths else len(self.synced)

    def write(self, offset: int, data: bytes) -> None:
        self.unsynced.append((offset, data))
        if offset + len(data) > self.length:
            self.lengths.append(offset + len(data))

    def truncate(self, length: int) -> None:
        if length < self.length:
            # Truncated bytes are zero even if the length is restored.
            self.unsynced.append((length, bytes(self.length - length)))
        self.lengths.append(length)

    def sync(self) -> None:
        self.synced = self.content()
        self.unsynced.clear()
        self.lengths.clear()

    def content(self) -> bytearray:
        """The content as the process sees it."""
        content = bytearray(self.synced)
        _pad(content, max([self.length, *self.lengths]))
        for offset, data in self.unsynced:
            content[offset : offset + len(data)] = data
        del content[self.length :]
        return content

    def after_power_loss(self, rng: random.Random, kept_share: float, sector: int) -> tuple[bytearray, int]:
        """A possible content after a power cut, and the number of outdated sectors and lengths."""
        content = bytearray(self.synced)
        _pad(content, max([len(content), *self.lengths]))
        writes: dict[int, list[tuple[int, bytes]]] = {}
        for offset, data in self.unsynced:
            for number in range(offset // sector, (offset + len(data) - 1) // sector + 1):
                begin, end = max(offset, number * sector), min(offset + len(data), (number + 1) * sector)
                writes.setdefault(number, []).append((begin, data[begin - offset : end - offset]))
        dropped = 0
        for parts in writes.values():
            kept = len(parts) if rng.random() < kept_share else rng.randrange(len(parts))
            torn = kept < len(parts) and rng.random() < 0.2
            for begin, data in parts[:kept]:
                content[begin : begin + len(data)] = data
            if torn:
                begin, data = parts[kept]
                some = rng.randrange(len(data))
                content[begin : begin + some] = data[:some]
            dropped += kept < len(parts)
        if self.lengths:
            known = rng.random() < kept_share
            length = self.lengths[-1] if known else rng.choice([len(self.synced), *self.lengths])
            dropped += length != self.lengths[-1]
            del content[length:]
        return content, dropped


def _pad(content: bytearray, length: int) -> None:
    content.extend(bytes(max(0, length - len(content))))


class Disk:
    """The files of one folder while a record is replayed."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._files: dict[int, _File] = {}
        self._synced_names: dict[str, _File] = {}
        self._names: dict[str, _File] = {}
        self._ack_log: _File | None = None
        self._folder_inodes: set[int] = set()

    def replay(self, ops: list[DiskOp], ack_log: str) -> Iterator[bytes | None]:
        """Apply the operations in order. Yields for each the data written to the file ``ack_log``, or None.

        ``ack_log`` is not part of the disk.
        """
        for op in ops:
            yield self._apply(op, ack_log)

    def _apply(self, op: DiskOp, ack_log: str) -> bytes | None:
        if op.kind in (Kind.CREATED, Kind.OPENED):
            self._open(op, ack_log)
            return None
        if op.kind is Kind.DELETED:
            self._names.pop(self._name(op), None)
            return None
        if op.file in self._folder_inodes:
            self._synced_names = dict(self._names)
            return None
        file = self._files[op.file]
        if file is self._ack_log:
            return op.data if op.kind is Kind.WRITTEN else None
        if op.kind is Kind.WRITTEN:
            file.write(op.offset, op.data)
        elif op.kind is Kind.TRUNCATED:
            file.truncate(op.offset)
        else:
            file.sync()
        return None

    def _name(self, op: DiskOp) -> str:
        return op.data.decode().removeprefix(self._folder).lstrip("/")

    def _open(self, op: DiskOp, ack_log: str) -> None:
        name = self._name(op)
        if not name:
            self._folder_inodes.add(op.file)
            return
        if op.kind is Kind.OPENED:
            if op.file not in self._files:
                raise ValueError(f"{name} existed before the record began")
            return
        # Inode numbers may be reused.
        file = self._files[op.file] = _File()
        if name == ack_log:
            self._ack_log = file
        else:
            self._names[name] = file

    @property
    def is_fully_synced(self) -> bool:
        """Whether a power cut would have no effect."""
        same = self._durable(self._names) == self._durable(self._synced_names)
        return same and not any(file.unsynced or file.lengths for file in self._durable(self._names).values())

    def contents(self) -> dict[str, bytes]:
        """All files as the process sees them."""
        return {name: bytes(file.content()) for name, file in self._durable(self._names).items()}

    def cut_power(self, rng: random.Random) -> tuple[dict[str, bytes], int]:
        """A possible state of all files after a power cut, and the number of lost changes."""
        kept_share, sector = rng.choice(KEPT_SHARES), rng.choice(SECTORS)
        now, before = self._durable(self._names), self._durable(self._synced_names)
        found, dropped = {}, 0
        for name in sorted({*now, *before}):
            there = now.get(name)
            if there is not before.get(name) and rng.random() >= kept_share:
                there = before.get(name)
                dropped += 1
            if there is None:
                continue
            content, less = there.after_power_loss(rng, kept_share, sector)
            found[name] = bytes(content)
            dropped += less
        for name in self._names:
            # Shared memory is invalid after a restart; its file may hold arbitrary data.
            if name.endswith("-shm") and rng.random() < 0.3:
                found[name] = rng.randbytes(32768)
        return found, dropped

    @staticmethod
    def _durable(names: dict[str, _File]) -> dict[str, _File]:
        return {name: file for name, file in names.items() if not name.endswith("-shm")}

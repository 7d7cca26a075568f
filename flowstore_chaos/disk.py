"""What a disk holds after a power cut: replayed from a record of what a process did to its files.

Synced is kept. What was not synced is kept in part: of each sector any of the contents that it has had
since, the newest possibly torn in the middle; of each file any of the lengths; of each folder any of the
files that were made or deleted in it. The record is written by ``preload/recorder.c``.
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
SHARES_KEPT = (0.0, 0.1, 0.5, 0.9, 0.99)
"""How many of the unsynced sectors reached the disk; one of these is drawn for each image."""


class Kind(IntEnum):
    """As in recorder.c."""

    MADE = 1
    OPENED = 2
    WRITTEN = 3
    CUT = 4
    SYNCED = 5
    DELETED = 6
    RENAMED = 7


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that the process did."""

    kind: Kind
    file: int
    """The inode."""
    offset: int
    """Where it wrote, or the length that it cut the file to."""
    data: bytes
    """What it wrote, or the path."""


def read_record(path: Path) -> list[Act]:
    """Every act, in the order in which they happened."""
    content = path.read_bytes()
    acts, at = [], 0
    while at < len(content):
        number, file, offset, length = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        kind = Kind(number)
        if kind is Kind.RENAMED:
            raise ValueError("the record holds a rename, which is not modelled")
        acts.append(Act(kind, file, offset, content[at : at + length]))
        at += length
    return acts


@dataclass(slots=True)
class _File:
    """One file: what is on the disk for certain, and what was done since, in order."""

    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """The lengths that it has had since, in order."""

    @property
    def length(self) -> int:
        return self.lengths[-1] if self.lengths else len(self.synced)

    def write(self, offset: int, data: bytes) -> None:
        self.unsynced.append((offset, data))
        if offset + len(data) > self.length:
            self.lengths.append(offset + len(data))

    def cut(self, length: int) -> None:
        if length < self.length:
            # Whatever becomes of the length, these bytes do not come back.
            self.unsynced.append((length, bytes(self.length - length)))
        self.lengths.append(length)

    def sync(self) -> None:
        self.synced = self.whole()
        self.unsynced.clear()
        self.lengths.clear()

    def whole(self) -> bytearray:
        """As the process sees it."""
        content = bytearray(self.synced)
        _stretch(content, max([self.length, *self.lengths]))
        for offset, data in self.unsynced:
            content[offset : offset + len(data)] = data
        del content[self.length :]
        return content

    def after_cut(self, chance: random.Random, share: float, sector: int) -> tuple[bytearray, int]:
        """As the disk may have it, and how many sectors have not their newest content."""
        content = bytearray(self.synced)
        _stretch(content, max([len(content), *self.lengths]))
        writes: dict[int, list[tuple[int, bytes]]] = {}
        for offset, data in self.unsynced:
            for number in range(offset // sector, (offset + len(data) - 1) // sector + 1):
                begin, end = max(offset, number * sector), min(offset + len(data), (number + 1) * sector)
                writes.setdefault(number, []).append((begin, data[begin - offset : end - offset]))
        dropped = 0
        for parts in writes.values():
            kept = len(parts) if chance.random() < share else chance.randrange(len(parts))
            torn = kept < len(parts) and chance.random() < 0.2
            for begin, data in parts[:kept]:
                content[begin : begin + len(data)] = data
            if torn:
                begin, data = parts[kept]
                some = chance.randrange(len(data))
                content[begin : begin + some] = data[:some]
            dropped += kept < len(parts)
        if self.lengths:
            known = chance.random() < share
            length = self.lengths[-1] if known else chance.choice([len(self.synced), *self.lengths])
            dropped += length != self.lengths[-1]
            del content[length:]
        return content, dropped


def _stretch(content: bytearray, length: int) -> None:
    content.extend(bytes(max(0, length - len(content))))


class Disk:
    """The files of one folder while a record is replayed."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._files: dict[int, _File] = {}
        self._synced_names: dict[str, _File] = {}
        self._names: dict[str, _File] = {}
        self._marks: _File | None = None
        self._of_folder: set[int] = set()

    def replay(self, acts: list[Act], marks: str) -> Iterator[bytes | None]:
        """Do one act after the other; gives what was written to the file ``marks``, which is none of the
        disk's, or None."""
        for act in acts:
            yield self._do(act, marks)

    def _do(self, act: Act, marks: str) -> bytes | None:
        if act.kind in (Kind.MADE, Kind.OPENED):
            self._open(act, marks)
            return None
        if act.kind is Kind.DELETED:
            self._names.pop(self._name(act), None)
            return None
        if act.file in self._of_folder:
            self._synced_names = dict(self._names)
            return None
        file = self._files[act.file]
        if file is self._marks:
            return act.data if act.kind is Kind.WRITTEN else None
        if act.kind is Kind.WRITTEN:
            file.write(act.offset, act.data)
        elif act.kind is Kind.CUT:
            file.cut(act.offset)
        else:
            file.sync()
        return None

    def _name(self, act: Act) -> str:
        return act.data.decode().removeprefix(self._folder).lstrip("/")

    def _open(self, act: Act, marks: str) -> None:
        name = self._name(act)
        if not name:
            self._of_folder.add(act.file)
            return
        if act.kind is Kind.OPENED:
            if act.file not in self._files:
                raise ValueError(f"{name} was there before the record began")
            return
        # An inode's number may have been another file's.
        file = self._files[act.file] = _File()
        if name == marks:
            self._marks = file
        else:
            self._names[name] = file

    @property
    def is_quiet(self) -> bool:
        """Whether a power cut now would take nothing."""
        same = self._durable(self._names) == self._durable(self._synced_names)
        return same and not any(file.unsynced or file.lengths for file in self._durable(self._names).values())

    def contents(self) -> dict[str, bytes]:
        """The files as the process sees them."""
        return {name: bytes(file.whole()) for name, file in self._durable(self._names).items()}

    def cut_power(self, chance: random.Random) -> tuple[dict[str, bytes], int]:
        """The files as they may be after a power cut, and how much of what was written is not there."""
        share, sector = chance.choice(SHARES_KEPT), chance.choice(SECTORS)
        now, before = self._durable(self._names), self._durable(self._synced_names)
        found, dropped = {}, 0
        for name in sorted({*now, *before}):
            there = now.get(name)
            if there is not before.get(name) and chance.random() >= share:
                there = before.get(name)
                dropped += 1
            if there is None:
                continue
            content, less = there.after_cut(chance, share, sector)
            found[name] = bytes(content)
            dropped += less
        for name in self._names:
            # Shared memory is nobody's after a restart; there may be anything in its file.
            if name.endswith("-shm") and chance.random() < 0.3:
                found[name] = chance.randbytes(32768)
        return found, dropped

    @staticmethod
    def _durable(names: dict[str, _File]) -> dict[str, _File]:
        return {name: file for name, file in names.items() if not name.endswith("-shm")}

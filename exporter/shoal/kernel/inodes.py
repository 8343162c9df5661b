"""Inodes: how many a file system has left, and how many a directory tree uses."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Count", "CrowdedError", "Inodes", "StuckError", "Watchdog", "count_inodes", "read_inodes"]

_T = TypeVar("_T")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEEPEST = 100
_BETWEEN_LOOKS = 256


@dataclass(frozen=True, slots=True)
class Inodes:
    """What statfs(2) says of the file system at a path, and which one it is."""

    total: int
    """f_files: 0 where inodes are made as they are needed (btrfs, vfat) and cannot run out by themselves."""
    free: int
    """f_ffree."""
    device: int


def read_inodes(path: str) -> Inodes:
    """Ask the file system that is mounted at a path. Raises `OSError`; hangs where the file system does."""
    said = os.statvfs(path)
    return Inodes(said.f_files, said.f_ffree, os.stat(path).st_dev)


class StuckError(Exception):
    """What was asked has not answered in time."""


class CrowdedError(Exception):
    """Not asked, since too many others have not answered yet."""


class Watchdog(Generic[_T]):
    """Asks what may hang in a thread of its own, so that only the thread hangs.

    Nothing that waits in the kernel can be called off: a thread that hangs is left alone until its answer comes, the
    same is not asked again until then, and there are never more than a few such threads.
    """

    def __init__(self, patience: float, most: int) -> None:
        """Wait `patience` seconds for an answer, and let no more than `most` threads hang."""
        self._patience = patience
        self._most = most
        self._hanging: dict[Hashable, _Question[_T]] = {}

    def ask(self, key: Hashable, function: Callable[[], _T]) -> _T:
        """Return what the function returns, or raise what it raises.

        Raises `StuckError` when it does not answer in time or has not answered since an earlier call with this key,
        `CrowdedError` when it was not called because too many others hang.
        """
        self._hanging = {asked: question for asked, question in self._hanging.items() if not question.done.is_set()}
        if key in self._hanging:
            raise StuckError
        if len(self._hanging) >= self._most:
            raise CrowdedError
        question = _Question(function)
        # A daemon, as Python would wait for others before it ends.
        threading.Thread(target=question.answer, name="shoal-watchdog", daemon=True).start()
        if not question.done.wait(self._patience):
            self._hanging[key] = question
            raise StuckError
        return question.result()


class _Question(Generic[_T]):
    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._answer: list[_T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()

    def answer(self) -> None:
        try:
            self._answer.append(self._function())
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that asked)
            self._error = error
        finally:
            self.done.set()

    def result(self) -> _T:
        if self._error:
            raise self._error
        return self._answer[0]


@dataclass(frozen=True, slots=True)
class Count:
    """How many inodes a directory tree uses, itself included."""

    inodes: int
    """Names, each as one: a file with two names counts twice. Whiteouts share an inode and count as many as they are.
    """
    complete: bool
    """Whether it was counted to the end; if not, there are more."""
    device: int


def count_inodes(directory: str, give_up: Callable[[], bool]) -> Count:
    """Count the names in a tree, and ask now and then whether to give up.

    Whoever owns the tree may change it meanwhile: every directory is opened from its parent and no link is followed,
    so that the walk cannot be led out of it. It goes 100 levels deep. What cannot be read leaves the count incomplete;
    raises `OSError` when that is the directory itself.
    """
    walk = _Walk()
    walk.enter(os.open(directory, _DIRECTORY))
    try:
        device = os.fstat(walk.levels[0][0]).st_dev
        names, looked = 1, 0
        while walk.levels:
            entry = walk.next()
            if entry is None:
                continue
            looked += 1
            if looked % _BETWEEN_LOOKS == 0 and give_up():
                walk.complete = False
                break
            names += walk.is_new(entry)
            if entry.is_dir(follow_symlinks=False):
                walk.descend(entry.name)
    finally:
        walk.close()
    return Count(names, walk.complete, device)


class _Entries(Protocol):
    """What os.scandir returns."""

    def __next__(self) -> os.DirEntry[str]: ...

    def close(self) -> None: ...


class _Walk:
    """The directories from the top of the tree to where the walk is: as many open at once as it is deep."""

    def __init__(self) -> None:
        self.levels: list[tuple[int, _Entries]] = []
        self.complete = True
        self._whiteouts: set[int] = set()

    def enter(self, fd: int) -> None:
        try:
            entries = os.scandir(fd)
        except OSError:
            os.close(fd)
            raise
        self.levels.append((fd, entries))

    def next(self) -> os.DirEntry[str] | None:
        """Return the next entry of the innermost directory; leave the directory, and return None, at its end."""
        try:
            return self.levels[-1][1].__next__()
        except StopIteration:
            pass
        except OSError:
            self.complete = False
        self._leave()
        return None

    def descend(self, name: str) -> None:
        if len(self.levels) >= _DEEPEST:
            self.complete = False
            return
        try:
            self.enter(os.open(name, _DIRECTORY, dir_fd=self.levels[-1][0]))
        except FileNotFoundError:
            return
        except OSError:
            self.complete = False

    def is_new(self, entry: os.DirEntry[str]) -> bool:
        """Tell whether a name has an inode of its own. A whiteout, device 0:0, marks a name as deleted.

        The kernel links all whiteouts of a layer to one inode (5.8), up to the most links that one can have.
        """
        if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink():
            return True
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return False
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != 0:
            return True
        if found.st_ino in self._whiteouts:
            return False
        self._whiteouts.add(found.st_ino)
        return True

    def _leave(self) -> None:
        fd, entries = self.levels.pop()
        entries.close()
        os.close(fd)

    def close(self) -> None:
        while self.levels:
            self._leave()

"""A bounded folder on a local disk for the shards of remote stores, shared by stores, runs and processes."""

import atexit
import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from filelock import FileLock

from ditlit.data.folders import RemoteFolder
from ditlit.data.manifest import Shard
from ditlit.data.shards import check_size, check_sum, file_sha256
from ditlit.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows, which does without remote stores
    fcntl = None

DEFAULT_FOLDER = "~/.cache/ditlit/shards"
FETCHERS = 4  # threads of one process that read ahead
PATIENCE = 60.0  # seconds to wait for shards that other processes read or fetch to make room
POLL = 0.1


def default_cache() -> "ShardCache":
    """The cache that all runs of this user share; one for this process, with a warning, where it cannot be written."""
    try:
        return ShardCache()
    except InputError as problem:
        folder = tempfile.mkdtemp(prefix="ditlit-shards-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print(f"ditlit: warning: {problem}. What is fetched is kept in {folder} for now.", file=sys.stderr)
        return ShardCache(folder)


class ShardCache:
    """Shards of remote stores on a local disk, never more than a given size of them.

    A file is named by its SHA-256, so that it serves every store, run and process that wants these bytes. It is fetched
    once a machine, verified, and appears whole. Those used longest ago make room for others, except the ones that a
    process is reading (a deleted file keeps its space on the disk while it is mapped) or has asked to be read ahead.
    A process that reads a shard waits for nothing meanwhile, so that processes cannot lock each other out.

    Works across threads, forks and processes: locks are on files, and vanish with the process that holds them.

    Args:
        folder: on a local disk; created if absent.
        size_gb: bound in gigabytes (1e9 bytes), downloads under way included.

    Raises:
        InputError: for a folder that cannot be written, or a size that is not positive.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER, size_gb: float = 50):
        if fcntl is None:
            raise InputError("stores at URLs need Linux or macOS; copy the store to a local folder")
        self.folder = Path(folder)
        self.num_bytes = int(size_gb * 1e9)
        if self.num_bytes <= 0:
            raise InputError(f"the cache needs a positive size in gigabytes, got {size_gb}")
        try:
            self.folder = self.folder.expanduser()
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._folder_lock():
                pass
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home; or there are no locks
            raise InputError(f"cannot write to the cache {self.folder} ({error}); choose another cache_dir") from error
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> tuple:
        return ShardCache, (self.folder, self.num_bytes / 1e9)

    @contextlib.contextmanager
    def open(self, folder: RemoteFolder, shard: Shard) -> Iterator[Path]:
        """The shard's local path, which no process deletes before the context ends.

        Raises:
            InputError: where the shard is missing, or damaged or out of reach after several attempts; names its URL.
        """
        with self._fetch(folder, shard):
            yield self.folder / shard.sha256

    def prefetch(self, shards: Sequence[tuple[RemoteFolder, Shard]]) -> None:
        """Fetch shards in the background, in this order. Until the next call they are the last to make room for others.

        Whatever goes wrong is left for ``open`` to report.
        """
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = ReadAhead(self._fetch_ahead)
        self._ahead.want(shards)

    def close(self) -> None:
        """Fetch no more ahead."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    # Fetching ----------------------------------------------------------------------------------------------------

    def _fetch(self, folder: RemoteFolder, shard: Shard) -> BinaryIO:
        """The shard's file, open and held: no process deletes it before this handle is closed."""
        deadline = time.monotonic() + PATIENCE
        while True:
            file = self._hold(shard)
            if file is not None:
                return file
            if not self._download(folder, shard, sacrifice=True):
                if time.monotonic() > deadline:
                    raise InputError(
                        f"the cache {self.folder} has no room for {folder.location(shard.file)}: its "
                        f"{self.num_bytes / 1e9:g} GB are in use by running processes; raise cache_size_gb"
                    )
                time.sleep(POLL)

    def _fetch_ahead(self, folder: RemoteFolder, shard: Shard) -> bool:
        """Make the shard be there; false where there is no room yet."""
        return (self.folder / shard.sha256).exists() or self._download(folder, shard, sacrifice=False)

    def _hold(self, shard: Shard) -> BinaryIO | None:
        """The shard's file with a shared lock, marked as just used; None where it is not there."""
        path = self.folder / shard.sha256
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if stat.st_size != shard.num_bytes:  # cut short by a crash of the machine
            path.unlink(missing_ok=True)
        if stat.st_nlink == 0 or stat.st_size != shard.num_bytes:  # deleted between opening and locking, or now
            file.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return file

    def _download(self, folder: RemoteFolder, shard: Shard, sacrifice: bool) -> bool:
        """Fetch a shard unless another thread or process does, then wait for it; false where there is no room."""

        def check(path: Path) -> None:
            try:
                check_size(path.stat().st_size, shard, folder.location(shard.file))
                check_sum(file_sha256(path), shard, folder.location(shard.file))
            except InputError as error:
                raise OSError(str(error)) from None

        path = self.folder / shard.sha256
        # A few locks for all shards, since lock files cannot be deleted safely.
        with FileLock(self.folder / f".{shard.sha256[:2]}.lock"):
            if path.exists():
                return True
            with self._room(shard, sacrifice) as found:
                if found:
                    folder.download(shard.file, path, check)
            return found

    # Making room -------------------------------------------------------------------------------------------------

    def _folder_lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    @contextlib.contextmanager
    def _room(self, shard: Shard, sacrifice: bool) -> Iterator[bool]:
        """Claim space for a shard that is about to be downloaded; false where there is not enough.

        A claim is a file that holds the number of bytes, locked as long as its process lives.
        """
        path = self.folder / f".{shard.sha256}.claim"
        with self._folder_lock():
            found = self._make_room(shard.num_bytes, sacrifice)
            if found:
                claim = open(path, "w")  # noqa: SIM115
                fcntl.flock(claim, fcntl.LOCK_EX)
                claim.write(str(shard.num_bytes))
                claim.flush()
        try:
            yield found
        finally:
            if found:
                # Under the lock: who counts bytes sees the claim, the file that took its place, or both.
                with self._folder_lock(), claim:
                    path.unlink()

    def _make_room(self, num_bytes: int, sacrifice: bool) -> bool:
        """Delete what was used longest ago until ``num_bytes`` more fit; false, and nothing deleted, if they cannot.

        With ``sacrifice``, shards that were asked to be read ahead go too, after all others: what is needed now goes
        before what is needed soon.
        """
        ahead = self._ahead
        wanted = ahead.wanted if ahead is not None and ahead.process == os.getpid() else frozenset()
        used, files = 0, []
        entries = {entry.name: entry for entry in os.scandir(self.folder)}
        for entry in entries.values():
            if re.fullmatch("[0-9a-f]{64}", entry.name):
                stat = entry.stat()
                used += stat.st_size
                if sacrifice or entry.name not in wanted:
                    files.append((entry.name in wanted, stat.st_mtime_ns, stat.st_size, entry.name))
            elif entry.name.endswith(".claim"):
                claimed = self._claimed(Path(entry.path))
                used += 0 if entry.name[1:].removesuffix(".claim") in entries else claimed  # the file is there already
        droppable = []
        with contextlib.ExitStack() as locks:
            for _, _, size, name in sorted(files):
                if used + num_bytes <= self.num_bytes:
                    break
                if (file := try_lock(self.folder / name)) is not None:
                    locks.enter_context(file)
                    droppable.append(name)
                    used -= size
            if used + num_bytes > self.num_bytes:
                return False
            for name in droppable:
                (self.folder / name).unlink()
        return True

    def _claimed(self, path: Path) -> int:
        """Bytes of a claim; what a killed process left behind is deleted."""
        file = try_lock(path)
        if file is None:
            return int(path.read_text())
        with file:
            for left in (path, *self.folder.glob(f"{path.stem}.*.tmp")):
                left.unlink(missing_ok=True)
        return 0


def try_lock(path: Path) -> BinaryIO | None:
    """The file, open and locked for this handle alone; None where another handle holds it or it is gone."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


class ReadAhead:
    """Threads that fetch wanted shards. Daemons, since nothing is lost when the process ends before they are done."""

    def __init__(self, fetch: Callable[[RemoteFolder, Shard], bool]):
        self.process = os.getpid()  # threads do not survive a fork
        self.wanted: frozenset[str] = frozenset()
        self._fetch = fetch
        self._queue: SimpleQueue[tuple[RemoteFolder, Shard] | None] = SimpleQueue()
        for _ in range(FETCHERS):
            threading.Thread(target=self._run, daemon=True, name="ditlit-read-ahead").start()

    def want(self, shards: Sequence[tuple[RemoteFolder, Shard]]) -> None:
        before = self.wanted
        self.wanted = frozenset(shard.sha256 for _, shard in shards)
        for folder, shard in shards:
            if shard.sha256 not in before:
                self._queue.put((folder, shard))

    def stop(self) -> None:
        self.wanted = frozenset()
        for _ in range(FETCHERS):
            self._queue.put(None)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            folder, shard = job
            with contextlib.suppress(Exception):
                while shard.sha256 in self.wanted and not self._fetch(folder, shard):
                    time.sleep(POLL)

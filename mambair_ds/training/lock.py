"""One run a folder: the second one that is pointed at it is refused while the first lives.

The lock is a file beside the run's folder, `.NAME.lock`. On one machine the kernel's file lock decides: it goes with
its process, however that ends. Other machines may not see the kernel's lock on a shared file system; for them the
holder touches the file every few seconds, and one that has not been touched for `stale` seconds is nobody's. Ages are
differences of the file server's own time stamps: the machines' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambair_ds.config import UserError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer."""


class RunLock:
    """The right to write to a run's folder."""

    def __init__(self, folder: Path, stale: float, lost: Callable[[str], None]) -> None:
        """Take the lock of `folder`, and keep it until `release`.

        Args:
            folder: the run's folder, which need not exist.
            stale: seconds without a sign of life after which a holder on another machine counts as dead.
            lost: called from a thread, with the reason, if another run has taken the lock over.

        Raises:
            UserError: naming the host, process and job that hold it.
        """
        self.path = folder.with_name(f".{folder.name}.lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stale, self._lost = stale, lost
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "machine": _machine(),
            "token": secrets.token_hex(8),
        }
        self._handle = self._take(folder)
        self._released = threading.Event()
        threading.Thread(target=self._touch, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder free."""
        if not self._released.is_set():
            self._released.set()
            if self._ours():
                self.path.unlink(missing_ok=True)
            os.close(self._handle)

    def _take(self, folder: Path) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = True
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                self._refuse(folder, _read(self.path))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locked = False
            holder = _read(self.path)
            if holder and not (locked and holder.get("machine") == self._me["machine"]):
                self._wait(folder, holder)
            # A holder that left meanwhile has removed the file: what is locked then is a file without a name.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == self.path.stat().st_ino:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps(self._me).encode(), 0)
                    os.fsync(handle)
                    return handle
            os.close(handle)

    def _refuse(self, folder: Path, holder: dict[str, Any]) -> None:
        job = f", job {holder['job']}" if holder.get("job") else ""
        raise UserError(
            f"{folder}: another run is writing to it: host {holder.get('host', 'unknown')}, "
            f"process {holder.get('pid', 'unknown')}{job}. Stop that one first, or choose another name"
        )

    def _wait(self, folder: Path, holder: dict[str, Any]) -> None:
        """Return when the holder, which may be on another machine, has shown no life for long enough, or has left."""
        with contextlib.suppress(FileNotFoundError):
            seen = self.path.stat().st_mtime
            age = self._server_time() - seen
            if age < self._stale:
                logger.info(
                    "%s: last written by host %s, process %s, %.0f s ago; waiting up to %.0f s for a sign of life",
                    folder, holder.get("host"), holder.get("pid"), age, self._stale - age,
                )  # fmt: skip
            end = time.monotonic() + self._stale - age
            while time.monotonic() < end:
                time.sleep(min(1.0, self._stale / 10))
                if self.path.stat().st_mtime != seen:
                    self._refuse(folder, _read(self.path))

    def _server_time(self) -> float:
        """Now, by the clock that gives the lock file its time stamps."""
        probe = self.path.with_name(f"{self.path.name}.{self._me['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _ours(self) -> bool:
        return _read(self.path).get("token") == self._me["token"]

    def _touch(self) -> None:
        while not self._released.wait(self._stale / 6):
            try:
                if not self._ours():
                    self._lost(f"{self.path} was taken over by another run or removed")
                    return
                os.utime(self.path)
            except OSError as error:
                logger.warning("cannot touch the run's lock: %s", error)


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says of its holder; nothing if it is empty, cut off or gone."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _machine() -> str:
    """This machine since its last start; the same in all its containers."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()

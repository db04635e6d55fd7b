"""One process at a time writes into an output folder.

The lock is a file that names its holder, and the system's own lock on that file, which goes when its holder does. So
a killed holder's is recognised, also where a later process has its number. A holder on another machine cannot be
looked at: there the file's word counts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import InUse
from sparsetrain.core.process import Process

LOCK = ".sparsetrain.lock"


@contextmanager
def locked(path: str | Path, what: str | Path) -> Iterator[None]:
    """Hold a lock file, in a folder that is there, until the block ends in any way.

    Args:
        path: the file.
        what: what it guards, for the message.

    Raises:
        InUse: another process holds it, or one of another machine may.
        OSError: it cannot be written.
    """
    path, descriptor = Path(path), None
    while descriptor is None:
        descriptor = _taken(path, what)
    me = Process.this()
    try:
        try:
            entries = {"host": me.host, "pid": me.pid, "started": me.started, "since": time.time()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(entries).encode(), 0)
            os.fsync(descriptor)
        except OSError as error:
            error.filename = str(path)
            raise
        yield
    finally:
        if os.getpid() == me.pid:  # and not in a fork of this process
            path.unlink(missing_ok=True)
        os.close(descriptor)


def wait_released(path: str | Path, seconds: float) -> None:
    """Give the processes of a killed one the time to see that it is gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and (owner := _owner(Path(path))[0]) and owner.is_local and owner.is_running:
        time.sleep(0.05)


def _taken(path: Path, what: str | Path) -> int | None:
    """An open lock file that is ours to fill; None if it has just been released by another, so that one asks again."""
    # not followed: a link would let us write elsewhere; not blocking: it may be a pipe
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no plain file", str(path))
        held = not _system_lock(descriptor)
        owner, since = _owner(path, wait=held)
        if owner is not None and not owner.is_local:
            raise InUse(
                f"{what} is locked by process {owner.pid} of another machine, {owner.host},{since}, and from here one "
                f"cannot see whether it still runs. Wait for it, or remove {path} if it is gone."
            )
        if held or (owner is not None and owner.is_running):
            who = "another process" if owner is None else f"process {owner.pid} of this machine, {owner.host},{since}"
            raise InUse(f"{what} is in use by {who.rstrip(',')}. Wait for it or stop it, or choose another output.")
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)
        return None
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def _system_lock(descriptor: int) -> bool:
    """Take the system's lock on a file; False if another has it. Without such locks, the file's word counts."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def _owner(path: Path, *, wait: bool = False) -> tuple[Process | None, str]:
    """The holder that a lock file names, and since when; (None, "") where it names none.

    Args:
        wait: somebody holds it, who may be about to write its name.
    """
    for _ in range(10 if wait else 1):
        values: Any = None
        with contextlib.suppress(OSError, ValueError):
            values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and (owner := Process.from_dict(values)) is not None:
            if wait and owner.is_local and not owner.is_running:
                time.sleep(0.02)
                continue
            with contextlib.suppress(OSError, OverflowError, ValueError, TypeError, KeyError):
                return owner, f" since {datetime.fromtimestamp(values['since'], UTC):%Y-%m-%d %H:%M:%S} UTC"
            return owner, ""
        if not wait:
            break
        time.sleep(0.02)
    return None, ""

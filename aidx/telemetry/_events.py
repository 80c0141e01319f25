"""Event files and the thread that fills them."""

import itertools
import os
import pathlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import google_crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

_numbers = itertools.count()
IDLE_EVERY = 64  # jobs between two looks at the clock, where jobs do not end


class EventFile:
    """One event file of a folder; only the worker's thread writes to it.

    What is written reaches the disk when max_queue events wait or flush_secs have passed.

    >>> import tempfile
    >>> options = dict(max_queue=1, flush_secs=120, suffix="", purge_step=None)
    >>> file = EventFile(tempfile.mkdtemp(), **options)
    >>> file.write(Event(step=3)); file.close()
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        max_queue: int,
        flush_secs: float,
        suffix: str,
        purge_step: int | None,
    ):
        os.makedirs(folder, exist_ok=True)
        # Two writers of one folder within a second must not share a file.
        unique = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers)}{suffix}"
        now = time.time()
        path = os.path.join(folder, f"events.out.tfevents.{int(now):010d}.{unique}")
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close()
        self._max_queue, self._flush_secs = max_queue, flush_secs
        self._waiting, self._flushed = 0, time.monotonic()
        self.write(Event(wall_time=now, file_version="brain.Event:2"))
        if purge_step is not None:  # what an earlier run wrote from here on is hidden
            start = SessionLog(status=SessionLog.START)
            self.write(Event(step=purge_step, wall_time=now, session_log=start))
        self.flush()

    def write(self, event: Event) -> None:
        """Append an event."""
        self._file.write(record(event.SerializeToString()))
        self._waiting += 1
        if self._waiting >= self._max_queue:
            self.flush()

    def flush_if_due(self) -> None:
        """Flush when flush_secs have passed since the last time."""
        if self._waiting and time.monotonic() - self._flushed >= self._flush_secs:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system, where other processes see it."""
        self._file.flush()
        self._waiting, self._flushed = 0, time.monotonic()

    def sync(self) -> None:
        """Flush, and return when it is on the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def record(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, data, its checksum.

    >>> len(record(b"abc"))
    19
    """
    head = struct.pack("<Q", len(data))
    return b"".join((head, checksum(head), data, checksum(data)))


def checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted so that a record within a record cannot deceive.

    >>> checksum(b"").hex()
    'd8ea82a2'
    """
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


class Worker:
    """A thread that does jobs in order; the queue is bounded, and a full one makes `put` wait.

    What a job raises is raised by the next call from outside, so nothing is lost in silence.

    >>> worker, done = Worker(lambda: None, size=2, tick=1.0), []
    >>> worker.put(lambda: done.append(1)); worker.drain(); done
    [1]
    >>> worker.close()
    """

    def __init__(self, idle: Callable[[], Any], *, size: int, tick: float):
        self._idle, self._size, self._tick = idle, size, tick
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="aidx-tensorboard", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], Any]) -> None:
        """Add a job; waits while the queue is full."""
        if self._errors:
            self.check()
        if self._queue.qsize() >= self._size:
            with self._room:
                self._room.wait_for(lambda: self._queue.qsize() <= self._size // 2)
        self._queue.put(job)

    def drain(self) -> None:
        """Return when every job so far is done."""
        reached = threading.Event()
        self._queue.put(reached.set)
        reached.wait()
        self.check()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._errors:
            raise self._errors.pop(0)

    def close(self) -> None:
        """Do what is left and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        for number in itertools.count():
            try:
                job = self._queue.get(timeout=self._tick)
            except queue.Empty:
                self._idle()
                continue
            if job is None:
                return
            try:
                job()
            except Exception as error:  # the caller is long gone; it is told by its next call
                self._errors.append(error)
            if number % IDLE_EVERY == 0:
                self._idle()
                with self._room:
                    self._room.notify_all()
            elif self._queue.empty():
                with self._room:
                    self._room.notify_all()

"""A process that times configurations, and the handle on it: a kernel that hangs can be killed.

A kernel on a GPU cannot be cancelled, and one that faults poisons its process' CUDA context: so
`aidx tune` sends every configuration to a process with a bounded memory pool, kills that process
when an answer takes too long, and starts another.  Messages are JSON, one a line.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import IO, Any


class WorkerFailure(RuntimeError):
    """The worker did not answer: it hung and was killed, or it died."""


class Worker:
    """The process, seen from outside; started when it is first asked something."""

    def __init__(
        self,
        modules: Sequence[str] = (),
        *,
        memory_fraction: float = 0.5,
        environment: Mapping[str, str] | None = None,
    ):
        """Nothing is started yet.

        Args:
          modules: what the process imports for the tunables that they register.
          memory_fraction: of the device's memory, all that the process may take.
          environment: variables on top of this process's.
        """
        self.modules, self.starts = tuple(modules), 0
        self._environment = {
            **os.environ,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory_fraction),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true",  # the pool is all there is
            **(environment or {}),
        }
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, timeout: float, **message: Any) -> Any:
        """The answer to a message.

        Raises:
          WorkerFailure: none within `timeout` seconds (the process is killed), or it died; the next
            message goes to another process.
          ValueError: the worker says that the message asks for something that is not there.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None  # Popen was given pipes
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailure(self._post_mortem()) from None
        line = self._line(time.monotonic() + timeout)
        if line is None:
            self.close()
            raise WorkerFailure(f"timed out after {timeout:g} s; its process was killed")
        if not line.endswith(b"\n"):
            raise WorkerFailure(self._post_mortem())
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._said()

    def _said(self) -> tuple[int, list[str]]:
        """The exit status of the process, whose end this awaits, and the lines of its errors."""
        process, errors = self._process, self._errors
        assert process is not None and errors is not None
        process.communicate()
        with errors:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        self._process = self._errors = None
        return process.returncode, lines

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has died
        command = [sys.executable, "-m", "aidx.ops.autotune.worker", *self.modules]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, env=self._environment
        )
        self.starts += 1

    def _line(self, deadline: float) -> bytes | None:
        """One line of the process, what it wrote before it died, or None at the deadline."""
        process = self._process
        assert process is not None and process.stdout is not None
        descriptor, found = process.stdout.fileno(), b""
        while not found.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                break
            found += piece
        return found

    def _post_mortem(self) -> str:
        """How it ended, and the last line that it said."""
        status, lines = self._said()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"its process died with {how}{f': {lines[-1][:300]}' if lines else ''}"


# --- the process itself --------------------------------------------------------------------------


class _Cases:
    """What the process has prepared: one case at a time, and its compiled programs."""

    def __init__(self):
        self.name: tuple[str, str] | None = None
        self.drawn: tuple[str, str] | None = None  # the case that is next
        self.reference: Any = None  # what runs its reference
        self.programs: Any = None
        self.space: dict[str, Hashable] = {}
        self.ahead: set[str] = set()  # what has been compiled ahead, or failed to be
        self.compilers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def describe(self, op: str, case: str) -> dict[str, Any]:
        """What timings of this case are known by, and its candidates."""
        import jax

        from . import tunable as known
        from .choice import device_kind

        one = known.get(op)
        operands, static = known.case_of(one, case)
        key = one.key_text(operands, static)
        device = device_kind(one)
        if key is None or device is None:
            where = f"needs {', '.join(one.platforms)}, this is {jax.default_backend()}"
            raise ValueError(f"{op}: {where if device is None else 'this case has no lasting key'}")
        return {
            "device": device,
            "jax": jax.__version__,
            "code": known.code_hash(one.sources),
            "key": key,
            "configs": [known.config_text(c) for c in one.candidates(*operands, **static)],
        }

    def draw(self, op: str, case: str) -> None:
        """Draw the operands of another case and compile its reference: the device is hardly busy.

        The case before is forgotten.
        """
        from . import tunable as known
        from .trial import drawn

        one = known.get(op)
        operands, static = known.case_of(one, case)
        self.name = self.programs = self.drawn = None
        self.reference = drawn(one, operands, static)
        found = one.candidates(*operands, **static)
        self.space = {known.config_text(config): config for config in found}
        self.drawn = (op, case)

    def prepare(self, op: str, case: str, ahead: Sequence[str] = ()) -> None:
        """Have the reference's result; compile configurations, several at once.

        All of them before anything is timed: threads that compile disturb the clock.  What fails
        fails again when it is timed, alone.
        """
        from .trial import FAILURES, Programs

        if self.name != (op, case):
            if self.drawn != (op, case):
                self.draw(op, case)
            self.ahead, self.programs = set(), Programs(self.reference())
            self.name, self.drawn = (op, case), None
        new = [text for text in ahead if text not in self.ahead]
        self.ahead.update(new)
        jobs = [self.compilers.submit(self.programs.get, self._config(text)) for text in new]
        for job in jobs:
            with contextlib.suppress(*FAILURES):
                job.result()

    def time(self, op: str, case: str, config: str) -> dict[str, Any]:
        """What becomes of a configuration."""
        from .trial import attempt

        self.prepare(op, case)
        return dataclasses.asdict(attempt(self.programs, self._config(config)))

    def turns(self, op: str, case: str, configs: Sequence[str]) -> dict[str, float]:
        """The seconds of some configurations, timed in turns."""
        from .trial import in_turns

        self.prepare(op, case, configs)
        return in_turns(self.programs, {text: self._config(text) for text in configs})

    def _config(self, text: str) -> Hashable:
        if text not in self.space:
            raise ValueError(f"{text} is no candidate; there are {list(self.space)}")
        return self.space[text]


def listed(ops: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(name, shapes) of what can be tuned of these ops, of all where there are none.

    >>> listed([])
    [...]
    """
    from . import tunable as known

    found = {t.name: t.shapes for op in ops or [None] for t in known.tunables(op)}
    return list(found.items())


def main(modules: Sequence[str]) -> None:
    """Answer the messages on standard input until it ends."""
    # Whatever prints goes to standard error; the answers have the first standard output alone.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    from . import tunable as known

    known.load(modules)
    cases = _Cases()
    requests = {
        "list": listed,
        "describe": cases.describe,
        "draw": cases.draw,
        "prepare": cases.prepare,
        "time": cases.time,
        "turns": cases.turns,
    }
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            reply = {"answer": requests[message.pop("do")](**message)}
        except (ValueError, NotImplementedError) as error:
            reply = {"error": str(error)}
        answers.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a benchmark measured: printed and written as it comes, so that a killed run leaves it."""

import datetime
import json
import pathlib
import sys

import jax

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
KEYS = ("case", "implementation", "metric", "value", "unit")


class Record:
    """Rows of one run; `out` None prints only."""

    def __init__(self, out: pathlib.Path | None):
        self.out, self.rows = out, []
        self.meta = {
            "command": " ".join(["python", *_without_out(sys.argv)]),
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": {},
        }

    def add(self, case, implementation, value, metric="time", unit="ms", digits=4):
        """One row."""
        value = float(f"{value:.{digits}g}")
        self.rows.append(dict(zip(KEYS, (case, implementation, metric, value, unit), strict=True)))
        if self.out is None:
            return
        names = ("jax", "scipy", "torch")
        found = {n: sys.modules[n].__version__ for n in names if n in sys.modules}
        self.meta["versions"] = found
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")  # a reader sees the whole file, old or new
        part.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        part.replace(self.out)


def _without_out(words):
    """A command, but for where it writes.

    >>> _without_out(["bench/sparse.py", "--out", "there", "--tiny"])
    ['bench/sparse.py', '--tiny']
    """
    return [w for before, w in zip(["", *words], words, strict=False) if "--out" not in (before, w)]

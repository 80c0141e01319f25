"""`op_check`: every law that an op's implementations have to keep, tried in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..ops import registry as ops
from ._compare import Mismatch
from ._laws import TRANSFORMATIONS, VALUES, Outcome, Subject
from ._shrink import shrink
from .kernel import REFERENCE, CustomKernel, Tolerance, current

LAWS = (*VALUES, *TRANSFORMATIONS)
# How often a simpler counterexample is looked for; the other laws do not depend on values.
SHRUNK = {"reference": 150, "gradient": 150, "vmap": 40, "jit": 40, "unread": 40, "nan and inf": 40}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Operands on which an op is checked.

    Attributes:
      name: shown in the table.
      operands: a tuple with one entry for each operand: a shape (standard normal values of the
        case's dtype), an array (floats are cast to the dtype) or None; or a function
        `(rng, dtype) -> operands` (`rng` a `numpy.random.Generator`).
      static: keyword arguments of the call.
      dtypes: of the float operands.
      gradients: whether the op is differentiated.
      vmap: the `in_axes` to try (0 or None for each operand); by default every operand, and the
        first float one alone.
      shard: `(in_specs, out_specs)` over a mesh axis "devices", whose size divides those axes.
      donate: operands that must be overwritten in place when they are donated.
      unread: `unread(*operands)` gives a bool mask for each operand (or None), True where the op
        must not read.
      poison: operands in which NaN and infinities must act as in the reference; all floats by
        default.
      thorough: tries all laws; False tries values and gradients only; None: the first case of a
        check is thorough in its first dtype, and so is one with `shard`, `donate` or `unread`.

    >>> Case("odd", ((3, 7), (7,)), dtypes=("float32",)).make(0, "float32")[1].shape
    (7,)
    """

    name: str
    operands: tuple[Any, ...] | Callable[[np.random.Generator, str], tuple[Any, ...]]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    gradients: bool = True
    vmap: tuple[tuple[int | None, ...], ...] | None = None
    shard: tuple[Any, Any] | None = None
    donate: tuple[int, ...] = ()
    unread: Callable[..., tuple[Any, ...]] | None = None
    poison: tuple[int, ...] | None = None
    thorough: bool | None = None

    def make(self, seed: int, dtype: str) -> tuple[Any, ...]:
        """The operands of a seed."""
        rng = np.random.default_rng(seed)
        given = self.operands(rng, dtype) if callable(self.operands) else self.operands
        return tuple(_operand(x, rng, dtype) for x in given)


def _operand(x: Any, rng: np.random.Generator, dtype: str) -> Any:
    if x is None:
        return None
    if isinstance(x, tuple):
        return jnp.asarray(rng.standard_normal(x), dtype)
    return jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)


def standard_cases(
    shapes: Callable[[int, int], tuple[Any, ...]], **options: Any
) -> tuple[Case, ...]:
    """The fixed list: odd sizes, one element, no rows, and a width over the border of a tile.

    `shapes(rows, width)` gives the operands; `options` go to every `Case`.

    >>> [case.name for case in standard_cases(lambda rows, width: ((rows, width), (width,)))]
    ['odd 3 x 7', 'one 1 x 1', 'empty 0 x 8', 'padded 5 x 129']
    """
    sizes = {"odd": (3, 7), "one": (1, 1), "empty": (0, 8), "padded": (5, 129)}
    return tuple(
        Case(f"{name} {rows} x {width}", shapes(rows, width), **options)
        for name, (rows, width) in sizes.items()
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    law: str
    implementation: str
    case: str
    dtype: str
    result: str  # "ok", "FAILED", "refused" or "not tried"
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was tried and what came of it; prints as a table."""

    op: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [tuple(field.name for field in dataclasses.fields(Row))]
        lines += [dataclasses.astuple(row) for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines]
        tried = sum(row.result == "ok" for row in self.rows)
        return "\n".join([f"op_check {self.op}: {tried} ok", *(line.rstrip() for line in text)])


class CounterExample(AssertionError):
    """The first law that an implementation broke, with the operands that show it."""

    def __init__(self, op: str, row: Row, operands: tuple[Any, ...], report: Report):
        self.op, self.row, self.operands, self.report = op, row, operands, report
        values = "\n".join(f"  operand {i}: {_shown(x)}" for i, x in enumerate(operands))
        super().__init__(
            f"{op}, implementation {row.implementation!r} breaks the law {row.law!r} in the case "
            f"{row.case!r} in {row.dtype}: {row.detail}\n{values}"
        )


def _shown(x: Any) -> str:
    """An operand on one line: all of it, or how it begins.

    >>> _shown(jnp.ones((2, 99))).count("1.")
    64
    """
    if x is None:
        return "None"
    flat = np.asarray(x).reshape(-1)
    if flat.size <= 64:
        return f"{x.dtype}{x.shape} {np.asarray(x).tolist()}"
    return f"{x.dtype}{x.shape} begins {flat[:64].tolist()}"


def op_check(
    kernel: Callable[..., Any],
    cases: Sequence[Case],
    *,
    reference: Callable[..., Any] | None = None,
    implementations: Sequence[str] | None = None,
    tolerance: Tolerance | None = None,
    laws: Sequence[str] = LAWS,
    repeatable: bool = True,
    custom_calls: Sequence[str] = (),
    verbose: bool = True,
) -> Report:
    """Try every implementation of an op, on every case and dtype, against these laws:

    - reference, gradient: outputs (shapes and dtypes too) and vjp, against the reference's in
      float32 at highest precision;
    - finite differences: the reference's own gradient, in float64;
    - vmap against a loop, jit against eager, devices (shard_map, and jit of shards) against one;
    - determinism: runs are bitwise the same; donation: operands survive unless donated;
    - unread, "nan and inf": what must not be read changes nothing, elsewhere as the reference;
    - export: exported and called; recompilation: new values compile nothing.

    Every configuration of a kernel's tuning space is tried on the first case.  What fails is made
    simple by hypothesis (values, never shapes), where that is installed.

    Args:
      kernel: a `CustomKernel`, or any function with the signature of `reference`.
      cases: the first is the thorough one, see `Case.thorough`.
      reference: a custom kernel's own by default.
      implementations: names for `implementation=`; of a custom kernel by default all that run on
        the default backend; without names the function is called as it is.
      tolerance: a custom kernel's own by default.
      laws: which to try.
      repeatable: False for an op whose last bits may differ from run to run (sums by atomic
        additions): the law of determinism is left out, and donation and what must not be read may
        change results within the tolerance.
      custom_calls: targets of foreign functions, which an export must be allowed to hold.
      verbose: print the table.

    Returns:
      The table.

    Raises:
      CounterExample: the first law broken.  Errors of the implementation itself pass through.
      ValueError: no cases, no reference, an unknown law.

    >>> from aidx.kernels import KernelBuilder
    >>> kernel = KernelBuilder("doc_sine").reference(jnp.sin).build(registry=None)
    >>> case = Case("small", ((2, 3),), dtypes=("float32",))
    >>> print(op_check(kernel, [case], laws=["reference", "jit"], verbose=False))
    op_check doc_sine: 2 ok
    law        implementation  case   dtype    result  detail
    reference  (chosen)        small  float32  ok      error ...
    jit        (chosen)        small  float32  ok      error ...
    """
    name = getattr(kernel, "__name__", type(kernel).__name__)
    if isinstance(kernel, CustomKernel):
        kernel = current(kernel)
        reference, tolerance = reference or kernel.reference, tolerance or kernel.tolerance
    if reference is None or not cases or set(laws) - set(LAWS):
        raise ValueError(f"op_check of {name} needs a reference, cases, and laws out of {LAWS}: "
                         f"{reference=}, {len(cases)} cases, {laws=}")  # fmt: skip
    variants, rows = _variants(kernel, implementations)
    ran: dict[str, bool] = {}
    for label, options, first_only in variants:
        for index, case in enumerate(cases[:1] if first_only else cases):
            for dtype in case.dtypes:
                subject = Subject(
                    functools.partial(kernel, **case.static, **options),
                    functools.partial(reference, **case.static),
                    case,
                    dtype,
                    tolerance or Tolerance(),
                    tuple(custom_calls),
                    repeatable,
                )
                thorough = not first_only and _is_thorough(case, index, dtype)
                wanted = [law for law in laws if law in VALUES or thorough]
                wanted = [law for law in wanted if repeatable or law != "determinism"]
                done = _try(name, label, subject, wanted, rows)
                ran[label] = ran.get(label, False) or done
    report = Report(name, tuple(rows))
    if verbose:
        print(report)
    idle = [label for label, done in ran.items() if not done]
    if idle:
        row = next(row for row in rows if row.implementation == idle[0])
        detail = f"it refused every case, so nothing is known of it: {row.detail}"
        raise CounterExample(name, dataclasses.replace(row, detail=detail), (), report)
    return report


def _is_thorough(case: Case, index: int, dtype: str) -> bool:
    if case.thorough is not None:
        return case.thorough
    special = case.shard is not None or bool(case.donate) or case.unread is not None
    return dtype == case.dtypes[0] and (index == 0 or special)


def _variants(kernel: Any, names: Sequence[str] | None) -> tuple[list[Any], list[Row]]:
    """(label, options of the call, only on the first case), and a row for what cannot run here."""
    rows: list[Row] = []
    if not isinstance(kernel, CustomKernel):
        return [(n, {"implementation": n}, False) for n in names or ()] or [
            ("(function)", {}, False)
        ], rows
    platform = ops.platform_of(jax.default_backend())
    variants: list[Any] = []
    for entry in kernel.table:
        if names is not None and entry.name not in names:
            continue
        if not entry.runs_on(platform):
            reason = f"runs on {', '.join(entry.platforms)}; this is {platform}"
            rows.append(Row("all", entry.name, "all", "all", "not tried", reason))
        elif entry.name != REFERENCE or (names is not None):
            variants.append((entry.name, {"implementation": entry.name}, False))
            if getattr(entry.forward, "takes_config", False):
                variants += [
                    (f"{entry.name} {c}", {"implementation": entry.name, "config": c}, True)
                    for c in kernel.tuning[1:]
                ]
    if names is not None:
        ops.resolve(kernel.name, tuple(names), kernel.table)
    return variants or [("(chosen)", {}, False)], rows


def _try(op: str, label: str, subject: Subject, laws: Sequence[str], rows: list[Row]) -> bool:
    """Try the laws in turn, add their rows; False where the implementation refuses the case."""
    case, dtype = subject.case, subject.dtype
    for first, name in [(n == laws[0], n) for n in laws]:
        law = VALUES.get(name) or TRANSFORMATIONS[name]
        outcome: Outcome = "no values"
        for operands in _draws(case, dtype, name in VALUES):
            try:
                outcome = law(subject, operands)
            except (NotImplementedError, ExceptionGroup) as error:
                reasons = _refusal(error)
                if first:
                    rows.append(Row("all", label, case.name, dtype, "refused", reasons))
                    return False
                outcome = Mismatch(f"can do the case, and refuses here: {reasons}")
            if isinstance(outcome, Mismatch):
                _fail(op, label, name, law, subject, operands, outcome, rows)
        rows.append(_row(name, label, case.name, dtype, outcome))
    return True


def _refusal(error: NotImplementedError | ExceptionGroup) -> str:
    """The reasons of what was raised; anything but refusals is raised on."""
    if not isinstance(error, ExceptionGroup):
        return str(error)
    if error.split(NotImplementedError)[1] is not None:
        raise error
    return "; ".join(str(reason) for reason in error.exceptions)


def _draws(case: Case, dtype: str, several: bool) -> list[tuple[Any, ...]]:
    """Values to try: normal ones, and for the value laws others and whole numbers (ties, zeros)."""
    first = case.make(0, dtype)
    if not several:
        return [first]
    whole = lambda x: jnp.round(x) if x is not None and jnp.issubdtype(x.dtype, jnp.floating) else x
    return [first, tuple(whole(x) for x in case.make(1, dtype))]


def _row(law: str, label: str, case: str, dtype: str, outcome: Outcome) -> Row:
    if isinstance(outcome, str):
        return Row(law, label, case, dtype, "not tried", outcome)
    return Row(law, label, case, dtype, "ok", f"error {outcome:.1e}")


def _fail(
    op: str,
    label: str,
    name: str,
    law: Callable[..., Outcome],
    subject: Subject,
    operands: tuple[Any, ...],
    outcome: Mismatch,
    rows: list[Row],
) -> None:
    """Raise the simplest counterexample, with the table printed up to it."""
    if name in SHRUNK and not outcome.what.startswith("can do the case"):
        fails = lambda candidate: isinstance(law(subject, candidate), Mismatch)
        simple = shrink(operands, fails, tries=SHRUNK[name])
        found = law(subject, simple)
        if isinstance(found, Mismatch):
            outcome, operands = found, simple
    rows.append(Row(name, label, subject.case.name, subject.dtype, "FAILED", str(outcome)))
    report = Report(op, tuple(rows))
    print(report)
    raise CounterExample(op, rows[-1], operands, report)

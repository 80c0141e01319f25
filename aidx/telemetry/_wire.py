"""The programs that a trace of `jax.profiler` carries: XLA's own protocol buffers, read field by
field.

A trace names the instructions that ran; beside them, in a plane of metadata, it holds every
program that did.  `jax.profiler.ProfileData` does not show that plane, and the schemas come with no
package that JAX needs, so the few fields that matter are read here by their numbers (xplane.proto,
hlo.proto and xla_data.proto of OpenXLA).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

type Message = dict[int, list]  # field number -> its values: ints, or memoryviews

METADATA_PLANE = b"/host:metadata"
ITEM_BITS = {
    1: 8,
    2: 8,
    3: 16,
    4: 32,
    5: 64,
    6: 8,
    7: 16,
    8: 32,
    9: 64,
    10: 16,
    11: 32,
    12: 64,
    15: 64,
    16: 16,
    18: 128,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 8,
    24: 8,
    25: 8,
    28: 8,
    29: 8,
    33: 8,
}  # fmt: skip - of xla_data.proto's PrimitiveType; what is not here (tokens) has no bytes
# Instructions that move nothing themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is asked of an instruction: its op_name, and operations and bytes of one execution."""

    op_name: str
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program: its name, and its instructions by theirs."""

    name: str
    instructions: Mapping[str, Instruction]
    entry: frozenset[str] = frozenset()  # those that run once in every execution

    @functools.cached_property
    def kernels(self) -> Mapping[str, Instruction]:
        """The instructions by the names that XLA gives their kernels."""
        return {re.sub(r"[.\-]", "_", name): i for name, i in self.instructions.items()}


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a message: varints as ints, everything else as bytes.

    >>> [(number, value) for number, value in fields(memoryview(bytes([8, 150, 1])))]
    [(1, 150)]
    """
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < end:
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {at} of {end}: this is no such message")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        yield tag >> 3, data[at : at + size]
        at += size


def message(data: memoryview) -> Message:
    """A message as the lists of its fields' values.

    >>> message(memoryview(bytes([8, 1, 8, 2])))
    {1: [1, 2]}
    """
    found: Message = {}
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found


def text(values: Sequence) -> str:
    """The last of a string field's values, or nothing.

    >>> text([memoryview(b"a")]), text([])
    ('a', '')
    """
    return bytes(values[-1]).decode(errors="replace") if values else ""


def numbers(values: Sequence) -> list[int]:
    """A repeated integer, packed or not.

    >>> numbers([3, memoryview(bytes([1, 150, 1]))])
    [3, 1, 150]
    """
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        number = shift = 0
        for byte in value:
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                found.append(number)
                number = shift = 0
    return found


def traced_programs(xspace: bytes) -> dict[int, Program]:
    """The programs in an `.xplane.pb` file, by the program_id that its events carry.

    >>> traced_programs(b"")
    {}
    """
    found: dict[int, Program] = {}
    for number, plane in fields(memoryview(xspace)):
        if number != 1 or isinstance(plane, int):
            continue
        parts = message(plane)
        if text(parts.get(2, [])).encode() != METADATA_PLANE:
            continue
        names = {}  # of statistics
        for entry in parts.get(5, []):
            about = message(message(entry)[2][0])
            names[about[1][0]] = text(about.get(2, []))
        for entry in parts.get(4, []):
            stats = {}
            for stat in message(message(entry)[2][0]).get(5, []):
                values = message(stat)
                value = next((v for k, v in values.items() if k != 1), [0])
                stats[names.get(values[1][0], "")] = value[0]
            if "Hlo Proto" in stats and "program_id" in stats:
                found[int(stats["program_id"])] = read_program(stats["Hlo Proto"])
    return found


def read_program(hlo: memoryview) -> Program:
    """A program of its HloProto."""
    module = message(message(hlo)[1][0])
    computations: dict[int, dict[int, Message]] = {}  # id -> instruction id -> instruction
    roots: dict[int, int] = {}
    for data in module.get(3, []):
        parts = message(data)
        number = parts[5][0]
        computations[number] = {i[35][0]: i for i in map(message, parts.get(2, []))}
        roots[number] = parts[6][0]
    found: dict[str, Instruction] = {}
    entry = module.get(6, [None])[0]
    for instructions in computations.values():
        for instruction in instructions.values():
            about = message(instruction[7][0]) if 7 in instruction else {}
            found[text(instruction[1])] = Instruction(
                text(about.get(2, [])),
                matmul_flops(instruction, instructions, computations),
                moved_bytes(instruction, instructions, computations, roots),
            )
    once = frozenset(text(i[1]) for i in computations.get(entry, {}).values())
    return Program(text(module[1]), found, once)


def dimensions(instruction: Message) -> list[int]:
    """The axes of an instruction's result (of the first of several)."""
    shape = message(instruction[3][0])
    while 4 in shape:
        shape = message(shape[4][0])
    return numbers(shape.get(3, []))


def size(shape: memoryview) -> float:
    """Bytes of a shape, of a tuple's parts together."""
    parts = message(shape)
    if 4 in parts:
        return sum(map(size, parts[4]))
    kind = parts.get(2, [0])[0]
    return math.prod(numbers(parts.get(3, []))) * ITEM_BITS.get(kind, 0) / 8


def operands(instruction: Message, instructions: Mapping[int, Message]) -> list[Message]:
    """The instructions whose results an instruction takes."""
    return [instructions[i] for i in numbers(instruction.get(36, [])) if i in instructions]


def called(instruction: Message) -> list[int]:
    """The computations that an instruction runs."""
    return numbers(instruction.get(38, []))


def matmul_flops(
    instruction: Message,
    instructions: Mapping[int, Message],
    computations: Mapping[int, Mapping[int, Message]],
) -> float:
    """Operations of the matmuls in an instruction, those within a fusion included: 2 M N K."""
    code = text(instruction[2])
    if code == "fusion":
        return sum(
            matmul_flops(inner, computations[c], computations)
            for c in called(instruction)
            for inner in computations[c].values()
        )
    if code == "dot":
        contract = numbers(message(instruction[30][0]).get(1, []))
    elif code == "custom-call" and "cublas" in text(instruction.get(28, [])):
        contract = library_contraction(text(instruction.get(43, [])))
    else:
        return 0.0
    left = operands(instruction, instructions)
    if not left or contract is None:
        return 0.0
    inner = math.prod(dimensions(left[0])[axis] for axis in contract)
    return 2.0 * inner * math.prod(dimensions(instruction))


def library_contraction(config: str) -> list[int] | None:
    """The axes that a call of cuBLAS sums over, of its backend_config.

    >>> library_contraction('{"gemm_backend_config": {"dot_dimension_numbers": '
    ...                     '{"lhs_contracting_dimensions": ["1"]}}}')
    [1]
    """
    if not config.startswith("{"):
        return None
    for part in json.loads(config).values():
        if isinstance(part, dict) and "dot_dimension_numbers" in part:
            axes = part["dot_dimension_numbers"].get("lhs_contracting_dimensions", [])
            return [int(axis) for axis in axes]
    return None


def moved_bytes(
    instruction: Message,
    instructions: Mapping[int, Message],
    computations: Mapping[int, Mapping[int, Message]],
    roots: Mapping[int, int],
) -> float:
    """Bytes that an instruction reads and writes at least: operands and results, and of what it
    slices or updates the part."""
    code = text(instruction[2])
    if code in FREE:
        return 0.0
    given = operands(instruction, instructions)
    out = size(instruction[3][0])
    if code in ("dynamic-slice", "gather", "slice"):
        return 2 * out
    if code == "dynamic-update-slice":
        return 2 * size(given[1][3][0]) if len(given) > 1 else out
    if code != "fusion":
        return out + sum(size(g[3][0]) for g in given)
    inner = computations[called(instruction)[0]]
    root = inner[roots[called(instruction)[0]]]
    read = sum(read_of_parameter(p, inner) for p in inner.values() if text(p[2]) == "parameter")
    if text(root[2]) == "dynamic-update-slice":  # in place
        out = size(operands(root, inner)[1][3][0])
    return out + read


def read_of_parameter(parameter: Message, inner: Mapping[int, Message]) -> float:
    """Bytes that a fusion reads of a parameter: all, unless only parts of it are used."""
    whole, number = size(parameter[3][0]), parameter[35][0]
    read = 0.0
    for user in inner.values():
        places = numbers(user.get(36, []))
        if number not in places:
            continue
        code = text(user[2])
        if code in ("dynamic-slice", "gather", "slice") and places[0] == number:
            read += size(user[3][0])
        elif code == "dynamic-update-slice" and places[0] == number:
            continue  # overwritten in place
        else:
            return whole
    return min(read, whole)

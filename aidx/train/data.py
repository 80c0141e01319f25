"""Token streams on disk, packed into batches that are a pure function of a step number.

    documents --write_tokens--> a token file: ids, borders, loss mask, all memory-mapped
    PackedTokens(file, ...).batch(step) -> {"tokens", "targets", "positions", "segment_ids", ...}

An epoch is a permutation of the documents drawn from (seed, epoch), laid end to end and cut into
windows of T + 1 tokens.  Nothing is remembered between batches: the cursor of a run is its step,
so resuming is exact, and a process reads the rows that are its own.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..typing import PyTree

VERSION = 1

Document = Sequence[int] | tuple[Sequence[int], Sequence[int]]
"""Token ids; or a pair with a mask of equal length: 0 where a token is no target."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """Documents of token ids, memory-mapped.

    Attributes:
      tokens: u16 or u32 `[n]`, the documents end to end.
      borders: i64 `[documents + 1]`.
      mask: u8 `[n]`, 0 where a token is no target; None where all are.
      vocab_size: ids are below it.
    """

    tokens: np.ndarray
    borders: np.ndarray
    mask: np.ndarray | None
    vocab_size: int

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return self.borders.size - 1


def write_tokens(
    folder: str | pathlib.Path, documents: Iterable[Document], vocab_size: int
) -> TokenFile:
    """Write documents one by one (they need not fit into memory) and map what was written.

    The folder gets tokens.bin, borders.bin, mask.bin (if a document has a mask) and, at last,
    tokens.json: without it the folder is no token file, so an interrupted write is not read.

    Args:
      folder: made if absent; a token file that it holds is replaced.
      documents: token ids, or (ids, mask) pairs; empty ones are left out.
      vocab_size: V; up to 65536 ids are stored as u16, else as u32.

    Raises:
      ValueError: an id outside [0, V), a mask of another length, or no token at all.

    >>> import tempfile
    >>> file = write_tokens(tempfile.mkdtemp(), [[1, 2, 3], [4]], vocab_size=10)
    >>> file.tokens.tolist(), file.borders.tolist()
    ([1, 2, 3, 4], [0, 3, 4])
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    borders, masked = [0], False
    with (folder / "tokens.bin").open("wb") as ids_file, (folder / "mask.bin").open("wb") as masks:
        for i, document in enumerate(documents):
            pair: Any = document if isinstance(document, tuple) else (document, None)
            ids, mask = np.asarray(pair[0], np.int64), pair[1]
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(f"document {i} has ids outside [0, {vocab_size=})")
            if mask is not None and len(mask) != ids.size:
                raise ValueError(f"document {i}: {len(mask)=} differs from its {ids.size} ids")
            if not ids.size:
                continue
            masked = masked or mask is not None
            ids_file.write(ids.astype(dtype).tobytes())
            masks.write((np.ones(ids.size) if mask is None else np.asarray(mask)).astype("u1"))
            borders.append(borders[-1] + ids.size)
    if borders[-1] == 0:
        raise ValueError("there is no token to write")
    if not masked:
        (folder / "mask.bin").unlink()
    np.asarray(borders, "<i8").tofile(folder / "borders.bin")
    meta = {"version": VERSION, "dtype": dtype.str, "vocab_size": vocab_size, "mask": masked}
    meta |= {"tokens": borders[-1], "documents": len(borders) - 1}
    part = folder / "tokens.json.part"
    part.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(part, folder / "tokens.json")
    return open_tokens(folder)


def open_tokens(folder: str | pathlib.Path) -> TokenFile:
    """Map the token file in a folder.

    Raises:
      FileNotFoundError: the folder holds no (complete) token file.
      ValueError: the files do not have the sizes that tokens.json says.

    >>> open_tokens("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder holds no tokens.json (write_tokens makes one)
    """
    folder = pathlib.Path(folder)
    if not (folder / "tokens.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokens.json (write_tokens makes one)")
    meta = json.loads((folder / "tokens.json").read_text())
    if meta.get("version") != VERSION:
        raise ValueError(f"{folder} has version {meta.get('version')}, not {VERSION}")
    n, documents = meta["tokens"], meta["documents"]

    def mapped(name: str, dtype: str, size: int) -> np.ndarray:
        found, wanted = (folder / name).stat().st_size, size * np.dtype(dtype).itemsize
        if found != wanted:
            raise ValueError(f"{folder / name} has {found} bytes, tokens.json says {wanted}")
        return np.memmap(folder / name, dtype, mode="r")

    return TokenFile(
        mapped("tokens.bin", meta["dtype"], n),
        mapped("borders.bin", "<i8", documents + 1),
        mapped("mask.bin", "u1", n) if meta["mask"] else None,
        meta["vocab_size"],
    )


def read_documents(paths: Iterable[str | pathlib.Path], tokenizer: Any) -> Iterator[Document]:
    """The documents of text and JSONL files as token ids, each ended by the tokenizer's eos.

    A file is one document.  A line of a .jsonl file is one: `{"text": ...}`; or
    `{"prompt": ..., "completion": ...}`, of which the completion alone is a target; or
    `{"messages": [...]}`, written by the chat template, of which what the assistant says is.

    Args:
      paths: files; a folder stands for its .txt, .md, .py and .jsonl files, in order of name.
      tokenizer: of a `Model`.

    Raises:
      ValueError: a line that is none of these, or a tokenizer without an eos token.
      FileNotFoundError: no such path.

    >>> import pathlib, tempfile
    >>> class Bytes:
    ...     eos_token_id = 0
    ...     def encode(self, text, *, add_special_tokens=True): return list(text.encode())
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = path.write_text('{"text": "A"}' + chr(10) + '{"prompt": "B", "completion": "C"}')
    >>> list(read_documents([path], Bytes()))
    [[65, 0], ([66, 67, 0], [0, 1, 1])]
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos token to end a document with")
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    for path in expand(paths):
        if path.suffix != ".jsonl":
            yield [*encode(path.read_text(encoding="utf-8")), end]
            continue
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_document(f"{path}:{number}", line, tokenizer, encode, end)


def _json_document(where: str, line: str, tokenizer: Any, encode: Callable, end: int) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    keys = set(record) if isinstance(record, dict) else set()
    if "text" in keys:
        return [*encode(record["text"]), end]
    if {"prompt", "completion"} <= keys:
        prompt, completion = encode(record["prompt"]), encode(record["completion"])
        return [*prompt, *completion, end], [0] * len(prompt) + [1] * (len(completion) + 1)
    if "messages" in keys:
        return _chat_document(where, record["messages"], tokenizer, encode, end)
    raise ValueError(f"{where} has neither text, nor prompt and completion, nor messages")


def _chat_document(
    where: str, messages: list, tokenizer: Any, encode: Callable, end: int
) -> Document:
    """A conversation; targets are what follows the header of each of the assistant's turns."""
    ids: list[int] = []
    mask: list[int] = []
    before = ""
    for i, message in enumerate(messages):
        parts = [(tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False), 0)]
        if message["role"] == "assistant":
            asked = tokenizer.render_chat(messages[:i], add_generation_prompt=True) if i else ""
            parts = [(asked, 0), (parts[0][0], 1)]
        for text, target in parts:
            if not text.startswith(before):
                raise ValueError(f"{where}: the chat template does not append turn {i}")
            turn = encode(text[len(before) :])
            ids += turn
            mask += [target] * len(turn)
            before = text
    if not ids or ids[-1] != end:
        ids, mask = [*ids, end], [*mask, mask[-1] if mask else 0]
    return ids, mask


def expand(paths: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """Files as they are, folders as their text files in order of name.

    Raises:
      FileNotFoundError: no such path, or a folder without text.

    >>> expand(["no/such/file"])
    Traceback (most recent call last):
    FileNotFoundError: no/such/file is neither a file nor a folder
    """
    files = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            kinds = (".txt", ".md", ".py", ".jsonl")
            inside = sorted(p for p in path.rglob("*") if p.suffix in kinds and p.is_file())
            if not inside:
                raise FileNotFoundError(f"{path} holds none of {', '.join(kinds)}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} is neither a file nor a folder")
    return files


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTokens:
    """Batches of a token file by number.

    Attributes:
      file: the documents.
      batch_size: B, rows of the batch of all processes together.
      length: T, tokens of a row.
      seed: of the documents' order; None keeps theirs, every epoch.
      process: this process's place and the number of processes; the batch's rows
        `place::number` are read here.

    Raises:
      ValueError: sizes that are not positive, rows that do not divide over the processes, or fewer
        tokens than one batch.

    >>> import tempfile
    >>> file = write_tokens(tempfile.mkdtemp(), [[1, 2, 3], [4, 5]], vocab_size=10)
    >>> batch = PackedTokens(file, batch_size=1, length=4, seed=None).batch(0)
    >>> {name: batch[name][0].tolist() for name in ("tokens", "targets", "positions")}
    {'tokens': [1, 2, 3, 4], 'targets': [2, 3, -1, 5], 'positions': [0, 1, 2, 0]}
    """

    file: TokenFile
    batch_size: int
    length: int
    seed: int | None = 0
    process: tuple[int, int] = (0, 1)

    def __post_init__(self):
        place, number = self.process
        if self.batch_size < 1 or self.length < 1:
            raise ValueError(f"{self.batch_size=} and {self.length=} must be positive")
        if not 0 <= place < number or self.batch_size % number:
            raise ValueError(f"{self.batch_size=} does not divide over {self.process=}")
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{self.file.tokens.size} tokens are less than one batch of "
                f"{self.batch_size} x ({self.length} + 1)"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the rest of an epoch's tokens is left out of it."""
        return (int(self.file.tokens.size) - 1) // (self.batch_size * self.length)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step` of the run: this process's rows, i32 `[B / processes, T]`.

        A target is the next token of the same document, or -1 (no loss) where there is none or the
        mask says so.  Positions restart with every document; segment ids ascend along a row.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        place, number = self.process
        rows = [
            self._row(epoch, within * self.batch_size + row)
            for row in range(place, self.batch_size, number)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Tokens `[index * T, (index + 1) * T]` of the epoch's stream."""
        order, starts = self._epoch(epoch)
        begin, end = index * self.length, (index + 1) * self.length + 1
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        ids, live, places, segments = [], [], [], []
        for segment, at in enumerate(range(first, len(order))):
            if starts[at] >= end:
                break
            document = order[at]
            low = max(begin - starts[at], 0)
            high = min(end, starts[at + 1]) - starts[at]
            here = slice(self.file.borders[document] + low, self.file.borders[document] + high)
            ids.append(self.file.tokens[here].astype(np.int32))
            live.append(np.ones(high - low) if self.file.mask is None else self.file.mask[here])
            places.append(np.arange(low, high, dtype=np.int32))
            segments.append(np.full(high - low, segment, np.int32))
        tokens, mask, positions, segment_ids = map(np.concatenate, (ids, live, places, segments))
        same = segment_ids[1:] == segment_ids[:-1]
        return {
            "tokens": tokens[:-1],
            "targets": np.where(same & (mask[1:] > 0), tokens[1:], -1).astype(np.int32),
            "positions": positions[:-1] - positions[0] * (segment_ids[:-1] == 0),
            "segment_ids": segment_ids[:-1],
        }

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return _epoch_order(self.file, self.seed, epoch)


@functools.lru_cache(maxsize=4)
def _epoch_order(file: TokenFile, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents in the epoch's order, and where each starts in its stream `[documents + 1]`."""
    order = np.arange(file.num_documents)
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(file.num_documents)
    starts = np.concatenate([[0], np.cumsum(np.diff(file.borders)[order])])
    return order, starts


def prefetch(
    batch: Callable[[int], PyTree],
    steps: Iterable[int],
    *,
    depth: int = 2,
    sharding: jax.sharding.Sharding | None = None,
) -> Generator[tuple[int, PyTree]]:
    """`(step, batch on the device)` for every step, made by a thread `depth` batches ahead.

    What `batch` raises is raised when its turn comes.  Closing the generator ends the thread.

    Args:
      batch: makes the batch of a step on the host: `PackedTokens(...).batch`.
      steps: which, in order.
      depth: batches that are made before they are asked for.
      sharding: of every leaf; with several processes each gives its own rows.  None is the default
        device.

    Raises:
      ValueError: depth is not positive.

    >>> for step, x in prefetch(lambda step: np.full(2, step), range(2)):
    ...     print(step, x.tolist())
    0 [0, 0]
    1 [1, 1]
    """
    if depth < 1:
        raise ValueError(f"{depth=} must be positive")

    def make(step: int) -> PyTree:
        host = batch(step)
        if sharding is None:
            return jax.device_put(host)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), host
        )

    def run() -> Generator[tuple[int, PyTree]]:
        coming: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(1, "aidx-prefetch") as pool:
            try:
                for step in steps:
                    coming.append((step, pool.submit(make, step)))
                    if len(coming) > depth:
                        at, future = coming.popleft()
                        yield at, future.result()
                while coming:
                    at, future = coming.popleft()
                    yield at, future.result()
            finally:
                for _, future in coming:
                    future.cancel()

    return run()


def device_crops(tokens: jax.Array, key: jax.Array, batch_size: int, length: int) -> jax.Array:
    """`batch_size` windows of length + 1 tokens at random places of a stream on the device, i32.

    For corpora that fit into the GPU's memory: nothing crosses the host.

    Args:
      tokens: integers `[n]`.
      key: of the step.
      batch_size: B.
      length: T.

    Raises:
      ValueError: the stream is shorter than a window.

    >>> import jax.numpy as jnp
    >>> device_crops(jnp.arange(9), jax.random.key(0), 2, 3).shape
    (2, 4)
    """
    if tokens.shape[0] <= length:
        raise ValueError(f"{tokens.shape=} is shorter than a window of {length} + 1")
    starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - length)
    window = lambda start: jax.lax.dynamic_slice(tokens, (start,), (length + 1,))
    return jax.vmap(window)(starts).astype("int32")

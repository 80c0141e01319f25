"""Packed batches: every token once, by number alone, whatever the processes."""

import json
import pathlib
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidx.train import (
    PackedTokens,
    device_crops,
    open_tokens,
    prefetch,
    read_documents,
    write_tokens,
)


@pytest.fixture
def file(tmp_path):
    """Forty documents of 1 to 12 tokens; every token says where it is: 20 * document + place."""
    lengths = np.random.default_rng(0).integers(1, 13, 40)
    return write_tokens(tmp_path, [20 * i + np.arange(n) for i, n in enumerate(lengths)], 1000)


def every_batch(data, epoch=0):
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return [data.batch(step) for step in steps]


def check_rows(batch):
    """The meaning of a row from its own tokens (20 * document + place)."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    document, place = tokens // 20, tokens % 20
    assert (np.diff(segments) >= 0).all() and (segments[:, 0] == 0).all()
    # A new segment exactly where another document begins.
    assert ((np.diff(segments) > 0) == (np.diff(document) != 0)).all()
    same = np.diff(document) == 0
    assert (batch["targets"][:, :-1][same] == tokens[:, 1:][same]).all()
    assert (batch["targets"][:, :-1][~same] == -1).all()
    first = np.where(segments == 0, place[:, :1], 0)  # a row may begin within a document
    assert (batch["positions"] == place - first).all()


@pytest.mark.smoke
@pytest.mark.parametrize("seed", [None, 7])
def test_an_epoch_is_every_token_once_in_rows_that_mean_what_they_say(file, seed):
    data = PackedTokens(file, batch_size=3, length=8, seed=seed)
    batches = every_batch(data)
    for batch in batches:
        check_rows(batch)
    seen = np.concatenate([b["tokens"].ravel() for b in batches])
    assert len(set(seen.tolist())) == seen.size == data.steps_per_epoch * 24
    assert file.tokens.size - seen.size <= 24
    if seed is None:
        assert (seen == file.tokens[: seen.size]).all()
    else:
        assert set(seen.tolist()) <= set(file.tokens.tolist())
        other = every_batch(data, epoch=1)
        assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(batches, other, strict=True))


@pytest.mark.smoke
def test_the_cursor_is_the_step_and_the_seed(file):
    data = PackedTokens(file, 3, 8, seed=1)
    again = PackedTokens(open_tokens(pathlib.Path(file.tokens.filename).parent), 3, 8, seed=1)
    for step in (5, 0, 17, 5):
        for name, x in data.batch(step).items():
            assert (x == again.batch(step)[name]).all()
    assert (data.batch(0)["tokens"] != PackedTokens(file, 3, 8, seed=2).batch(0)["tokens"]).any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_disjoint_rows_of_one_batch(file, processes):
    whole = PackedTokens(file, 4, 8).batch(2)
    parts = [PackedTokens(file, 4, 8, process=(p, processes)).batch(2) for p in range(processes)]
    for name in whole:
        joined = np.stack([part[name] for part in parts], 1).reshape(whole[name].shape)
        assert (joined == whole[name]).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 9),
    st.none() | st.integers(0, 5),
)
def test_any_documents_pack(tmp_path_factory, lengths, batch_size, length, seed):
    documents = [20 * i + np.arange(n) for i, n in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("tokens")
    total = sum(lengths)
    if not total:
        with pytest.raises(ValueError, match="no token"):
            write_tokens(folder, documents, 1000)
        return
    file = write_tokens(folder, documents, 1000)
    if total - 1 < batch_size * length:
        with pytest.raises(ValueError, match="less than one batch"):
            PackedTokens(file, batch_size, length, seed)
        return
    for batch in every_batch(PackedTokens(file, batch_size, length, seed), epoch=1):
        check_rows(batch)


def test_masked_tokens_are_no_targets(tmp_path):
    file = write_tokens(tmp_path, [([1, 2, 3, 4], [0, 0, 1, 1]), [5, 6]], 10)
    batch = PackedTokens(file, 1, 5, seed=None).batch(0)
    assert batch["targets"].tolist() == [[-1, 3, 4, -1, 6]]


def test_wide_vocabularies_take_four_bytes(tmp_path):
    assert write_tokens(tmp_path / "a", [[65535]], 1 << 16).tokens.dtype == np.uint16
    wide = write_tokens(tmp_path / "b", [[128255, 1]], 128256)
    assert wide.tokens.dtype == np.uint32 and wide.tokens.tolist() == [128255, 1]


def test_broken_files_and_wrong_documents_are_refused(tmp_path, file):
    with pytest.raises(ValueError, match="document 1 has ids outside"):
        write_tokens(tmp_path / "x", [[1], [10]], 10)
    with pytest.raises(FileNotFoundError, match=r"tokens\.json"):  # the write did not end
        open_tokens(tmp_path / "x")
    with pytest.raises(ValueError, match="differs from its 2 ids"):
        write_tokens(tmp_path / "x", [([1, 2], [1])], 10)
    folder = pathlib.Path(file.tokens.filename).parent
    with (folder / "tokens.bin").open("ab") as f:
        f.write(b"x")
    with pytest.raises(ValueError, match=r"tokens\.bin has"):
        open_tokens(folder)
    meta = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        open_tokens(folder)
    with pytest.raises(ValueError, match=r"batch_size=3.*process=\(0, 2\)"):
        PackedTokens(file, 3, 8, process=(0, 2))
    with pytest.raises(ValueError, match="length=0"):
        PackedTokens(file, 3, 0)


class Letters:
    """A byte tokenizer with a chat template of one line per turn."""

    eos_token_id = 0

    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def render_chat(self, messages, *, add_generation_prompt=True):
        text = "".join(f"<{m['role'][0]}>{m['content']}\n" for m in messages)
        return text + "<a>" * add_generation_prompt


def test_text_and_jsonl_become_documents(tmp_path):
    (tmp_path / "b.txt").write_text("hi")
    turns = [("user", "q"), ("assistant", "r"), ("user", "s"), ("assistant", "t")]
    lines = [
        {"prompt": "ab", "completion": "c"},
        {"messages": [{"role": r, "content": c} for r, c in turns]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    prompt, chat, text = read_documents([tmp_path], Letters())
    assert text == [*b"hi", 0] and prompt == ([*b"abc", 0], [0, 0, 1, 1])
    ids, mask = chat
    assert bytes(ids) == b"<u>q\n<a>r\n<u>s\n<a>t\n\0"
    assert bytes(i for i, m in zip(ids, mask, strict=True) if m) == b"r\nt\n\0"


def test_lines_that_say_nothing_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"txet": "y"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 has neither"):
        list(read_documents([path], Letters()))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is not JSON"):
        list(read_documents([path], Letters()))
    no_end = Letters()
    no_end.eos_token_id = None
    with pytest.raises(ValueError, match="no eos"):
        list(read_documents([path], no_end))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        list(read_documents([tmp_path / "empty"], Letters()))


def test_prefetch_keeps_order_runs_ahead_and_raises_in_turn():
    made, gate = [], threading.Event()

    def batch(step):
        made.append(step)
        if len(made) >= 3:
            gate.set()
        if step == 4:
            raise RuntimeError("no batch 4")
        return {"x": np.full(2, step)}

    coming = prefetch(batch, range(6), depth=2)
    assert next(coming)[1]["x"].tolist() == [0, 0]
    assert gate.wait(10)  # two more were made without being asked for
    assert [next(coming)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="no batch 4"):
        next(coming)
    with pytest.raises(ValueError, match="depth=0"):
        prefetch(batch, range(2), depth=0)


def test_prefetch_places_by_a_sharding():
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ((_, x),) = prefetch(lambda step: np.ones((2, 3)), [0], sharding=sharding)
    assert x.sharding == sharding and x.shape == (2, 3)


def test_crops_are_windows_of_the_stream():
    stream = jax.numpy.arange(50, dtype=jax.numpy.uint16)
    crops = np.asarray(device_crops(stream, jax.random.key(1), 64, 7))
    assert (np.diff(crops, axis=1) == 1).all() and crops.dtype == np.int32
    assert crops[:, 0].min() < 10 and crops[:, 0].max() > 32  # both ends can be drawn
    with pytest.raises(ValueError, match="shorter than a window"):
        device_crops(stream, jax.random.key(1), 2, 50)

"""The corpus of the embedded model: Python's own standard library, as bytes, files and tokens.

The list of files is a function of the interpreter alone, whole files are held out by a hash of
their path, and the tokenizer is a byte-level BPE that any text survives.
"""

import hashlib
import json
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# Indentation and line ends are tokens of their own, so a prompt may end after either; the space
# before a word belongs to the word.
SPLIT = r"(?:[ \t]*\r?\n)+|(?<=\n)[ \t]+| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

# Tables written by programs: character maps, and a grammar's pickled automaton.
GENERATED = ("encodings/", "pydoc_data/", "lib2to3/pgen2/", "test/test_unicode_identifiers")


def source_files(root: pathlib.Path | None = None) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every distinct UTF-8 source file of the standard library, sorted.

    Installed packages, generated tables, empty files and exact duplicates are left out.
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if "site-packages" in path.parts or name.startswith(GENERATED):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # files that test how Python treats broken encodings
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield name, text


def held_out(name: str, share: float = 0.02) -> bool:
    """Whether the whole file `name` is kept away from training: a fixed function of its path.

    >>> sum(held_out(f"file{i}.py") for i in range(10_000)) / 10_000
    0.0188
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < share * 2**64


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens; id 0 is `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(folder: pathlib.Path, vocab_size: int = 4096, root: pathlib.Path | None = None) -> dict:
    """Write tokenizer.json, train.bin and heldout.bin (uint16) and corpus.json; return the latter.

    Every file under `root` (the standard library) is a document: `<|endoftext|>`, then its tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = list(source_files(root))
    parts = {
        "train": [text for name, text in files if not held_out(name)],
        "heldout": [text for name, text in files if held_out(name)],
    }
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end = tokenizer.token_to_id(END_OF_TEXT)
    meta: dict = {"python": platform.python_version(), "vocab_size": tokenizer.get_vocab_size()}
    for part, texts in parts.items():
        documents = tokenizer.encode_batch(texts)
        tokens = np.concatenate([np.array([end, *d.ids], np.uint16) for d in documents])
        tokens.tofile(folder / f"{part}.bin")
        size = sum(len(text.encode()) for text in texts)
        meta[part] = {"files": len(texts), "bytes": size, "tokens": int(tokens.size)}
    (folder / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta

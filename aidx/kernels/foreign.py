"""Foreign functions (C++, CUDA) as implementations, through XLA's FFI."""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
from collections.abc import Mapping, Sequence

import jax


def build_library(
    source: str | pathlib.Path,
    library: str | pathlib.Path,
    *,
    compiler: str = "g++",
    flags: Sequence[str] = ("-O3",),
) -> pathlib.Path:
    """Compile C++ (or with `compiler="nvcc"` CUDA) that includes `xla/ffi/api/ffi.h`.

    Args:
      source: the file to compile.
      library: the shared library to write.
      compiler: a g++ or nvcc of at least C++17.
      flags: more flags.

    Raises:
      FileNotFoundError: there is no such compiler.
      RuntimeError: it did not compile; the compiler's words.

    >>> build_library("none.cc", "none.so", compiler="no-such-compiler")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'no-such-compiler'
    """
    shared = ["-Xcompiler", "-fPIC"] if pathlib.Path(compiler).name == "nvcc" else ["-fPIC"]
    command = [compiler, "-std=c++17", "-shared", *shared, f"-I{jax.ffi.include_dir()}", *flags]
    done = subprocess.run(
        [*command, str(source), "-o", str(library)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed on {source}:\n{done.stderr[-4000:]}")
    return pathlib.Path(library)


def load_library(
    library: str | pathlib.Path, targets: Mapping[str, str], *, platform: str = "cpu"
) -> None:
    """Register handlers of a shared library as FFI targets, for `jax.ffi.ffi_call(target, ...)`.

    Args:
      library: the shared library; it stays loaded.
      targets: `{target: symbol}`; a symbol is made by `XLA_FFI_DEFINE_HANDLER_SYMBOL`.
      platform: "cpu" or "CUDA".

    Raises:
      OSError: the library cannot be loaded.
      ValueError: it lacks a symbol.

    >>> import ctypes.util
    >>> load_library(ctypes.util.find_library("c"), {"doc_target": "no_such_handler"})
    Traceback (most recent call last):
    ValueError: ... has no symbol 'no_such_handler'
    """
    loaded = ctypes.CDLL(str(library))
    for target, symbol in targets.items():
        if not hasattr(loaded, symbol):
            raise ValueError(f"{library} has no symbol {symbol!r}")
        handler = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(target, handler, platform=platform)

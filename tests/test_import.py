"""`import aidx` is light: no optional package, no backend, no device memory."""

import subprocess
import sys

import pytest

OPTIONAL = (
    "optax",
    "orbax",
    "tensorboardX",
    "google_crc32c",
    "fastapi",
    "uvicorn",
    "torch",
    "transformers",
    "flax.nnx",
    "jax.experimental.pallas",
)


def run(code: str) -> str:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return out.stdout.strip()


@pytest.mark.smoke
def test_import_pulls_in_nothing_optional():
    code = f"import sys, aidx; print([m for m in {OPTIONAL} if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.smoke
def test_import_starts_no_backend():
    code = "import aidx; from jax._src import xla_bridge; print(dict(xla_bridge._backends))"
    assert run(code) == "{}"


def test_every_public_name_is_there_and_documented():
    import aidx

    public = [name for name in dir(aidx) if name[0] != "_" and name != "TYPE_CHECKING"]
    objects = {name: getattr(aidx, name) for name in public}
    undocumented = [
        name for name, value in objects.items() if callable(value) and not value.__doc__
    ]
    expected = {"LLM", "flash_attention", "paged_attention", "KVCache", "train", "Ragged", "vmap"}
    assert expected <= set(objects)
    with pytest.raises(AttributeError, match="nothing_such"):
        aidx.nothing_such  # noqa: B018
    assert undocumented == []

"""Who may import whom.  ALLOWED is the diagram of docs/architecture.md; a new room adds a line."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# room -> (rooms it may import, third parties it may import beyond jax, numpy, flax.struct)
BELOW_CACHE = {"typing", "ops", "kernels", "parallel", "telemetry"}
BELOW_ENGINE = BELOW_CACHE | {"cache", "arrays"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "pallas_kernels": (set(), set()),
    "typing": (set(), set()),
    "parallel": ({"typing"}, {"numpy"}),
    "telemetry": ({"typing"}, {"numpy", "tensorboardX", "google_crc32c"}),
    "ops": ({"pallas_kernels", "typing"}, {"numpy", "flax"}),
    "kernels": ({"ops", "typing"}, {"numpy", "hypothesis"}),
    "cache": (BELOW_CACHE, {"numpy", "flax"}),
    "arrays": (
        BELOW_CACHE | {"cache"},
        {"numpy", "flax", "safetensors", "scipy"},
    ),
    "models": (
        BELOW_CACHE,
        {"numpy", "flax", "safetensors", "tokenizers", "jinja2", "huggingface_hub"},
    ),
    "engine": (BELOW_ENGINE, {"numpy", "flax"}),
    "train": (BELOW_ENGINE | {"models"}, {"numpy", "flax", "optax", "orbax", "rich"}),
    "distill": (BELOW_ENGINE | {"models", "train"}, {"numpy", "flax", "optax"}),
    "rl": (BELOW_ENGINE, {"numpy", "flax", "gymnasium"}),
    "llm": (BELOW_ENGINE | {"models", "engine"}, {"numpy", "flax", "rich"}),
    "serve": (
        BELOW_ENGINE | {"models", "engine", "llm"},
        {"numpy", "fastapi", "uvicorn", "prometheus_client", "pydantic"},
    ),
    "cli": (
        BELOW_ENGINE | {"models", "engine", "llm", "serve", "train"},
        {"numpy", "rich"},
    ),
}
STDLIB_OR_JAX = {"jax", "jaxlib", "aidx", "pallas_kernels"}


def room_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "pallas_kernels" else parts[1]


def imports(path: pathlib.Path):
    """(absolute dotted name, line) of every import in the file, nested ones included."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            module = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def violations(path: pathlib.Path):
    room = room_of(path)
    if room not in ALLOWED:
        yield f"{path.relative_to(ROOT)}: room {room!r} has no line in ALLOWED"
        return
    rooms, third = ALLOWED[room]
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "aidx":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target == "__version__":
                continue
        elif parts[0] == "pallas_kernels":
            target = "pallas_kernels"
        elif parts[0] in third | STDLIB_OR_JAX or parts[0] in sys.stdlib_module_names:
            continue
        else:
            yield f"{path.relative_to(ROOT)}:{line} imports {name}, which {room} may not"
            continue
        if target != room and target not in rooms:
            yield f"{path.relative_to(ROOT)}:{line} room {room} imports room {target}"


def files():
    for package in ("aidx", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py" and path.parent == ROOT / "aidx":
                continue  # the public names: re-exports from every room
            yield path


@pytest.mark.smoke
@pytest.mark.parametrize("path", list(files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_diagram(path):
    assert list(violations(path)) == []


def test_a_forbidden_import_is_found(tmp_path, monkeypatch):
    bad = tmp_path / "aidx" / "cache" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from aidx.models import llama\nimport optax\nfrom ..engine import step\n")
    monkeypatch.setattr("tests.test_layering.ROOT", tmp_path)
    assert len(list(violations(bad))) == 3

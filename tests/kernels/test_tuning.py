"""A custom kernel is tuned without a word from its author; `aidx tune` and `aidx info` know it."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aidx.cli
from aidx.kernels import REGISTRY, register
from aidx.ops import autotune
from aidx.ops.autotune import Tuning, store
from tests.kernels import tuned_kernel

X, SCALE = jnp.arange(32.0).reshape(8, 4), jnp.arange(4.0)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_read", {})
    with autotune.mode("off", cache=str(tmp_path / "cache")):
        yield tuned_kernel.build(REGISTRY)
    REGISTRY.unregister("test_pieces")


def chosen(kernel, *args, **options):
    (choice,) = kernel.explain(*args, **options)[0].configs
    return choice.config, choice.source


def timer(trial, config):
    return 1.0 / config  # the highest would win


@pytest.mark.smoke
def test_a_call_takes_the_tuners_choice_in_every_transformation(kernel):
    assert chosen(kernel, X, SCALE) == (1, "default")
    assert chosen(kernel, X, SCALE, config=2) == (2, "explicit")
    with autotune.mode("on", timer=timer):
        assert chosen(kernel, X, SCALE) == (2, "tuned")  # 3 refuses and 5 is wrong
        want = X * SCALE[None]
        grad = jax.grad(lambda x: kernel(x, SCALE).sum())
        np.testing.assert_array_equal(jax.jit(kernel)(X, SCALE), want)
        np.testing.assert_array_equal(grad(X), jnp.broadcast_to(SCALE, X.shape))
        many = jnp.stack([X, 2 * X])
        got = jax.vmap(lambda x: kernel(x, SCALE))(many)
        np.testing.assert_array_equal(got, jnp.stack([want, 2 * want]))
    assert chosen(kernel, X, SCALE) == (2, "disk cache")
    assert chosen(kernel, X, SCALE, power=2) == (1, "default")  # another call


def test_a_kernel_of_a_script_that_left_no_module_behind_is_known_by_its_file(kernel):
    """As of one that runpy ran."""
    script = runpy.run_path(tuned_kernel.__file__)["build"](None)
    with autotune.mode("on", timer=timer):
        assert chosen(script, X, SCALE) == (2, "tuned")
    assert chosen(script, X, SCALE) == (2, "disk cache")
    np.testing.assert_array_equal(jax.jit(script)(X, SCALE), X * SCALE[None])


def test_the_registry_and_the_tuner_know_the_same_kernels(kernel):
    assert [t.name for t in autotune.tunables("test_pieces")] == ["test_pieces/pieces"]

    @register("test_pieces", "others")
    def others(x, scale, *, power=1, config):
        return x * scale[None] ** power

    names = [t.name for t in autotune.tunables("test_pieces")]
    assert names == ["test_pieces/others", "test_pieces/pieces"]
    REGISTRY.unregister("test_pieces")
    with pytest.raises(ValueError, match="nothing of 'test_pieces' can be tuned"):
        autotune.tunables("test_pieces")
    REGISTRY.register(kernel)


def test_info_prints_it(kernel, capsys):
    assert aidx.cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "kernel test_pieces: pieces, reference; tuned: test_pieces/pieces" in out
    assert "tuning: mode off, 0 shapes shipped for this device, disk cache" in out
    assert aidx.cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"test_pieces", "rms_norm"} <= {k["name"] for k in found["custom_kernels"]}


def test_aidx_tune_times_it_in_a_worker_and_later_calls_find_that(
    kernel, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("AIDX_TEST_TOYS", "1")  # the worker's
    table = tmp_path / "table.json"
    command = ["tune", "--op", "test_pieces", "--import", "tests.kernels.tuned_kernel",
               "--output", str(table)]  # fmt: skip
    assert aidx.cli.main(command) == 0
    out = capsys.readouterr().out
    assert "test_pieces" in out and "8x4 4" in out
    (entry,) = Tuning.load(table).entries
    failures = {m.config: m.failure for m in entry.measurements if m.failure}
    assert failures["3"] == "refused: three pieces do not fit"
    assert failures["5"].startswith("wrong: error")
    config, source = chosen(kernel, X, SCALE)
    assert (json.dumps(config), source) == (entry.best(["1", "2"]).config, "disk cache")
    assert aidx.cli.main([*command, "--json"]) == 0  # from the disk cache
    said = json.loads(capsys.readouterr().out)
    assert (said["timed"], said["default"]) == (2, 1)
    assert Tuning.load(table).entries == (entry,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to tune"),
        (["--op", "x", "--timeout", "0"], "--timeout 0.0 is not positive"),
        (["--op", "x", "--memory-fraction", "2"], "--memory-fraction 2.0 is not a share"),
        (["--op", "nothing", "--import", "no_such_module"], "No module named 'no_such_module'"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message, capsys):
    assert aidx.cli.main(["tune", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert aidx.cli.main(["tune", "--help"]) == 0
    assert "examples:\n  aidx tune" in capsys.readouterr().out

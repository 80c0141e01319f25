"""What is written is read back by TensorBoard's own reader, equal."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
import wave

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aidx.telemetry._histogram import device_histogram, tensorflow_edges, unpacked
from aidx.telemetry._png import encode_png
from aidx.telemetry._report import host_row
from aidx.telemetry.profiler import DeviceRow, Peak, ProfileReport
from aidx.telemetry.tensorboard import SummaryWriter, TensorBoardCallback
from aidx.train import fit, init_state, make_evaluate, make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorBoard's own imports
    from PIL import Image
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorboard.plugins.mesh import metadata as mesh_metadata
    from tensorboard.plugins.mesh import plugin_data_pb2 as mesh_plugin
    from tensorboard.util import tensor_util


def read(folder):
    """An EventAccumulator that keeps everything and converts nothing away."""
    everything = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    return event_accumulator.EventAccumulator(str(folder), everything).Reload()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "value",
    [1.5, np.float64(1.5), jnp.float32(1.5), jnp.array([[1.5]], jnp.bfloat16),
     jnp.array(1.5, jnp.float8_e4m3fn), jnp.float16(1.5)],
    ids=str,
)  # fmt: skip
def test_a_scalar_of_any_kind_is_read_back(tmp_path, value):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("a/b", value, jnp.int32(7), walltime=123.5)
    (event,) = read(tmp_path).Scalars("a/b")
    assert (event.wall_time, event.step, event.value) == (123.5, 7, 1.5)


def test_tensors_and_scalars_of_the_new_style_keep_their_precision(tmp_path):
    third = np.float64(1) / 3
    arrays = {
        "i": np.arange(6, dtype=np.int16).reshape(2, 3), "flag": np.array([True, False]),
        "half": jnp.array([[1.5]], jnp.bfloat16), "empty": np.zeros((0, 2), np.int32),
    }  # fmt: skip
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("double", third, 1, double_precision=True)
        writer.add_scalar("single", third, 1, new_style=True)
        for name, x in arrays.items():
            writer.add_tensor(name, x, 2)
        with pytest.raises(ValueError, match="display_name='x'"):
            writer.add_scalar("double", third, 1, new_style=True, display_name="x")
    found = read(tmp_path)
    tensor = lambda tag: tensor_util.make_ndarray(found.Tensors(tag)[0].tensor_proto)
    assert tensor("double").item() == third and tensor("double").dtype == np.float64
    assert tensor("single").item() == np.float32(third)
    assert found.SummaryMetadata("double").plugin_data.plugin_name == "scalars"
    for name, x in arrays.items():
        assert tensor(name).shape == x.shape and (tensor(name) == np.asarray(x)).all()


def test_a_profile_is_text_and_a_curve_for_every_scope(tmp_path):
    rows = (
        DeviceRow(("loss", "layer_0"), 0.5, 3, 2e12, 1e9),
        DeviceRow(("loss", "layer_1"), 0.25, 3, 1e12, 1e9),
        DeviceRow(("tiny",), 0.001, 1, 0.0, 0.0),
    )
    program = {"program": "jit_f", "peak": 3 * 2**20}
    report = ProfileReport(
        1.0, (host_row(("step",), [0.004, 0.006, 0.1]),), rows, 0.751, (program,),
        peak=Peak(8e12, 8e9),
    )  # fmt: skip
    with SummaryWriter(tmp_path) as writer:
        writer.add_profile("profile", report, 12)
    found = read(tmp_path)
    scalars = {
        tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }
    wanted = {
        "device_busy_share": 0.751, "host_ms/step": 6.0, "device_ms/loss": 750.0,
        "device_ms/loss/layer_n": 750.0, "of_flops_peak/loss": 0.5,
        "of_flops_peak/loss/layer_n": 0.5,
        "of_hbm/loss": 1 / 3, "of_hbm/loss/layer_n": 1 / 3, "memory_mib/jit_f": 3.0,
    }  # fmt: skip
    assert set(scalars) == {f"profile/{name}" for name in wanted}
    for name, value in wanted.items():
        assert scalars[f"profile/{name}"] == [(12, pytest.approx(value, rel=1e-6))]
    (text,) = tensor_util.make_ndarray(found.Tensors("profile/text_summary")[0].tensor_proto)
    assert "| loss/layer_* | 750.000 |" in text.decode()


def test_scalars_of_a_chart_are_runs_of_their_own(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalars("loss", {"train": 1.0, "test": jnp.float32(2.0)}, 3)
    for run, value in (("loss_train", 1.0), ("loss_test", 2.0)):
        (event,) = read(tmp_path / run).Scalars("loss")
        assert (event.step, event.value) == (3, value)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("dtype", "counted"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float8_e5m2, False), (jnp.int32, False)],
)
def test_histograms_are_numpys_to_the_count(tmp_path, monkeypatch, dtype, counted):
    # As on a GPU, where the device counts.
    monkeypatch.setattr("aidx.telemetry.tensorboard.counted_on_device", lambda x: counted)
    x = jax.random.normal(jax.random.key(0), (500,)) * 10
    x = jnp.concatenate([x, jnp.zeros(3), jnp.array([1e-12, -1e-12, 1.1e-12])]).astype(dtype)
    with SummaryWriter(tmp_path) as writer:
        writer.add_histogram("h", x, 2)
        writer.add_histogram("few", x, 2, max_bins=8)
        writer.add_histogram("ten", x, 2, bins=[-40.0, 0.0, 10.0, 40.0])
    found = read(tmp_path)
    values = np.asarray(x).astype(np.float64)
    (event,) = found.Histograms("h")
    h = event.histogram_value
    counts, edges = np.histogram(values, tensorflow_edges())
    full = np.zeros(counts.size, int)
    places = np.searchsorted(edges[1:], h.bucket_limit)
    np.add.at(full, places, np.array(h.bucket, int))
    assert (full == counts).all() and event.step == 2
    assert (h.num, h.min, h.max) == (values.size, values.min(), values.max())
    assert h.sum == pytest.approx(values.sum(), rel=1e-4, abs=1e-3)
    assert h.sum_squares == pytest.approx((values**2).sum(), rel=1e-5)
    assert sum(found.Histograms("few")[0].histogram_value.bucket) == values.size
    assert len(found.Histograms("few")[0].histogram_value.bucket) <= 9
    ten = found.Histograms("ten")[0].histogram_value
    wanted = np.histogram(values, [-40, 0, 10, 40])[0]
    assert list(ten.bucket)[-3:] == wanted.tolist()


def test_values_that_are_not_finite_are_left_out_of_a_histogram():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 2.0, -3.0])
    found = unpacked(np.asarray(device_histogram(x)))
    assert int(found["num"]) == int(found["counts"].sum()) == 2
    assert (float(found["min"]), float(found["max"]), float(found["sum"])) == (-3, 2, -1)


def test_edges_are_decided_as_numpy_decides_them():
    """f32 values just below, on and above every edge land in the bins of f64 arithmetic."""
    near = tensorflow_edges().astype(np.float32)
    x = np.concatenate([np.nextafter(near, -np.inf), near, np.nextafter(near, np.inf)])
    x = x[(x == 0) | (np.abs(x) > 1e-37)]  # XLA on a CPU takes denormal numbers for zero
    wanted = np.histogram(x.astype(np.float64), tensorflow_edges())[0]
    assert (unpacked(np.asarray(device_histogram(jnp.asarray(x))))["counts"] == wanted).all()


def test_trees_sharded_arrays_and_donated_ones_are_written_as_they_were(tmp_path):
    mesh = jax.make_mesh((1,), ("x",))
    sharded = jax.device_put(
        jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    donate = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    with SummaryWriter(tmp_path) as writer:
        tree = {"layers": ({"w": jnp.full((2, 2), 3.0)},), "s": sharded, "n": jnp.float32(5.0)}
        writer.add_histograms("params", tree, 1)
        writer.add_scalar("n", tree["n"], 1)
        donate(tree)
        mutable = np.ones(2)
        writer.add_histogram("mutable", mutable, 1)
        mutable[:] = 9
    found = read(tmp_path)
    assert set(found.Tags()["histograms"]) == {
        "params/layers/0/w", "params/s", "params/n", "mutable",
    }  # fmt: skip
    h = {t: found.Histograms(t)[0].histogram_value for t in found.Tags()["histograms"]}
    assert (h["params/layers/0/w"].min, h["params/layers/0/w"].num) == (3, 4)
    assert h["params/s"].sum == 28 and h["mutable"].max == 1
    assert found.Scalars("n")[0].value == 5


@pytest.mark.smoke
def test_calls_inside_jit_are_callbacks(tmp_path):
    with SummaryWriter(tmp_path) as writer:

        @jax.jit
        def step(x, i):
            writer.add_scalar("inside", x.sum(), i)
            writer.add_histogram("h", x, i)
            return x + 1

        x = jnp.ones(3)
        for i in range(4):
            x = step(x, i)
        writer.flush()
        found = read(tmp_path)  # before close: flush was enough
    by_step = {e.step: e.value for e in found.Scalars("inside")}
    assert by_step == {i: 3.0 * (i + 1) for i in range(4)}
    assert {e.step: e.histogram_value.max for e in found.Histograms("h")} == {
        i: i + 1.0 for i in range(4)
    }


def picture(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_images_of_every_layout_are_lossless(tmp_path):
    rng = np.random.default_rng(0)
    u8 = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    floats = jnp.asarray(rng.random((5, 4), dtype=np.float32))
    with SummaryWriter(tmp_path) as writer:
        writer.add_image("hwc", u8, 1, dataformats="HWC")
        writer.add_image("chw", u8.transpose(2, 0, 1), 1)
        writer.add_image("hw", floats, 1, dataformats="HW")
        writer.add_images("batch", np.stack([u8, 255 - u8]), 1, dataformats="NHWC")
        writer.add_images("list", [u8, 255 - u8], 1, dataformats="HWC")
        writer.add_image_with_boxes("boxes", u8 * 0, [[1, 1, 3, 3]], 1, dataformats="HWC")
    found = read(tmp_path)
    assert (picture(found.Images("hwc")[0]) == u8).all()
    assert (picture(found.Images("chw")[0]) == u8).all()
    assert found.Images("hwc")[0].width == 4 and found.Images("hwc")[0].height == 5
    assert (picture(found.Images("hw")[0]) == (np.asarray(floats) * 255).astype(np.uint8)).all()
    joined = np.concatenate([u8, 255 - u8], axis=1)
    assert (picture(found.Images("batch")[0]) == joined).all()
    assert (picture(found.Images("list")[0]) == joined).all()
    frame = np.zeros((5, 4), bool)
    frame[1:4, 1:4] = True
    frame[2, 2] = False
    assert (picture(found.Images("boxes")[0])[..., 0] == frame * 255).all()


def test_videos_are_animations_and_figures_what_they_draw(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (1, 6, 3, 4, 5), dtype=np.uint8)

    class Figure:  # what is used of matplotlib's
        dpi = 10

        def get_size_inches(self):
            return np.array([0.5, 0.4])

        def savefig(self, buffer, *, format, dpi):
            buffer.write(np.arange(80, dtype=np.uint8).tobytes())

    with SummaryWriter(tmp_path) as writer:
        writer.add_video("v", video, 1, fps=10)
        writer.add_figure("f", Figure(), 1)
    found = read(tmp_path)
    moving = Image.open(io.BytesIO(found.Images("v")[0].encoded_image_string))
    assert moving.n_frames == 6 and moving.info["duration"] == 100
    for t in range(6):
        moving.seek(t)
        assert (np.asarray(moving.convert("RGB")) == video[0, t].transpose(1, 2, 0)).all()
    assert (picture(found.Images("f")[0]) == np.arange(80).reshape(4, 5, 4)).all()


def test_sound_text_curves_meshes_charts_and_graphs_are_read_back(tmp_path):
    sound = np.sin(np.arange(100) / 5).astype(np.float32)
    labels, scores = np.array([0, 1, 1, 0]), np.array([0.1, 0.9, 0.4, 0.6])
    vertices = np.arange(9, dtype=np.float32).reshape(1, 3, 3)

    def f(x):
        with jax.named_scope("layer"):
            return jax.jit(lambda y: jnp.sin(y) * 2)(x)

    with SummaryWriter(tmp_path) as writer:
        writer.add_audio("s", jnp.asarray(sound), 4, sample_rate=8000)
        writer.add_text("t", "**bold**", 4)
        writer.add_pr_curve("pr", labels, scores, 4, num_thresholds=11)
        writer.add_mesh("m", vertices, faces=np.array([[[0, 1, 2]]]), global_step=4)
        writer.add_custom_scalars_multilinechart(["a", "b"], "cat", "title")
        writer.add_graph(f, jnp.ones(3))
    found = read(tmp_path)
    (audio,) = found.Audio("s")
    with wave.open(io.BytesIO(audio.encoded_audio_string)) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 100)
        samples = np.frombuffer(file.readframes(100), "<i2") / 32767
    np.testing.assert_allclose(samples, sound, atol=1e-4)
    tensors = lambda tag: tensor_util.make_ndarray(found.Tensors(tag)[0].tensor_proto)
    assert tensors("t/text_summary").tolist() == [b"**bold**"]
    curve = tensors("pr")  # tp, fp, tn, fn, precision, recall at 11 thresholds
    assert curve.shape == (6, 11) and curve[:4, 5].tolist() == [1, 1, 1, 1]
    mesh = {tag: tensors(tag) for tag in found.Tags()["tensors"] if tag.startswith("m_")}
    assert (mesh["m_1"] == vertices).all() and mesh["m_2"].tolist() == [[[0, 1, 2]]]
    content = found.SummaryMetadata("m_1").plugin_data.content
    kinds = [mesh_plugin.MeshPluginData.VERTEX, mesh_plugin.MeshPluginData.FACE]
    wanted = mesh_metadata.get_components_bitmask(kinds)
    assert mesh_plugin.MeshPluginData.FromString(content).components == wanted
    layout = layout_pb2.Layout.FromString(tensors("custom_scalars__config__").item())
    assert list(layout.category[0].chart[0].multiline.tag) == ["a", "b"]
    nodes = {node.name: node for node in found.Graph().node}
    assert nodes["layer/mul"].input[0] == "layer/sin" and nodes["layer/sin"].input[0] == "in_0"
    assert nodes["out_0"].input[0] == "layer/mul"


def test_hyperparameters_carry_their_domains_and_metrics(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_hparams(
            {"lr": 0.1, "name": "adam", "flag": True}, {"hparam/loss": jnp.float32(0.25)},
            {"lr": [0.1, 0.2], "name": ["adam", "sgd"]}, run_name="trial", global_step=9,
        )  # fmt: skip
    found = read(tmp_path / "trial")
    assert [(e.step, e.value) for e in found.Scalars("hparam/loss")] == [(9, 0.25)]
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.hparam_infos
    domains = {
        i.name: [v.number_value or v.string_value for v in i.domain_discrete.values] for i in infos
    }
    assert domains == {"lr": [0.1, 0.2], "name": ["adam", "sgd"], "flag": []}
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["name"].string_value == "adam" and start.hparams["flag"].bool_value


def test_embeddings_are_the_projectors_files(tmp_path):
    vectors = np.arange(6.0).reshape(3, 2)
    pictures = np.zeros((3, 1, 4, 4), np.uint8)
    with SummaryWriter(tmp_path) as writer:
        writer.add_embedding(
            vectors, [["a", 1], ["b", 2], ["c", 3]], pictures, 5, "e/f", ["name", "n"]
        )
    config = (tmp_path / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "00005/e%2ff/tensors.tsv"' in config and "single_image_dim: 4" in config
    folder = tmp_path / "00005" / "e%2ff"
    assert np.loadtxt(folder / "tensors.tsv").tolist() == vectors.tolist()
    assert (folder / "metadata.tsv").read_text().splitlines() == ["name\tn", "a\t1", "b\t2", "c\t3"]
    assert Image.open(io.BytesIO((folder / "sprite.png").read_bytes())).size == (8, 8)


# --- the writer's promises ---


def test_purge_step_hides_what_an_earlier_run_wrote_from_there(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step in range(6):
            writer.add_scalar("x", 0.0, step)
    time.sleep(0.01)
    with SummaryWriter(tmp_path, purge_step=3) as writer:
        for step in range(3, 5):
            writer.add_scalar("x", 1.0, step)
    assert len(list(tmp_path.glob("events*"))) == 2  # within one second, two files
    events = sorted((e.step, e.value) for e in read(tmp_path).Scalars("x"))
    assert events == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]


def test_max_queue_and_flush_secs_bring_events_to_disk(tmp_path):
    size = lambda folder: sum(p.stat().st_size for p in folder.glob("events*"))

    def grown(folder, before, seconds=5.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end and size(folder) == before:
            time.sleep(0.01)
        return size(folder) > before

    with SummaryWriter(tmp_path / "a", max_queue=3, flush_secs=3600) as writer:
        before = size(tmp_path / "a")
        writer.add_scalar("x", 1.0, 0)
        writer.add_scalar("x", 1.0, 1)
        assert not grown(tmp_path / "a", before, 0.1)
        writer.add_scalar("x", 1.0, 2)
        assert grown(tmp_path / "a", before)
    with SummaryWriter(tmp_path / "b", max_queue=1000, flush_secs=0.05) as writer:
        before = size(tmp_path / "b")
        writer.add_scalar("x", 1.0, 0)
        assert grown(tmp_path / "b", before)


def test_events_survive_a_crash_in_mid_write(tmp_path):
    script = (
        "import sys, os, signal\n"
        "from aidx.telemetry.tensorboard import SummaryWriter\n"
        "writer = SummaryWriter(sys.argv[1], max_queue=1)\n"
        "for i in range(200): writer.add_scalar('x', float(i), i)\n"
        "writer.flush()\n"
        "for i in range(200, 400): writer.add_scalar('x', float(i), i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=env, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (file,) = tmp_path.glob("events*")
    for cut in (0, 5):  # as the crash left it, and with a record that is torn for certain
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - cut])
        events = [(e.step, e.value) for e in read(tmp_path).Scalars("x")]
        assert len(events) >= 200 - bool(cut) and events == [(i, i) for i in range(len(events))]


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.add_histogram("h", jnp.array([jnp.nan]), 1)
    with pytest.raises(ValueError, match=r"'h'.* has no finite value"):
        writer.flush()
    writer.add_scalar("x", 1.0, 1)
    writer.add_scalar("y", np.ones(2), 1)
    with pytest.raises(ValueError, match=r"'y' has shape \(2,\)"):
        writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.add_scalar("x", 1.0, 2)
    writer.close()
    assert read(tmp_path).Scalars("x")[0].value == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.add_image("a", np.ones((2, 2)), dataformats="CHX"), "CHX"),
        (lambda w: w.add_pr_curve("a", [1], [1], num_thresholds=200), "num_thresholds=200"),
        (lambda w: w.add_histogram_raw("a", 0, 1, 1, 1, 1, [1], [1, 2]), "differ"),
        (lambda w: w.add_hparams({"a": 1}, {}, {"b": [1]}), r"\['b'\]"),
        (lambda w: w.add_embedding(np.ones(3)), r"\(3,\)"),
        (lambda w: w.add_custom_scalars_marginchart(["a"]), "three tags"),
        (lambda w: TensorBoardCallback(w, scalars_every=0), "scalars_every=0"),
        (lambda w: TensorBoardCallback(w, sample=print), "need one another"),
        (lambda w: TensorBoardCallback(w, profile_steps=range(0, 3)), r"range\(0, 3\)"),
        (lambda w: w.add_image("a", np.ones((2, 2)), dataformats="CHX"), "CHX"),
    ],
)
def test_wrong_calls_are_refused_at_once(tmp_path, call, message):
    with SummaryWriter(tmp_path) as writer, pytest.raises(ValueError, match=message):
        call(writer)
    with pytest.raises(ValueError, match="max_queue=0"):
        SummaryWriter(tmp_path, max_queue=0)
    with pytest.raises(ValueError, match="not u8"):
        encode_png(np.zeros((1, 2, 2, 5), np.uint8))


# --- with fit, and the real server ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was logged with everything the callback has."""
    folder = tmp_path_factory.mktemp("logged")
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    loss_fn = lambda p, x, key: (((p["w"] - x) ** 2).sum(), x.size)
    with SummaryWriter(folder) as writer:
        callback = TensorBoardCallback(
            writer, histograms_every=2, hparams={"lr": 0.25}, sample_every=3,
            sample=lambda state: {"text": "hi", "picture": jnp.ones((1, 2, 2))},
            profile_steps=range(2, 4),
        )  # fmt: skip
        step = make_train_step(loss_fn, optimizer, on_gradients=callback.gradients(every=2))
        state = init_state({"w": jnp.zeros(4)}, optimizer, jax.random.key(0))
        result = fit(
            step, state, lambda i: np.ones(4, np.float32), steps=5, callbacks=[callback],
            evaluate=make_evaluate(loss_fn, [np.ones(4, np.float32)]), eval_every=5,
        )  # fmt: skip
    return folder, result


def test_the_callback_writes_the_run(trained):
    folder, result = trained
    found = read(folder)
    losses = {e.step: e.value for e in found.Scalars("train/loss")}
    assert set(losses) == set(range(5))
    assert losses[4] == pytest.approx(result.metrics["loss"], rel=1e-6)
    assert {e.value for e in found.Scalars("train/learning_rate")} == {0.25}
    tags = found.Tags()
    assert [e.step for e in found.Histograms("params/w")] == [0, 2, 4]
    gradients = {e.step: e.histogram_value for e in found.Histograms("gradients/w")}
    assert set(gradients) == {0, 2, 4} and gradients[0].min == gradients[0].max == -0.5
    assert [e.step for e in found.Images("picture")] == [0, 3]
    assert "text/text_summary" in tags["tensors"] and "run/text_summary" in tags["tensors"]
    assert found.Scalars("evaluation/loss")[0].step == 5
    assert read(folder / "hparams").Scalars("hparam/train/loss")
    (event,) = found.Scalars("profile/device_busy_share")
    assert event.step == 3 and event.value > 0
    times = [tag for tag in tags["scalars"] if tag.startswith("profile/device_ms/")]
    assert sum(found.Scalars(tag)[0].value for tag in times) > 0
    layout = tensor_util.make_ndarray(found.Tensors("custom_scalars__config__")[0].tensor_proto)
    categories = [c.title for c in layout_pb2.Layout.FromString(layout.item()).category]
    assert categories == ["training", "speed", "memory", "profile"]


def test_a_real_server_shows_the_pages(trained):
    folder, _ = trained
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0",
         "--host", "127.0.0.1", "--load_fast", "false"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        address, log = None, []
        for line in server.stderr:
            log.append(line)
            if "http://" in line:
                address = "http://" + line.split("http://")[1].split("/")[0]
                break
        assert address, "".join(log)

        def get(page, **body):
            data = json.dumps(body).encode() if body else None
            request = urllib.request.Request(f"{address}/{page}", data)
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.read()

        end = time.monotonic() + 30
        while time.monotonic() < end and "hparams" not in json.loads(get("data/runs")):
            time.sleep(0.1)
        scalars = json.loads(get("data/plugin/scalars/scalars?tag=train/loss&run=."))
        assert [step for _, step, _ in scalars] == list(range(5))
        assert len(json.loads(get("data/plugin/histograms/histograms?tag=params/w&run=."))) == 3
        images = json.loads(get("data/plugin/images/images?tag=picture&run=.&sample=0"))
        blob = get(f"data/plugin/images/individualImage?{images[0]['query']}")
        assert Image.open(io.BytesIO(blob)).size == (2, 2)
        experiment = json.loads(get("data/plugin/hparams/experiment", experimentName=""))
        assert [h["name"] for h in experiment["hparamInfos"]] == ["lr"]
        charts = json.loads(get("data/plugin/custom_scalars/layout"))
        assert [c["title"] for c in charts["category"]][-1] == "profile"
        tags = urllib.parse.quote("profile/device_ms/.*")
        shown = json.loads(get(f"data/plugin/custom_scalars/scalars?tag={tags}&run=."))
        assert shown["regex_valid"] and shown["tag_to_events"]
        assert b"<!doctype html>" in get("").lower()
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()

"""`SummaryWriter` with PyTorch's whole interface for JAX arrays, written by a thread.

A call copies device arrays on the device (the next step may donate them), starts their way to the
host and returns; a thread waits for them, encodes and writes.  Inside `jit` a call is a callback.
Encodings are tensorboardX's, and the standard library's for pictures and sound.
"""

import datetime
import functools
import io
import json
import os
import pathlib
import socket
import sys
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from ._events import EventFile, Worker
from ._graph import graph_of
from ._histogram import (
    automatic,
    counted_on_device,
    device_histogram,
    tensorflow_edges,
    trimmed,
)
from ._png import encode_png

MAX_THRESHOLDS = 127  # of a PR curve, in tensorboardX's encoding
QUEUE = 1024  # calls that may wait for the thread

type ArrayLike = Any


class SummaryWriter:
    """Writes what TensorBoard shows, from steps that go on meanwhile.

    Args:
      log_dir: None is `runs/<date>_<host><comment>`.
      comment: see log_dir.
      purge_step: what an earlier run wrote to this folder from this step on is hidden.
      max_queue: events after which the file is flushed.
      flush_secs: seconds after which it is.
      filename_suffix: of the event files.

    Raises:
      ValueError: max_queue or flush_secs is not positive.

    Arrays may be JAX's (any dtype, sharded over local devices), NumPy's, or what `np.asarray`
    takes.  Up to 1024 calls wait for the thread; then a call waits.  An error of the thread is
    raised by the next call.

    >>> import tempfile
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     writer.add_scalar("loss", jnp.float32(0.5), 1)
    ...     writer.add_histograms("params", {"w": jnp.ones(3, jnp.bfloat16)}, 1)
    """

    def __init__(
        self,
        log_dir: str | os.PathLike | None = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: float = 120,
        filename_suffix: str = "",
    ):
        if max_queue < 1 or not flush_secs > 0:
            raise ValueError(f"{max_queue=} and {flush_secs=} must be positive")
        if not log_dir:
            now = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
            log_dir = os.path.join("runs", f"{now}_{socket.gethostname()}{comment}")
        self.log_dir = str(log_dir)
        self._open = functools.partial(
            EventFile, max_queue=max_queue, flush_secs=flush_secs, suffix=filename_suffix,
            purge_step=purge_step,
        )  # fmt: skip
        self._files = {self.log_dir: self._open(self.log_dir)}
        self._worker: Worker | None = Worker(
            lambda: [f.flush_if_due() for f in list(self._files.values())],
            size=QUEUE,
            tick=min(1.0, flush_secs),
        )

    def get_logdir(self) -> str:
        """The folder."""
        return self.log_dir

    # --- numbers ---

    def add_scalar(
        self,
        tag: str,
        scalar_value: ArrayLike,
        global_step: ArrayLike = None,
        walltime: float | None = None,
        display_name: str = "",
        summary_description: str = "",
    ) -> None:
        """A number of a curve."""
        if isinstance(scalar_value, int | float) and not display_name + summary_description:
            # A number is its own copy: most calls take this way.
            now = time.time() if walltime is None else walltime
            step = None if global_step is None else int(global_step)
            self._put(lambda: self._write(scalar_event(tag, scalar_value), step, now, self.log_dir))
            return
        texts = (display_name, summary_description)
        self._add(
            lambda value: summary.scalar(tag, scalar_of(tag, value), *texts),
            {"value": scalar_value}, global_step, walltime,
        )  # fmt: skip

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, ArrayLike],
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """Several curves in one chart: a run of its own for each."""
        walltime = time.time() if walltime is None else walltime
        for tag, value in tag_scalar_dict.items():
            self._add(
                lambda value, tag=tag: summary.scalar(main_tag, scalar_of(tag, value)),
                {"value": value}, global_step, walltime,
                folder=os.path.join(self.log_dir, f"{main_tag.replace('/', '_')}_{tag}"),
            )  # fmt: skip

    def add_histogram(
        self,
        tag: str,
        values: ArrayLike,
        global_step: ArrayLike = None,
        bins: str | Sequence[float] = "tensorflow",
        walltime: float | None = None,
        max_bins: int | None = None,
    ) -> None:
        """The distribution of an array's finite values.

        With the default bins a float array is counted on its device; other bins (numpy's names, or
        edges) are counted on the host.
        """
        if isinstance(bins, str) and bins == "tensorflow" and counted_on_device(values):
            count = lambda **found: counted_summary(tag, found, max_bins)
            self._add(count, device_histogram(automatic(values)), global_step, walltime)
            return

        def make(values: np.ndarray) -> Any:
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise ValueError(f"histogram {tag!r}: {values.shape} has no finite value")
            edges = tensorflow_edges() if isinstance(bins, str) and bins == "tensorflow" else bins
            return summary.histogram(tag, finite, edges, max_bins)

        self._add(make, {"values": values}, global_step, walltime)

    def add_histograms(
        self,
        tag: str,
        tree: Any,
        global_step: ArrayLike = None,
        walltime: float | None = None,
        max_bins: int | None = None,
    ) -> None:
        """A histogram of every leaf of a tree, named `tag/path/of/leaf`."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            full = f"{tag}/{name}" if name else tag
            self.add_histogram(full, leaf, global_step, walltime=walltime, max_bins=max_bins)

    def add_histogram_raw(
        self,
        tag: str,
        min: float,
        max: float,
        num: int,
        sum: float,
        sum_squares: float,
        bucket_limits: Sequence[float],
        bucket_counts: Sequence[float],
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """A histogram counted elsewhere; bucket_limits are right edges.

        Raises:
          ValueError: the two sequences differ in length.
        """
        if len(bucket_limits) != len(bucket_counts):
            raise ValueError(f"{len(bucket_limits)=} and {len(bucket_counts)=} differ")
        made = summary.histogram_raw(
            tag, min, max, num, sum, sum_squares, list(bucket_limits), list(bucket_counts)
        )
        self._add(lambda: made, {}, global_step, walltime)

    def add_pr_curve(
        self,
        tag: str,
        labels: ArrayLike,
        predictions: ArrayLike,
        global_step: ArrayLike = None,
        num_thresholds: int = 127,
        weights: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """Precision over recall of probabilities in [0, 1] against binary labels.

        Raises:
          ValueError: num_thresholds outside [2, 127].
        """
        check_thresholds(num_thresholds)
        make = lambda labels, predictions, weights=None: summary.pr_curve(
            tag, labels.reshape(-1), predictions.reshape(-1), num_thresholds, weights
        )
        arrays = {"labels": labels, "predictions": predictions}
        if weights is not None:
            arrays["weights"] = weights
        self._add(make, arrays, global_step, walltime)

    def add_pr_curve_raw(
        self,
        tag: str,
        true_positive_counts: ArrayLike,
        false_positive_counts: ArrayLike,
        true_negative_counts: ArrayLike,
        false_negative_counts: ArrayLike,
        precision: ArrayLike,
        recall: ArrayLike,
        global_step: ArrayLike = None,
        num_thresholds: int = 127,
        walltime: float | None = None,
    ) -> None:
        """A PR curve counted elsewhere, num_thresholds values each.

        Raises:
          ValueError: num_thresholds outside [2, 127].
        """
        check_thresholds(num_thresholds)
        arrays = dict(
            tp=true_positive_counts, fp=false_positive_counts, tn=true_negative_counts,
            fn=false_negative_counts, precision=precision, recall=recall,
        )  # fmt: skip
        make = lambda **found: summary.pr_curve_raw(tag, **found, num_thresholds=num_thresholds)
        self._add(make, arrays, global_step, walltime)

    # --- pictures, sound, text ---

    def add_image(
        self,
        tag: str,
        img_tensor: ArrayLike,
        global_step: ArrayLike = None,
        walltime: float | None = None,
        dataformats: str = "CHW",
    ) -> None:
        """A picture: u8, or floats in [0, 1]; dataformats is an order of C, H and W, or HW."""
        check_format(dataformats, "CHW")
        make = lambda image: picture_summary(tag, arranged(image, dataformats, "HWC")[None])
        self._add(make, {"image": img_tensor}, global_step, walltime)

    def add_images(
        self,
        tag: str,
        img_tensor: ArrayLike,
        global_step: ArrayLike = None,
        walltime: float | None = None,
        dataformats: str = "NCHW",
    ) -> None:
        """A batch of pictures as one, in rows; a list is stacked (dataformats then lacks N)."""
        if isinstance(img_tensor, list | tuple):
            img_tensor = np.stack([to_host(x) for x in img_tensor])
            dataformats = dataformats if "N" in dataformats.upper() else f"N{dataformats}"
        check_format(dataformats, "NCHW")
        make = lambda image: picture_summary(tag, grid(arranged(image, dataformats, "NHWC"))[None])
        self._add(make, {"image": img_tensor}, global_step, walltime)

    def add_image_with_boxes(
        self,
        tag: str,
        img_tensor: ArrayLike,
        box_tensor: ArrayLike,
        global_step: ArrayLike = None,
        walltime: float | None = None,
        dataformats: str = "CHW",
        colour: Sequence[int] = (255, 0, 0),
    ) -> None:
        """A picture with the frames of boxes `[N, 4]`: xmin, ymin, xmax, ymax in pixels."""
        check_format(dataformats, "CHW")
        make = lambda image, boxes: picture_summary(
            tag, boxed(arranged(image, dataformats, "HWC"), boxes, colour)[None]
        )
        self._add(make, {"image": img_tensor, "boxes": box_tensor}, global_step, walltime)

    def add_figure(
        self,
        tag: str,
        figure: Any,
        global_step: ArrayLike = None,
        close: bool = True,
        walltime: float | None = None,
    ) -> None:
        """A figure of matplotlib, or a list of them, drawn now; closed unless told otherwise."""
        figures = figure if isinstance(figure, list) else [figure]
        drawn = [draw(f, close) for f in figures]
        make = lambda images: picture_summary(tag, grid(images)[None])
        self._add(make, {"images": np.stack(drawn)}, global_step, walltime)

    def add_video(
        self,
        tag: str,
        vid_tensor: ArrayLike,
        global_step: ArrayLike = None,
        fps: float = 4,
        walltime: float | None = None,
        dataformats: str = "NTCHW",
    ) -> None:
        """Moving pictures, a batch side by side: u8, or floats in [0, 1]; an animated PNG."""
        check_format(dataformats, "NTCHW")

        def make(video: np.ndarray) -> Any:
            frames = arranged(video, dataformats, "TNHWC")
            return picture_summary(tag, np.stack([grid(frame) for frame in frames]), fps)

        self._add(make, {"video": vid_tensor}, global_step, walltime)

    def add_audio(
        self,
        tag: str,
        snd_tensor: ArrayLike,
        global_step: ArrayLike = None,
        sample_rate: int = 44100,
        walltime: float | None = None,
    ) -> None:
        """Sound `[L]` or `[L, channels]` in [-1, 1], as 16-bit WAV; louder is clipped."""
        make = lambda sound: sound_summary(tag, sound, sample_rate)
        self._add(make, {"sound": snd_tensor}, global_step, walltime)

    def add_text(
        self,
        tag: str,
        text_string: str,
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """Text, in Markdown."""
        self._add(lambda: summary.text(tag, text_string), {}, global_step, walltime)

    def add_mesh(
        self,
        tag: str,
        vertices: ArrayLike,
        colors: ArrayLike = None,
        faces: ArrayLike = None,
        config_dict: Mapping[str, Any] | None = None,
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """Points or triangles: vertices `[B, N, 3]`, colors u8 alike, faces i32 `[B, F, 3]`."""
        arrays = {"vertices": vertices, "colors": colors, "faces": faces}
        given = {name: x for name, x in arrays.items() if x is not None}

        def make(vertices: np.ndarray, colors: Any = None, faces: Any = None) -> Any:
            return with_components(summary.mesh(tag, vertices, colors, faces, config_dict))

        self._add(make, given, global_step, walltime)

    # --- structure ---

    def add_graph(self, model: Callable, input_to_model: Any = (), verbose: bool = False) -> None:
        """The graph of a function, from its jaxpr: nodes are grouped by `jax.named_scope`.

        Args:
          model: any function that JAX can trace.
          input_to_model: its argument, or a tuple of them; `ShapeDtypeStruct`s will do.
          verbose: also print the jaxpr.
        """
        arguments = input_to_model if isinstance(input_to_model, tuple) else (input_to_model,)
        closed = jax.make_jaxpr(model)(*arguments)
        if verbose:
            print(closed)
        graph = graph_of(closed).SerializeToString()
        self._put(lambda: self._write(Event(graph_def=graph), None, None, self.log_dir))

    def add_custom_scalars(self, layout: Mapping[str, Mapping[str, Sequence]]) -> None:
        """Charts of several tags: `{category: {title: ["Multiline" | "Margin", tags]}}`."""
        made = summary.custom_scalars({k: dict(v) for k, v in layout.items()})
        self._add(lambda: made, {}, None, None)

    def add_custom_scalars_multilinechart(
        self, tags: Sequence[str], category: str = "default", title: str = "untitled"
    ) -> None:
        """One chart of several tags."""
        self.add_custom_scalars({category: {title: ["Multiline", list(tags)]}})

    def add_custom_scalars_marginchart(
        self, tags: Sequence[str], category: str = "default", title: str = "untitled"
    ) -> None:
        """One chart of a tag between two others.

        Raises:
          ValueError: not three tags.
        """
        if len(tags) != 3:
            raise ValueError(f"a margin chart takes three tags, not {tags}")
        self.add_custom_scalars({category: {title: ["Margin", list(tags)]}})

    def add_hparams(
        self,
        hparam_dict: Mapping[str, bool | str | float | int],
        metric_dict: Mapping[str, ArrayLike],
        hparam_domain_discrete: Mapping[str, Sequence] | None = None,
        run_name: str | None = None,
        global_step: ArrayLike = None,
    ) -> None:
        """Hyperparameters and what came of them, in a run of its own.

        Args:
          hparam_dict: by name.
          metric_dict: by name; also written as scalars.
          hparam_domain_discrete: the values that a hyperparameter can take.
          run_name: of the run's folder; None is the time.
          global_step: of the metrics.

        Raises:
          ValueError: a domain of an unknown hyperparameter.
        """
        domains = dict(hparam_domain_discrete or {})
        if unknown := set(domains) - set(hparam_dict):
            raise ValueError(f"domains of unknown hyperparameters: {sorted(unknown)}")
        experiment, start, end = summary.hparams(dict(hparam_dict), dict(metric_dict))
        with_domains(experiment, domains)
        folder = os.path.join(self.log_dir, run_name or str(time.time()))
        for made in (experiment, start, end):
            self._add(lambda made=made: made, {}, None, None, folder)
        for tag, value in metric_dict.items():
            make = lambda value, tag=tag: summary.scalar(tag, scalar_of(tag, value))
            self._add(make, {"value": value}, global_step, None, folder)

    def add_embedding(
        self,
        mat: ArrayLike,
        metadata: Sequence | None = None,
        label_img: ArrayLike = None,
        global_step: int | None = None,
        tag: str = "default",
        metadata_header: Sequence[str] | None = None,
    ) -> None:
        """Vectors `[N, D]` for the projector, with labels and pictures `[N, C, H, H]`.

        Raises:
          ValueError: shapes or lengths that do not go together.
        """
        vectors = to_host(mat)
        pictures = None if label_img is None else to_host(label_img)
        if vectors.ndim != 2 or (metadata is not None and len(metadata) != len(vectors)):
            raise ValueError(f"{vectors.shape=} must be [N, D] with N labels")
        if pictures is not None and (
            len(pictures) != len(vectors) or pictures.shape[-1] != pictures.shape[-2]
        ):
            raise ValueError(f"label_img {pictures.shape} must be [{len(vectors)}, C, H, H]")
        where = f"{int(global_step or 0):05d}/{tag.replace('%', '%25').replace('/', '%2f')}"
        self._put(
            lambda: write_embedding(
                pathlib.Path(self.log_dir), where, f"{tag}:{int(global_step or 0):05d}", vectors,
                metadata, metadata_header, pictures,
            )
        )  # fmt: skip

    # --- the thread ---

    def flush(self) -> None:
        """Return when all that was added is on disk."""
        worker = self._worker
        if worker is not None:
            jax.effects_barrier()  # calls inside jit
            worker.put(lambda: [f.sync() for f in self._files.values()])
            worker.drain()

    def close(self) -> None:
        """Write what waits and close the files; later calls raise ValueError."""
        worker, self._worker = self._worker, None
        if worker is not None:
            jax.effects_barrier()
            try:
                worker.close()
            finally:
                for file in self._files.values():
                    file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, job: Callable[[], Any]) -> None:
        if self._worker is None:
            raise ValueError(f"the SummaryWriter of {self.log_dir} is closed")
        self._worker.put(job)

    def _add(
        self,
        make: Callable[..., Any],
        arrays: Mapping[str, ArrayLike],
        step: ArrayLike,
        walltime: float | None,
        folder: str | None = None,
    ) -> None:
        """Queue `make(**arrays on the host)` as an event; inside jit, a callback that does."""
        leaves = {**arrays, "step": step}
        if any(isinstance(x, Tracer) for x in leaves.values()):
            traced = {k: v for k, v in leaves.items() if isinstance(v, jax.Array)}
            fixed = {k: v for k, v in leaves.items() if k not in traced}

            def later(values: dict[str, Any]) -> None:
                self._add_now(make, fixed | values, walltime, folder)

            jax.debug.callback(later, traced)
            return
        self._add_now(make, {k: snapshot(x) for k, x in leaves.items()}, walltime, folder)

    def _add_now(
        self, make: Callable, leaves: dict[str, Any], walltime: float | None, folder: str | None
    ) -> None:
        now = time.time() if walltime is None else walltime

        def job() -> None:
            host = {k: to_host(x) for k, x in leaves.items() if k != "step"}
            step = leaves["step"]
            step = None if step is None else int(to_host(step))
            self._write(Event(summary=make(**host)), step, now, folder or self.log_dir)

        self._put(job)

    def _write(self, event: Any, step: int | None, walltime: float | None, folder: str) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = step
        if folder not in self._files:
            self._files[folder] = self._open(folder)
        self._files[folder].write(event)


# --- arrays ---


def snapshot(x: ArrayLike) -> Any:
    """What stays what x is now: a copy, of a device array on its device and on its way.

    Raises:
      ValueError: the array has parts on devices of other processes.

    >>> snapshot(3.0), snapshot(np.ones(2)).tolist()
    (3.0, [1.0, 1.0])
    """
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            raise ValueError(f"an array of {x.shape} on {x.sharding} is not all in this process")
        x = jnp.array(x, copy=True)
        x.copy_to_host_async()
        return x
    return np.array(x) if isinstance(x, np.ndarray | list | tuple) else x


def to_host(x: ArrayLike) -> np.ndarray:
    """A NumPy array of x; bfloat16, float16 and float8 as float32.

    >>> to_host(jnp.ones(2, jnp.float8_e4m3fn)).dtype
    dtype('float32')
    """
    host = np.asarray(x)
    if jnp.issubdtype(host.dtype, jnp.floating) and host.dtype.itemsize < 4:
        return host.astype(np.float32)
    return host.astype(np.int32) if host.dtype.kind == "V" else host  # int4 and its like


def scalar_of(tag: str, value: np.ndarray) -> float:
    """The one number of an array.

    >>> scalar_of("loss", np.ones((1, 1)))
    1.0
    """
    if value.size != 1:
        raise ValueError(f"scalar {tag!r} has shape {value.shape}")
    return float(value.reshape(()))


def check_thresholds(n: int) -> None:
    """Raise ValueError for a number of thresholds that cannot be written.

    >>> check_thresholds(10)
    """
    if not 2 <= n <= MAX_THRESHOLDS:
        raise ValueError(f"num_thresholds={n} must lie in [2, {MAX_THRESHOLDS}]")


def check_format(dataformats: str, letters: str) -> None:
    """Raise ValueError unless dataformats is an order of the letters (C may be absent).

    >>> check_format("HWC", "CHW")
    """
    given = dataformats.upper()
    if sorted(given) not in (sorted(letters), sorted(letters.replace("C", ""))):
        raise ValueError(f"{dataformats=} is not an order of the letters {letters}")


def arranged(x: np.ndarray, dataformats: str, wanted: str) -> np.ndarray:
    """x as u8 with its axes in the wanted order; a missing C is one channel.

    >>> arranged(np.ones((3, 4, 5)), "CHW", "HWC").shape
    (4, 5, 3)
    """
    given = dataformats.upper()
    if x.ndim != len(given):
        raise ValueError(f"{x.shape} is not {dataformats}")
    if "C" not in given:
        x, given = x[..., None], f"{given}C"
    if x.dtype != np.uint8:
        x = (np.clip(x.astype(np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
    return x.transpose([given.index(letter) for letter in wanted])


def grid(images: np.ndarray) -> np.ndarray:
    """`[N, H, W, C]` as one picture, in nearly square rows; the rest is black.

    >>> grid(np.ones((3, 2, 2, 1), np.uint8)).shape
    (4, 4, 1)
    """
    N, H, W, C = images.shape
    columns = int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    full = np.zeros((rows * columns, H, W, C), images.dtype)
    full[:N] = images
    joined = full.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4)
    return joined.reshape(rows * H, columns * W, C)


def boxed(image: np.ndarray, boxes: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """A picture `[H, W, C]` as RGB with the frames of boxes drawn, one pixel wide.

    >>> boxed(np.zeros((4, 4, 1), np.uint8), np.array([[0, 0, 2, 2]]), (9, 0, 0))[..., 0].sum()
    np.uint64(72)
    """
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] < 3 else image[..., :3].copy()
    for box in np.round(boxes.reshape(-1, 4)).astype(int):
        limits = np.array([image.shape[1], image.shape[0]] * 2) - 1
        x0, y0, x1, y1 = np.clip(box, 0, limits)
        image[[y0, y1], x0 : x1 + 1] = colour
        image[y0 : y1 + 1, [x0, x1]] = colour
    return image


def draw(figure: Any, close: bool) -> np.ndarray:
    """A figure of matplotlib as RGBA, u8 `[H, W, 4]`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=figure.dpi)
    width, height = (int(n) for n in figure.get_size_inches() * figure.dpi)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if close and pyplot is not None:
        pyplot.close(figure)
    return np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)


# --- summaries ---


def scalar_event(tag: str, value: float) -> Any:
    """An event of one number.

    >>> scalar_event("loss", 0.5).summary.value[0].simple_value
    0.5
    """
    return Event(summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]))


def picture_summary(tag: str, frames: np.ndarray, fps: float = 1.0) -> Any:
    """`[T, H, W, C]` as an image summary.

    >>> picture_summary("a", np.zeros((1, 2, 3, 1), np.uint8)).value[0].image.width
    3
    """
    _, height, width, channels = frames.shape
    image = Summary.Image(
        height=height, width=width, colorspace=channels,
        encoded_image_string=encode_png(frames, fps),
    )  # fmt: skip
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def sound_summary(tag: str, sound: np.ndarray, sample_rate: int) -> Any:
    """Samples as an audio summary, 16-bit WAV.

    >>> sound_summary("a", np.zeros(8), 8000).value[0].audio.length_frames
    8
    """
    if sound.ndim not in (1, 2):
        raise ValueError(f"sound {tag!r} has shape {sound.shape}, not [L] or [L, channels]")
    samples = sound.reshape(len(sound), -1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    audio = Summary.Audio(
        sample_rate=sample_rate, num_channels=samples.shape[1], length_frames=len(samples),
        encoded_audio_string=buffer.getvalue(), content_type="audio/wav",
    )  # fmt: skip
    return Summary(value=[Summary.Value(tag=tag, audio=audio)])


def counted_summary(tag: str, found: dict[str, np.ndarray], max_bins: int | None) -> Any:
    """What `device_histogram` found as a histogram summary.

    Raises:
      ValueError: no value was finite.
    """
    if not found["num"]:
        raise ValueError(f"histogram {tag!r} has no finite value")
    limits, counts = trimmed(found["counts"], tensorflow_edges(), max_bins)
    low, high, num, total, squares = (
        float(found[name]) for name in ("min", "max", "num", "sum", "sum_squares")
    )
    return summary.histogram_raw(tag, low, high, num, total, squares, limits, counts)


def with_domains(experiment: Any, domains: Mapping[str, Sequence]) -> None:
    """Write the discrete domains into the experiment of an hparams summary.

    >>> with_domains(summary.hparams({"lr": 1.0}, {})[0], {"lr": [0.1, 1.0]})
    """
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        for value in domains.get(info.name, ()):
            one = info.domain_discrete.values.add()
            if isinstance(value, bool):
                one.bool_value = value
            elif isinstance(value, str):
                one.string_value = value
            else:
                one.number_value = float(value)
    plugin.content = data.SerializeToString()


def with_components(mesh: Any) -> Any:
    """Tell the mesh plugin which of vertices, faces and colours there are, as it asks for.

    >>> made = with_components(summary.mesh("m", np.zeros((1, 3, 3)), None, None))
    >>> made.value[0].metadata.plugin_data.content[-2:]
    b'8\\x02'
    """
    kinds = [int(value.tag.rsplit("_", 1)[1]) for value in mesh.value]  # 1, 2, 3
    mask = sum(1 << kind for kind in kinds)
    for value in mesh.value:  # field 7, which tensorboardX's schema lacks
        value.metadata.plugin_data.content += bytes([7 << 3, mask])
    return mesh


def write_embedding(
    log_dir: pathlib.Path,
    where: str,
    name: str,
    vectors: np.ndarray,
    metadata: Sequence | None,
    header: Sequence[str] | None,
    pictures: np.ndarray | None,
) -> None:
    """The files of TensorBoard's projector for one matrix."""
    folder = log_dir / where
    folder.mkdir(parents=True, exist_ok=True)
    row = lambda cells: "\t".join(str(c) for c in cells) + "\n"
    (folder / "tensors.tsv").write_text("".join(map(row, vectors)))
    config = [f'tensor_name: "{name}"', f'tensor_path: "{where}/tensors.tsv"']
    if metadata is not None:
        lines = metadata if header else [[m] for m in metadata]
        text = "".join(map(row, [header, *lines] if header else lines))
        (folder / "metadata.tsv").write_text(text)
        config.append(f'metadata_path: "{where}/metadata.tsv"')
    if pictures is not None:
        sprite = grid(arranged(pictures, "NCHW", "NHWC"))
        (folder / "sprite.png").write_bytes(encode_png(sprite[None]))
        size = pictures.shape[-1]
        dims = f"single_image_dim: {size} single_image_dim: {size}"
        config.append(f'sprite {{ image_path: "{where}/sprite.png" {dims} }}')
    with (log_dir / "projector_config.pbtxt").open("a") as file:
        file.write("embeddings {\n" + "".join(f"  {line}\n" for line in config) + "}\n")


class TensorBoardCallback:
    """Writes a run of `aidx.train.fit`: scalars, histograms, samples, hyperparameters.

    Args:
      writer: where to; it stays open.
      scalars_every: steps between two of the training's scalars.
      histograms_every: steps between two histograms of all parameters; None for none.
      sample: `state -> {tag: text or picture [C, H, W]}`, called `sample_every` steps.
      sample_every: None for none.
      hparams: written at the end with the last metrics.

    Raises:
      ValueError: an interval that is not positive, or sample without sample_every.

    >>> import tempfile
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     TensorBoardCallback(writer, hparams={"lr": 0.1}).on_step(0, {"loss": 1.0})
    """

    def __init__(
        self,
        writer: SummaryWriter,
        *,
        scalars_every: int = 1,
        histograms_every: int | None = None,
        sample: Callable[[Any], Mapping[str, Any]] | None = None,
        sample_every: int | None = None,
        hparams: Mapping[str, Any] | None = None,
    ):
        for name, every in (
            ("scalars_every", scalars_every),
            ("histograms_every", histograms_every),
            ("sample_every", sample_every),
        ):
            if every is not None and every < 1:
                raise ValueError(f"{name}={every} must be positive")
        if (sample is None) != (sample_every is None):
            raise ValueError(f"sample and {sample_every=} need one another")
        self.writer, self.scalars_every = writer, scalars_every
        self.histograms_every = histograms_every
        self.sample, self.sample_every = sample, sample_every
        self.hparams = dict(hparams or {})
        self.last: dict[str, float] = {}

    def gradients(self, every: int) -> Callable[[Any, jax.Array], None]:
        """A hook for `make_train_step(on_gradients=)`: histograms of the gradient, from the step.

        The device counts every `every` steps only.
        """

        def hook(grads: Any, step: jax.Array) -> None:
            write = lambda: self.writer.add_histograms("gradients", grads, step)
            jax.lax.cond(step % every == 0, write, lambda: None)

        return hook

    def on_begin(self, state: Any, steps: int) -> None:
        """Put what belongs together on one chart."""
        del state, steps
        self.writer.add_custom_scalars(
            {
                "training": {
                    "loss": ["Multiline", ["train/loss", "evaluation/loss"]],
                    "norms": [
                        "Multiline",
                        [f"train/{n}_norm" for n in ("grad", "param", "update")],
                    ],
                    "speed": ["Multiline", ["train/tokens_per_second", "train/mfu"]],
                }
            }
        )

    def on_state(self, step: int, state: Any) -> None:
        """Histograms of the parameters, reduced before the state is donated; samples."""
        if self.histograms_every is not None and step % self.histograms_every == 0:
            self.writer.add_histograms("params", state.params, step)
        if self.sample is not None and step % (self.sample_every or 1) == 0:
            for tag, value in self.sample(state).items():
                if isinstance(value, str):
                    self.writer.add_text(tag, value, step)
                else:
                    self.writer.add_image(tag, value, step)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step."""
        self.last = {f"train/{name}": value for name, value in metrics.items()}
        if step % self.scalars_every == 0:
            for tag, value in self.last.items():
                self.writer.add_scalar(tag, value, step)
            for tag, value in memory_in_use().items():
                self.writer.add_scalar(tag, value, step)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of an evaluation."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"evaluation/{name}", value, step)

    def on_save(self, step: int) -> None:
        """Checkpoints are no curve."""

    def on_end(self, reason: str) -> None:
        """Hyperparameters with what came of them; everything to disk."""
        if self.hparams and self.last:
            metrics = {f"hparam/{name}": value for name, value in self.last.items()}
            self.writer.add_hparams(self.hparams, metrics, run_name="hparams")
        self.writer.add_text("run", json.dumps({"ended": reason}))
        self.writer.flush()


def memory_in_use() -> dict[str, float]:
    """GiB in use and at most in use of the first local device, where it tells.

    >>> all(tag.startswith("memory/") for tag in memory_in_use())
    True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory/in_use_gib", "peak_bytes_in_use": "memory/peak_gib"}
    return {tag: stats[name] / 2**30 for name, tag in names.items() if name in stats}

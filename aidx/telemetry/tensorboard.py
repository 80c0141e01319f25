"""`SummaryWriter` with PyTorch's whole interface for JAX arrays, written by a thread.

A call copies device arrays on the device (the next step may donate them), starts their way to the
host and returns; a thread waits for them, encodes and writes.  Inside `jit` a call is a callback.
"""

import datetime
import functools
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.core import Tracer
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

from ._callback import TensorBoardCallback as TensorBoardCallback
from ._events import EventFile, Worker
from ._graph import graph_of
from ._histogram import (
    automatic,
    counted_on_device,
    device_histogram,
    tensorflow_edges,
    unpacked,
)
from ._report import ProfileReport
from ._summaries import (
    ArrayLike,
    arranged,
    boxed,
    check_format,
    check_thresholds,
    counted_summary,
    draw,
    grid,
    picture_summary,
    profile_scalars,
    scalar_event,
    scalar_of,
    snapshot,
    sound_summary,
    tensor_summary,
    to_host,
    with_components,
    with_domains,
    write_embedding,
)

QUEUE = 1024  # calls that may wait for the thread


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
    >>> import jax.numpy as jnp
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
        new_style: bool = False,
        double_precision: bool = False,
        display_name: str = "",
        summary_description: str = "",
    ) -> None:
        """A number of a curve; new_style or double_precision write it as a tensor, f32 or f64.

        Raises:
          ValueError: a display_name or summary_description with new_style or double_precision.
        """
        if new_style or double_precision:
            if display_name or summary_description:
                raise ValueError(f"{display_name=} and {summary_description=} are of the old style")
            dtype = np.float64 if double_precision else np.float32
            self._add(
                lambda value: tensor_summary(tag, dtype(scalar_of(tag, value)), "scalars"),
                {"value": scalar_value}, global_step, walltime,
            )  # fmt: skip
            return
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

    def add_tensor(
        self,
        tag: str,
        tensor: ArrayLike,
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """An array as it is, for readers of the file; 16-bit floats and less become f32."""
        self._add(lambda x: tensor_summary(tag, x, "tensor"), {"x": tensor}, global_step, walltime)

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
            count = lambda packed: counted_summary(tag, unpacked(packed), max_bins)
            packed = {"packed": device_histogram(automatic(values))}
            self._add(count, packed, global_step, walltime, own=True)
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

    def add_profile(
        self,
        tag: str,
        report: ProfileReport,
        global_step: ArrayLike = None,
        walltime: float | None = None,
    ) -> None:
        """A profile as a dashboard: its tables as text, and of every scope a curve over the runs.

        Curves are `tag/host_ms/...` (medians), `tag/device_ms/...`, and where the device's peaks
        are known `tag/of_flops_peak/...` and `tag/of_hbm/...`, for scopes above 0.5% of the time
        that the device was busy; `tag/device_busy_share`; and `tag/memory_mib/...` of each program.
        """
        self.add_text(tag, report.to_markdown(), global_step, walltime)
        for name, value in profile_scalars(report).items():
            self.add_scalar(f"{tag}/{name}", value, global_step, walltime)

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
        own: bool = False,
    ) -> None:
        """Queue `make(**arrays on the host)` as an event; inside jit, a callback that does.  With
        own nobody else has the arrays, and they need no copy."""
        leaves = {**arrays, "step": step}
        if any(isinstance(x, Tracer) for x in leaves.values()):
            traced = {k: v for k, v in leaves.items() if isinstance(v, jax.Array)}
            fixed = {k: v for k, v in leaves.items() if k not in traced}

            def later(values: dict[str, Any]) -> None:
                self._add_now(make, fixed | values, walltime, folder)

            jax.debug.callback(later, traced)
            return
        for x in leaves.values() if own else ():
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        kept = leaves if own else {k: snapshot(x) for k, x in leaves.items()}
        self._add_now(make, kept, walltime, folder)

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

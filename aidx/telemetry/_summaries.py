"""Arrays as TensorBoard's summaries: what `SummaryWriter` writes, as pure functions.

Encodings are tensorboardX's, and the standard library's for pictures and sound.
"""

import io
import pathlib
import sys
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore
from tensorboardX.proto.tensor_pb2 import TensorProto  # pyright: ignore
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore

from ._histogram import tensorflow_edges, trimmed
from ._png import encode_png
from ._report import ProfileReport

MAX_THRESHOLDS = 127  # of a PR curve, in tensorboardX's encoding

type ArrayLike = Any

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


TENSOR_TYPES = {  # numpy's dtypes as TensorFlow counts them
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8,
    "int64": 9, "bool": 10, "uint16": 17, "complex128": 18, "uint32": 22, "uint64": 23,
}  # fmt: skip


def tensor_summary(tag: str, x: Any, plugin: str) -> Any:
    """An array as a tensor for one of TensorBoard's plugins.

    Raises:
      ValueError: a dtype that TensorFlow does not have.

    >>> tensor_summary("a", np.zeros((2, 3), np.int8), "tensor").value[0].tensor.dtype
    6
    """
    x = np.asarray(x)
    if x.dtype.name not in TENSOR_TYPES:
        raise ValueError(f"tensor {tag!r} has dtype {x.dtype}, not one of {sorted(TENSOR_TYPES)}")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in x.shape])
    tensor = TensorProto(
        dtype=TENSOR_TYPES[x.dtype.name], tensor_shape=shape, tensor_content=x.tobytes()
    )
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=about)])


def profile_scalars(report: ProfileReport, least: float = 0.005) -> dict[str, float]:
    """What of a profile makes curves.

    >>> from ._device import DeviceRow
    >>> rows = (DeviceRow(("layer_0",), 0.003, 2), DeviceRow(("layer_1",), 0.001, 2))
    >>> profile_scalars(ProfileReport(0.008, (), rows, 0.004))
    {'device_busy_share': 0.5, 'device_ms/layer_n': 4.0}
    """
    found = {}
    if report.device and report.seconds:
        found["device_busy_share"] = report.device_busy / report.seconds
    for row in report.host:
        found[f"host_ms/{'/'.join(row.path)}"] = 1e3 * row.p50
    for row in report.scopes():
        if row.share < least:
            continue
        path = "/".join(row.path).replace("*", "n")
        found[f"device_ms/{path}"] = 1e3 * row.seconds
        if row.of_flops_peak:
            found[f"of_flops_peak/{path}"] = row.of_flops_peak
        if row.of_bytes_peak:
            found[f"of_hbm/{path}"] = row.of_bytes_peak
    for program in report.programs:
        found[f"memory_mib/{program['program']}"] = program["peak"] / 2**20
    return found


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

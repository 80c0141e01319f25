"""A whole run as one value: what `aidx train --config FILE` reads, and what it does.

[model]      path or [model.shape] + tokenizer        [lora]    rank, alpha, targets
[data]       train, heldout, length, batch_size       [output]  folder, save_every, ...
[optimizer]  name, learning_rate, schedule, ...       [train]   epochs or steps, dtype, ...
"""

import dataclasses
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from ..models import LlamaConfig, Model, Tokenizer, init_params, load_model, save_model
from .checkpoint import Checkpoints
from .data import PackedTokens, TokenFile, expand, open_tokens, read_documents, write_tokens
from .loop import Callback, FitResult, fit, make_evaluate
from .lora import Lora
from .loss import language_model_loss
from .state import TrainState, init_state, loss_scale
from .step import make_train_step
from .throughput import train_flops_per_token

SCHEDULES = ("cosine", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "lion", "sgd", "muon")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    """What is trained: a checkpoint (`path`), or random weights of a shape with a tokenizer."""

    path: str | None = None
    shape: Mapping[str, Any] | None = None  # fields of LlamaConfig, vocab_size from the tokenizer
    tokenizer: str | None = None  # a directory with tokenizer.json; None is the checkpoint's


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """What it is trained on: text and JSONL files, or folders of them."""

    train: Sequence[str] = ()
    heldout: Sequence[str] = ()
    length: int = 1024
    batch_size: int = 8
    eval_batches: int = 16


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    """An optimiser and schedule of optax by name; rates rise over `warmup_steps`."""

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 20
    final_share: float = 0.1  # of the learning rate, at the end
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """How: epochs or steps, precision, memory, loss."""

    epochs: float | None = None
    steps: int | None = None
    microbatches: int = 1
    dtype: str = "bfloat16"
    remat: str = "none"
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OutputRecipe:
    """Where checkpoints, logs and the exported model go; the model is `folder/model`."""

    folder: str = "run"
    save_every: int = 500
    keep: int = 3
    eval_every: int = 100
    patience: int | None = None
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run.  `Recipe.parse` makes it of a dict of dicts and refuses what it does not know.

    >>> recipe = Recipe.parse({"model": {"path": "m"}, "data": {"train": ["a.txt"]},
    ...                        "train": {"steps": 5}, "lora": {"rank": 4}})
    >>> recipe.lora.rank, recipe.optimizer.name
    (4, 'adamw')
    """

    model: ModelRecipe
    data: DataRecipe
    train: TrainRecipe
    optimizer: OptimizerRecipe = dataclasses.field(default_factory=OptimizerRecipe)
    output: OutputRecipe = dataclasses.field(default_factory=OutputRecipe)
    lora: Lora | None = None

    @classmethod
    def parse(cls, sections: Mapping[str, Any]) -> "Recipe":
        """A recipe of nested dicts, checked.

        Raises:
          ValueError: an unknown section or option, an option of a wrong type, or options that do
            not go together.
        """
        kinds = {
            "model": ModelRecipe, "data": DataRecipe, "optimizer": OptimizerRecipe,
            "train": TrainRecipe, "output": OutputRecipe, "lora": Lora,
        }  # fmt: skip
        if unknown := set(sections) - set(kinds):
            raise ValueError(f"unknown sections {sorted(unknown)}; known: {', '.join(kinds)}")
        made = {}
        for name, kind in kinds.items():
            options = sections.get(name, {})
            known = {f.name for f in dataclasses.fields(kind)}
            if unknown := set(options) - known:
                raise ValueError(f"[{name}] has no {sorted(unknown)}; known: {sorted(known)}")
            for f in dataclasses.fields(kind):
                if f.name in options and not fits(options[f.name], f.type):
                    raise ValueError(f"[{name}] {f.name}={options[f.name]!r} is not {f.type}")
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
            made[name] = kind(**values) if name != "lora" or name in sections else None
        recipe = cls(**made)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raise ValueError for options that do not go together."""
        model, train = self.model, self.train
        if (model.path is None) == (model.shape is None):
            raise ValueError("[model] needs path (a checkpoint) or shape (random weights), one")
        if model.shape is not None and model.tokenizer is None:
            raise ValueError("[model] shape needs a tokenizer")
        if model.shape is not None and self.lora is not None:
            raise ValueError("[lora] needs a checkpoint to adapt ([model] path)")
        if (train.epochs is None) == (train.steps is None):
            raise ValueError(f"[train] needs epochs or steps: {train.epochs=}, {train.steps=}")
        for what, value, known in (
            ("[train] dtype", train.dtype, DTYPES),
            ("[optimizer] name", self.optimizer.name, OPTIMIZERS),
            ("[optimizer] schedule", self.optimizer.schedule, SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
        if not self.data.train:
            raise ValueError("[data] train names no file")
        if self.output.patience is not None and not self.data.heldout:
            raise ValueError("[output] patience needs [data] heldout")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a recipe's file is of a field's type.

    >>> fits(1, float), fits("1", int), fits(None, int | None), fits("a.txt", Sequence[str])
    (True, False, True, False)
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, k) for k in typing.get_args(kind))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (str, bool, types.NoneType):
        return isinstance(value, kind)
    return not isinstance(value, str | int | float | bool | None)


def make_optimizer(recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
    """The optimiser with its schedule over so many steps; the rate is in its state.

    >>> optimizer = make_optimizer(OptimizerRecipe(warmup_steps=2, learning_rate=1.0), 10)
    >>> optimizer.init({"w": jnp.ones(2)}).hyperparams["learning_rate"].item()
    0.0
    """
    peak, end, warm = recipe.learning_rate, recipe.final_share * recipe.learning_rate, 0
    warm = min(recipe.warmup_steps, steps // 2)
    rest = max(1, steps - warm)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, recipe.final_share),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
        # Warm up, stay, and fall over the last fifth (Hu et al., MiniCPM, 2024).
        "wsd": optax.linear_schedule(peak, end, max(1, rest // 5), rest - max(1, rest // 5)),
    }[recipe.schedule]
    rising = optax.linear_schedule(0.0, peak, max(1, warm))
    rate = optax.join_schedules([rising, after], [warm]) if warm else after

    b1, b2, decay = recipe.b1, recipe.b2, recipe.weight_decay

    def build(learning_rate: Any) -> optax.GradientTransformation:
        if recipe.name == "adamw":
            return optax.adamw(learning_rate, b1, b2, weight_decay=decay, mask=matrices_only)
        if recipe.name == "lion":
            return optax.lion(learning_rate, b1, b2, weight_decay=decay, mask=matrices_only)
        if recipe.name == "sgd":
            decayed = optax.add_decayed_weights(decay, matrices_only)
            return optax.chain(decayed, optax.sgd(learning_rate, momentum=b1))
        return muon(
            learning_rate, weight_decay=decay, weight_decay_mask=matrices_only, adam_b1=b1,
            adam_b2=b2, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimensions,
        )  # fmt: skip

    return optax.inject_hyperparams(build)(learning_rate=rate)


def matrices_only(params: Any) -> Any:
    """Where weight decay applies: leaves of two axes or more.

    >>> matrices_only({"w": jnp.ones((2, 2)), "norm": jnp.ones(2)})
    {'norm': False, 'w': True}
    """
    return jax.tree.map(lambda x: x.ndim > 1, params)


def muon_dimensions(params: Any) -> Any:
    """Muon's view of the layers' matrices `[in, *out]`; None (Adam) for everything else.

    >>> muon_dimensions({"layers": ({"o": jnp.ones((2, 3))},), "embed": jnp.ones((4, 2))})["embed"]
    """

    def of(path: Any, x: Any) -> Any:
        if "layers" not in jax.tree_util.keystr(path) or x.ndim < 2:
            return None
        return MuonDimensionNumbers(reduction_axis=0, output_axis=tuple(range(1, x.ndim)))

    return jax.tree_util.tree_map_with_path(of, params)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its first step: what `fit` is given."""

    model: Model  # as it was opened, f32
    step: Any
    state: TrainState
    data: PackedTokens
    steps: int
    rest: tuple  # the base of a LoRA
    evaluate: Any  # None without held-out text


def prepare(recipe: Recipe) -> Prepared:
    """Open the model, tokenise the text, make state, step and evaluation.

    Raises:
      ValueError, OSError: what is wrong with files or options.
    """
    folder, train = pathlib.Path(recipe.output.folder), recipe.train
    model = open_model(recipe.model, train.seed)
    sources = [("train", recipe.data.train), ("heldout", recipe.data.heldout)]
    files = {part: tokenised(folder / part, paths, model) for part, paths in sources if paths}
    place = (jax.process_index(), jax.process_count())
    size, length = recipe.data.batch_size, recipe.data.length
    data = PackedTokens(files["train"], size, length, train.seed, place)
    steps = train.steps or max(1, math.ceil((train.epochs or 0) * data.steps_per_epoch))

    lora, key = recipe.lora, jax.random.key(train.seed)
    trained = lora.init(model.params, jax.random.fold_in(key, 1)) if lora else model.params
    rest = (model.params,) if lora else ()
    params_of = lora.params_of if lora else None
    dtype = None if train.dtype == "float32" else jnp.dtype(train.dtype)
    averaged = train.ema_decay is not None
    optimizer = make_optimizer(recipe.optimizer, steps)
    loss_fn = language_model_loss(
        model.forward, params_of=params_of, remat=train.remat,
        label_smoothing=train.label_smoothing, z_loss=train.z_loss,
    )  # fmt: skip
    step = make_train_step(
        loss_fn, optimizer, microbatches=train.microbatches, compute_dtype=dtype,
        clip_norm=recipe.optimizer.clip_norm, ema_decay=train.ema_decay,
    )  # fmt: skip
    scale = loss_scale() if train.dtype == "float16" else None
    state = init_state(trained, optimizer, key, ema=averaged, loss_scale=scale)
    evaluate = None
    if "heldout" in files:  # always the plain cross-entropy, whatever is trained on
        plain = language_model_loss(model.forward, params_of=params_of)
        held = heldout_batches(files["heldout"], recipe.data)
        evaluate = make_evaluate(plain, held, rest=rest, compute_dtype=dtype, ema=averaged)
    return Prepared(model, step, state, data, steps, rest, evaluate)


def run_recipe(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> tuple[FitResult, Model]:
    """Do it: tokenise, train, evaluate, save, export.

    A run whose folder holds checkpoints goes on from the last.

    Returns:
      How the run ended, and the trained model, which is also in `folder/model` in Hugging Face's
      layout for `aidx.LLM`.

    Raises:
      ValueError, OSError: what is wrong with files or options.
      NonFiniteError: the run met a NaN; see `fit`.
    """
    folder, output = pathlib.Path(recipe.output.folder), recipe.output
    made = prepare(recipe)
    with Checkpoints(folder / "checkpoints", keep=output.keep) as checkpoints:
        result = fit(
            made.step, made.state, made.data.batch, steps=made.steps, rest=made.rest,
            checkpoints=checkpoints, save_every=output.save_every, evaluate=made.evaluate,
            eval_every=output.eval_every if made.evaluate else None, patience=output.patience,
            callbacks=callbacks,
            flops_per_token=train_flops_per_token(made.model.config, recipe.data.length),
        )  # fmt: skip
    params = result.state.params if result.state.ema is None else result.state.ema
    if recipe.lora:
        params = recipe.lora.merge(made.model.params, params)
    model = made.model.replace(params=params)
    save_model(model, folder / "model")
    return result, model


def open_model(recipe: ModelRecipe, seed: int) -> Model:
    """The checkpoint with f32 parameters, or random ones of the shape.

    Raises:
      ValueError: the shape is not one, or there is no tokenizer.
    """
    if recipe.path is not None:
        model = load_model(recipe.path, dtype="float32")
        if recipe.tokenizer is None:
            return model
    tokenizer = Tokenizer.from_directory(recipe.tokenizer or "")
    if tokenizer is None:
        raise ValueError(f"{recipe.tokenizer} holds no tokenizer")
    if recipe.path is not None:
        return model.replace(tokenizer=tokenizer)
    try:
        config = LlamaConfig(**{"vocab_size": len(tokenizer), **(recipe.shape or {})})
    except TypeError as error:
        raise ValueError(f"[model.shape] is not a LlamaConfig: {error}") from error
    params = init_params(config, jax.random.fold_in(jax.random.key(seed), 2))
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return Model(config, params, tokenizer, eos_token_ids=ends, bos_token_id=tokenizer.bos_token_id)


def tokenised(folder: pathlib.Path, paths: Sequence[str], model: Model) -> TokenFile:
    """The token file of some text, written once: again when a file's size or time changed."""
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in expand(paths)]
    stamp = json.dumps([model.vocab_size, files])
    kept = folder / "sources.json"
    if kept.is_file() and kept.read_text() == stamp:
        return open_tokens(folder)
    file = write_tokens(folder, read_documents(paths, model.tokenizer), model.vocab_size)
    kept.write_text(stamp)
    return file


def heldout_batches(file: TokenFile, recipe: DataRecipe) -> list[dict[str, Any]]:
    """The first batches of the held-out text in its own order; the same at every evaluation."""
    data = PackedTokens(file, recipe.batch_size, recipe.length, seed=None)
    return [data.batch(i) for i in range(min(recipe.eval_batches, data.steps_per_epoch))]

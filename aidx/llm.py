"""`LLM` and `AsyncLLM`: where a model and an engine meet.

    llm = aidx.LLM("path/to/checkpoint")
    llm.generate(["def fib(n):"], aidx.SamplingParams(max_tokens=64))[0].outputs[0].text

`LLM` is for batches: it returns when everything is done.  `AsyncLLM` is for servers: it runs the
engine in a thread of its own, and every request is an async iterator that can be cancelled.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import numbers
import os
import pathlib
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from aidx.engine import step as stepping
from aidx.engine.config import EngineConfig
from aidx.engine.engine import Engine, EngineDeadError
from aidx.engine.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from aidx.engine.sampling_params import BeamSearchParams, SamplingParams
from aidx.engine.stats import EngineStats
from aidx.models import Model, load_model
from aidx.ops.sampling import VARIANTS, Variant
from aidx.typing import Params

Prompt = str | Sequence[int]
AnyParams = SamplingParams | BeamSearchParams
CPU_POOL_BYTES = 1 << 30
# Tokens of a block for so many sequences: many small copies are slower than few, but the prefix
# of one chat is found in smaller steps.
CPU_BLOCK, CPU_MANY = 64, 8


class LLM:
    """A model that answers batches of prompts.

    Args:
        path_or_model: a checkpoint directory, `org/name` on the hub, or a `Model`.
        dtype: of parameters and cache; `auto` is the checkpoint's, float32 on a CPU.
        max_model_len: tokens of a sequence, prompt included; None: what the model is made for, or
            what the pool holds if that is less.  More than the model is made for
            (max_position_embeddings, stretched by its rope scaling) is refused.
        allow_long_max_model_len: take such a max_model_len all the same, for a model with rotary
            embeddings; the text may lose its sense beyond what training showed.
        max_num_seqs: sequences that run at once; None: 256, on a CPU 16.
        max_num_batched_tokens: tokens of one step; None: 2048, on a CPU 256.
        block_size: tokens per block of the cache, and of a prefix that requests share; None: 16, on
            a CPU 64 from 8 sequences on (docs/kernels_paged.md).
        gpu_memory_utilization: share of JAX's memory limit for parameters, cache and temporaries.
        num_blocks: blocks of the pool, in place of gpu_memory_utilization.
        kv_cache_dtype: `auto` is the model's; `int8` and `fp8` (e4m3) store a byte a value, with
            one scale for each token and head; or a float dtype of 16 or 32 bits.
        preemption_mode: what becomes of a sequence whose blocks others need: `recompute` it later,
            `swap` its blocks to host memory, or `auto`: what the warm-up measures to be cheaper.
        swap_space: host memory for swapped blocks, GiB.
        enable_prefix_caching: share the blocks of equal prefixes between requests.
        scheduling_policy: `fcfs`, `priority`, `shortest_first` or `fair`.
        max_overtaken: steps in which later arrivals may be admitted before a waiting request.
        max_logprobs: the most log-probabilities that a request may ask for at a token.
        implementation: of paged attention, None takes the best there is.
        asynchronous: let the device run one step ahead of what the host has read.
        warmup: True compiles every program before the first request; a sampler variant ("greedy",
            "plain", "full") compiles only what it and simpler ones need; False compiles on demand.
            None: True on a GPU; on a CPU, where compiling everything costs minutes, on demand.
        revision: of a model on the hub.
        mesh: devices to spread the model over.
        progress: show a bar while warming up; None: when stderr is a terminal.

    Raises:
        ValueError: the limits contradict one another or the memory.

    Example:
        >>> from aidx.models import LlamaConfig, init_params
        >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> llm = LLM(model, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32,
        ...           block_size=4, num_blocks=17, warmup=False)
        >>> [out] = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
        >>> len(out.outputs[0].token_ids), out.outputs[0].finish_reason
        (4, 'length')
    """

    def __init__(
        self,
        path_or_model: str | os.PathLike | Model,
        *,
        dtype: Any = "auto",
        max_model_len: int | None = None,
        allow_long_max_model_len: bool = False,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        gpu_memory_utilization: float | None = None,
        num_blocks: int | None = None,
        kv_cache_dtype: Any = "auto",
        preemption_mode: str = "auto",
        swap_space: float = 4.0,
        enable_prefix_caching: bool = True,
        scheduling_policy: str = "fcfs",
        max_overtaken: int = 256,
        max_logprobs: int = 20,
        implementation: Any = None,
        asynchronous: bool = True,
        warmup: bool | Variant | None = None,
        revision: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        progress: bool | None = None,
    ):
        if not 0 <= swap_space < float("inf"):
            raise ValueError(f"{swap_space=} GiB must be at least 0")
        if warmup not in (None, True, False, *VARIANTS):
            raise ValueError(f"{warmup=} is none of None, True, False, {', '.join(VARIANTS)}")
        cache_dtype = _cache_dtype(kv_cache_dtype)
        options: dict[str, Any] = dict(
            block_size=16 if block_size is None else block_size,
            preemption_mode=preemption_mode,
            swap_space_bytes=int(swap_space * 2**30),
            scheduling_policy=scheduling_policy,
            max_overtaken=max_overtaken,
            enable_prefix_caching=enable_prefix_caching,
            max_logprobs=max_logprobs,
            implementation=implementation,
            asynchronous=asynchronous,
        )
        # What is wrong whatever the model is found before one is loaded.
        EngineConfig(1, 1, 1, vocab_size=1, num_blocks=2, **options)
        set_compilation_cache()
        self.model = _model(
            path_or_model, dtype, revision, mesh, max_model_len, allow_long_max_model_len
        )
        model = self.model
        cpu = _device(model.params).platform == "cpu"
        seqs = max_num_seqs if max_num_seqs is not None else (16 if cpu else 256)
        if block_size is None and cpu and seqs >= CPU_MANY:
            options["block_size"] = CPU_BLOCK
        tokens = max_num_batched_tokens
        tokens = max(256 if cpu else 2048, seqs) if tokens is None else tokens
        limits: dict[str, Any] = dict(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            dtype=model.dtype if cache_dtype is None else cache_dtype,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            eos_token_ids=tuple(t for t in model.eos_token_ids if t < model.vocab_size),
            window=_widest(model.windows),
            cpu=cpu,
            **options,
        )
        wanted = model.max_model_len if max_model_len is None else max_model_len
        if num_blocks is None:
            num_blocks = pool_size(
                model,
                EngineConfig(**limits, num_blocks=2, max_model_len=wanted),
                0.9 if gpu_memory_utilization is None else gpu_memory_utilization,
            )
        elif gpu_memory_utilization is not None:
            raise ValueError(f"{num_blocks=} and {gpu_memory_utilization=} both size the pool")
        config = EngineConfig(**limits, num_blocks=num_blocks, max_model_len=wanted)
        if max_model_len is not None and max_model_len > config.longest:
            raise ValueError(
                f"{max_model_len=} does not fit the pool's {num_blocks - 1} blocks of "
                f"{config.block_size} = {config.longest} tokens: lower it, or give the pool more "
                "memory"
            )
        config = dataclasses.replace(config, max_model_len=config.longest)
        self.engine = Engine(model.forward, model.params, config, tokenizer=model.tokenizer)
        if warmup is None:
            warmup = not cpu
        if warmup is not False:
            with _bar(progress) as on_progress:
                self.engine.warmup(on_progress, variant=None if warmup is True else warmup)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where the checkpoint has none."""
        return self.model.tokenizer

    def default_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for."""
        return SamplingParams.from_generation_config(self.model.generation_config)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids; ids pass as they are.

        Raises:
            ValueError: a text, and the checkpoint has no tokenizer.
        """
        if not isinstance(prompt, str):
            return np.asarray(prompt).tolist()
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: give token ids")
        return self.tokenizer.encode(prompt)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: AnyParams | Sequence[AnyParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all, or one for each; None takes `default_params()`.
            priority: one for each, for the policy `priority`.
            progress: show a bar.

        Raises:
            ValueError: a prompt or its parameters are refused; then none is run.
        """
        many = _as_list(prompts)
        params = sampling_params if sampling_params is not None else self.default_params()
        each = list(params) if isinstance(params, Sequence) else [params] * len(many)
        ranks = [0] * len(many) if priority is None else list(priority)
        if not len(many) == len(each) == len(ranks):
            raise ValueError(
                f"{len(many)} prompts, {len(each)} sampling_params and {len(ranks)} priorities"
            )
        names: list[str] = []
        try:
            for prompt, p, rank in zip(many, each, ranks, strict=True):
                names.append(
                    self.engine.add_request(
                        self.encode(prompt),
                        p,
                        priority=rank,
                        prompt_text=prompt if isinstance(prompt, str) else None,
                    )
                )
            return self._drain(names, progress)
        except BaseException:  # refused, or interrupted: leave nothing behind that nobody awaits
            for name in names:
                self.engine.abort(name)
            while self.engine.has_unfinished:
                self.engine.step()
            raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several.

        Args:
            messages: `{"role": ..., "content": ...}` in order, or a list of such lists.
            sampling_params: as for `generate`.
            progress: show a bar.
            **options: of the tokenizer's `encode_chat` (tools, add_generation_prompt, ...).

        Raises:
            ValueError: no tokenizer, or no chat template.
            TypeError: messages are no list.
        """
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer, hence no chat template")
        if isinstance(messages, str | Mapping):
            raise TypeError(f"{messages=} must be a list of {{'role': ..., 'content': ...}}")
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if one else messages
        prompts = [self.tokenizer.encode_chat(m, **options) for m in conversations]
        return self.generate(prompts, sampling_params, progress=progress)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        progress: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first.

        Beams share the blocks of what they have in common; a fork copies at most one block.  The
        beams are those of `transformers` with `early_stopping=False`.

        Raises:
            ValueError: a prompt is refused, or max_logprobs is too small for the beam width.
            TypeError: other parameters.
        """
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"{params!r} are no BeamSearchParams")
        outputs = self.generate(prompts, params, progress=progress)
        return [
            BeamSearchOutput(
                tuple(
                    BeamSearchSequence(
                        tokens=(*output.prompt_token_ids, *beam.token_ids),
                        cum_logprob=beam.cumulative_logprob or 0.0,
                        text=(output.prompt or "") + beam.text if self.tokenizer else None,
                        finish_reason=beam.finish_reason,
                        stop_reason=beam.stop_reason,
                    )
                    for beam in output.outputs
                )
            )
            for output in outputs
        ]

    def update_params(self, params: Params) -> None:
        """Take other parameters of the same shapes: nothing compiles, no cached prefix survives."""
        self.engine.update_params(params)
        self.model = self.model.replace(params=params)

    def stats(self) -> EngineStats:
        """See `EngineStats`."""
        return self.engine.stats()

    def _drain(self, names: Sequence[str], progress: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(names)
        with _bar(progress, "generating") as on_progress:
            while len(done) < len(wanted):
                for output in self.engine.step():
                    if output.finished and output.request_id in wanted:
                        done[output.request_id] = output
                        if on_progress is not None:
                            on_progress(len(done), len(wanted))
        return [done[name] for name in names]


class AsyncLLM:
    """An `LLM` whose engine runs in a thread of its own; requests are async iterators.

    Takes the arguments of `LLM`, or an `LLM` as it is.  Close it, or use it as a context manager.

    Example:
        >>> async def main(llm):
        ...     async for output in llm.stream([1, 2, 3], SamplingParams(max_tokens=8)):
        ...         print(output.outputs[0].token_ids)
    """

    def __init__(self, path_or_model: "str | os.PathLike | Model | LLM", **options: Any):
        if isinstance(path_or_model, LLM):
            if options:
                raise ValueError(f"an LLM is ready made; {sorted(options)} come too late")
            self.llm = path_or_model
        else:
            self.llm = LLM(path_or_model, **options)
        self._streams: dict[str, _Stream] = {}
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="aidx-engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        user: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's output, again and again, each time with all its tokens so far.

        A consumer that is slower than the engine sees fewer, larger outputs, never a queue.  To
        cancel, stop iterating (`aclose`, cancelling the task) or `abort` it.

        Raises:
            ValueError: the request is refused.
            EngineDeadError: the engine is closed or lost its device.
        """
        params = sampling_params if sampling_params is not None else self.llm.default_params()
        tokens = self.llm.encode(prompt)
        stream = _Stream(asyncio.get_running_loop())

        def add() -> str:
            name = self.llm.engine.add_request(
                tokens,
                params,
                request_id=request_id,
                priority=priority,
                user=user,
                stream=True,
                prompt_text=prompt if isinstance(prompt, str) else None,
            )
            self._streams[name] = stream
            return name

        added = self._submit(add)
        try:
            await asyncio.wrap_future(added)
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            if not stream.finished:
                added.add_done_callback(self._abandon)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """The finished output of one request; cancelling the task cancels the request."""
        async with contextlib.aclosing(self.stream(prompt, sampling_params, **options)) as stream:
            async for output in stream:
                if output.finished:
                    return output
        raise EngineDeadError("a stream ended without a finished output")

    async def abort(self, request_id: str) -> bool:
        """Cancel a request; its stream ends with finish_reason "abort".  False: no such request."""
        return await asyncio.wrap_future(self._submit(lambda: self.llm.engine.abort(request_id)))

    async def update_params(self, params: Params) -> None:
        """As `LLM.update_params`, between two steps: running requests go on under the new ones.

        Raises:
            ValueError: a leaf differs in path, shape or dtype; the old ones stay.
            EngineDeadError: the engine is closed or lost its device.
        """
        await asyncio.wrap_future(self._submit(lambda: self.llm.update_params(params)))

    def stats(self) -> EngineStats:
        """See `EngineStats`."""
        return self._submit(self.llm.stats).result()

    def close(self) -> None:
        """Cancel what runs and stop the thread; streams that are still read raise."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> "AsyncLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # The engine's thread; nobody else touches the engine.

    def _submit(self, command: Callable[[], Any]) -> "concurrent.futures.Future[Any]":
        """Run `command` on the engine's thread, between two steps."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except Exception as error:  # it belongs to who asked
                future.set_exception(error)

        with self._wake:
            if self._closed or self._failure is not None:
                raise EngineDeadError(
                    f"the engine is closed: {self._failure or 'close() was called'}"
                )
            self._commands.append(run)
            self._wake.notify()
        return future

    def _abandon(self, added: "concurrent.futures.Future[str]") -> None:
        """Nobody reads this stream any more."""
        if added.cancelled() or added.exception() is not None:
            return
        name = added.result()
        self._streams.pop(name, None)
        with contextlib.suppress(EngineDeadError):
            self._submit(lambda: self.llm.engine.abort(name))

    def _run(self) -> None:
        try:
            while self._next():
                for output in self.llm.engine.step():
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
                    if output.finished:
                        self._streams.pop(output.request_id, None)
        except Exception as error:  # it reaches every stream, and whoever calls next
            self._failure = error
        finally:
            with self._wake:
                self._closed = True
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            error = EngineDeadError(f"the engine stopped: {self._failure or 'close() was called'}")
            for stream in list(self._streams.values()):
                stream.put(error)

    def _next(self) -> bool:
        """Run the commands; wait while there is nothing to do.  False: it is over."""
        engine = self.llm.engine
        with self._wake:
            while not (self._commands or engine.has_unfinished or self._closed):
                self._wake.wait()
            commands, self._commands = self._commands, []
            closed = self._closed
        for command in commands:
            command()
        if closed:
            for name in list(self._streams):
                engine.abort(name)
            engine.step()
        return not closed


class _Stream:
    """The newest output of a request, handed from the engine's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._newest: RequestOutput | EngineDeadError | None = None
        self._event = asyncio.Event()
        self.finished = False

    def put(self, output: RequestOutput | EngineDeadError) -> None:
        """From the engine's thread."""
        self._newest = output
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._event.set)

    async def next(self) -> RequestOutput:
        """The newest output that was not handed out yet."""
        await self._event.wait()
        self._event.clear()
        output = self._newest
        assert output is not None
        if isinstance(output, EngineDeadError):
            self.finished = True
            raise output
        self.finished = output.finished
        return output


# What `LLM` is made of.


def pool_size(model: Model, config: EngineConfig, utilization: float) -> int:
    """Blocks that fit beside the parameters and the largest step's temporaries.

        blocks = (limit x utilization - parameters - temporaries) / bytes of a block

    On a CPU the pool takes at most 1 GiB; nowhere more than twice what all seats can fill.

    Raises:
        ValueError: not even two blocks fit.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu_memory_utilization={utilization} must be in (0, 1]")
    per_block = config.block_bytes
    device = _device(model.params)
    if device.platform == "cpu":
        budget = CPU_POOL_BYTES
    else:
        limit = device.memory_stats()["bytes_limit"]
        params = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params)
        )
        temporaries = stepping.temporary_bytes(model.forward, model.params, config)
        budget = int(limit * utilization) - params - temporaries
        per_block //= stepping.cache_splits(model.params, config.num_kv_heads)
        if budget < 2 * per_block:
            raise ValueError(
                f"{utilization} of {limit} bytes less {params} of parameters and {temporaries} of "
                f"temporaries leaves no room for a cache: raise gpu_memory_utilization or lower "
                f"max_num_batched_tokens={config.max_num_batched_tokens}"
            )
    return min(budget // per_block, 2 * config.max_num_seqs * config.max_blocks + 1)


def set_compilation_cache() -> str | None:
    """Keep compiled programs on disk, where the user has not said otherwise.

    The directory is `$XDG_CACHE_HOME/aidx/jax` (`~/.cache/aidx/jax`), for its owner only: who can
    write there can run code here.  Nothing happens when JAX has a cache directory already, or when
    the directory cannot be had for ourselves alone.

    Returns:
        The directory in use by JAX, or None.
    """
    configured = jax.config.jax_compilation_cache_dir
    if configured is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return configured
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = pathlib.Path(home) / "aidx" / "jax"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except (OSError, RuntimeError):
        return None
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # JAX looks for a cache at its first compilation only
    return str(directory)


def _model(path_or_model, dtype, revision, mesh, max_model_len, allow_long) -> Model:
    if not isinstance(path_or_model, Model):
        return load_model(
            path_or_model,
            revision=revision,
            dtype=dtype,
            mesh=mesh,
            max_model_len=max_model_len,
            allow_long_max_model_len=allow_long,
        )
    for name, value in (("revision", revision), ("mesh", mesh)):
        if value is not None:
            raise ValueError(f"{name}={value!r} is for loading; the model is loaded already")
    if dtype != "auto" and np.dtype(dtype) != path_or_model.dtype:
        raise ValueError(f"{dtype=} differs from the model's {path_or_model.dtype}")
    if max_model_len is not None and max_model_len != path_or_model.max_model_len:
        return path_or_model.with_max_model_len(max_model_len, allow_long_max_model_len=allow_long)
    return path_or_model


def _widest(windows: Sequence[int | None]) -> int | None:
    """The keys that some layer may see; None where one sees all."""
    widths = [window for window in windows if window is not None]
    return max(widths, default=None) if len(widths) == len(windows) else None


CACHE_DTYPES = ("int8", "float8_e4m3fn", "float16", "bfloat16", "float32")


def _cache_dtype(wanted: Any) -> np.dtype | None:
    """What `kv_cache_dtype` names; None for the model's."""
    if isinstance(wanted, str) and wanted == "auto":
        return None
    fp8 = isinstance(wanted, str) and wanted in ("fp8", "fp8_e4m3")
    name = "float8_e4m3fn" if fp8 else wanted
    with contextlib.suppress(TypeError):
        dtype = jax.numpy.dtype(name)
        if dtype.name in CACHE_DTYPES:
            return dtype
    raise ValueError(
        f"kv_cache_dtype={wanted!r} is not one of auto, fp8, {', '.join(CACHE_DTYPES)}"
    )


def _device(params: Params) -> Any:
    return next(iter(jax.tree.leaves(params)[0].devices()))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """A text or a list of ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"{prompts=} is neither a text, nor token ids, nor a list of either")
    many = list(prompts)
    one = many and isinstance(many[0], numbers.Number | jax.Array) and not np.ndim(many[0])
    return [many] if one else many


@contextlib.contextmanager
def _bar(progress: bool | None, what: str = "compiling"):
    """A progress bar's callback (done, all), or None."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        yield None
        return
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

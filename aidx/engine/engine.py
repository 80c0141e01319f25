"""`Engine`: it owns the queues and the step in flight; `device.py` has what is on the device.

    schedule -> pack -> run_step(t)          the device works on step t,
    read step t - 1 -> record -> finish      while the host reads what step t - 1 sampled

A decode's input token never comes to the host first: the device keeps every seat's last token.  So
the host is one step behind, and a sequence that ends with a stop token has been given one step too
many by the time the host sees it; that token is dropped.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from aidx.cache import BlockPool, SwappedBlocks
from aidx.engine import scheduler as scheduling
from aidx.engine import step as stepping
from aidx.engine.beam import Beams, select
from aidx.engine.cascade import SharedPrefixes, shared_prefixes
from aidx.engine.config import EngineConfig
from aidx.engine.detokenizer import Pieces
from aidx.engine.device import TABLE_UPDATES, Device, same_params
from aidx.engine.outputs import (
    FinishReason,
    Logprobs,
    RequestOutput,
    logprobs_of_token,
)
from aidx.engine.progress import Progress, advance, end, start
from aidx.engine.request import Request, SequenceState
from aidx.engine.rows import Rows, next_rows, plan_rows
from aidx.engine.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    banned_tokens,
)
from aidx.engine.stats import EngineStats, Meter
from aidx.engine.ticket import (
    Ticket,
    beam_outputs,
    beam_search,
    check_types,
    checked_prompt,
    mask_row,
    new_ticket,
    request_output,
    sample_outputs,
)
from aidx.ops.sampling import VARIANTS, Variant
from aidx.typing import Forward, Params


class EngineDeadError(RuntimeError):
    """The device state was lost and could not be made anew; the engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A step whose tokens the host has not read."""

    rows: Rows
    out: jax.Array
    epoch: int
    running: tuple[SequenceState | None, ...] | None  # who sat where, if every row drew a token


@dataclasses.dataclass(frozen=True)
class _Decode:
    """A step in which every row drew one token: the next plan of these rows is much the same."""

    rows: Rows
    shape: stepping.Shape
    packed: np.ndarray
    running: tuple[SequenceState | None, ...]


# The rows of a step, its trace, and what packs its plan.
_Planned = tuple[Rows, stepping.Shape, Callable[..., np.ndarray]]


class Engine:
    """Continuous batching over one model: requests go in, `step()` gives what they produced.

    Example:
        >>> from aidx.models import LlamaConfig, Model, init_params
        >>> model = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
        >>> model = Model(model, init_params(model, jax.random.key(0)))
        >>> config = EngineConfig(
        ...     num_layers=2, num_kv_heads=2, head_dim=8, vocab_size=97, num_blocks=17,
        ...     block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32,
        ... )
        >>> engine = Engine(model.forward, model.params, config)
        >>> name = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
        >>> while engine.has_unfinished:
        ...     outputs = engine.step()
        >>> [(o.request_id == name, len(o.outputs[0].token_ids)) for o in outputs]
        [(True, 4)]
    """

    def __init__(
        self,
        forward: Forward,
        params: Params,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config = config
        self._device = Device(forward, params, config)
        self._tokenizer = tokenizer
        self._clock = clock
        self._swaps = False  # whether preempted blocks go to the host: `Device.warmup` says
        self._batch = self._new_batch()
        s = config.max_num_seqs
        self._sampling = np.zeros((s, stepping.SAMPLING_COLUMNS), np.int32)
        self._needs = np.zeros((s, 3), np.int64)  # place in VARIANTS, masked, num_logprobs + 1
        self._drew = np.zeros(s, bool)  # whether the device has the seat's last token
        self._every = np.zeros(s, bool)  # one row a prompt token
        self._masked = np.zeros(s, bool)  # whether the seat's masks are not neutral
        self._quiet = np.zeros(s, bool)  # whether only a token that ends it needs a look
        self._endings: list[frozenset[int]] = [frozenset()] * s  # those tokens
        self._pick_shape = functools.partial(
            stepping.pick_shape,
            max_num_seqs=s,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_logprobs=config.max_logprobs,
            cpu=config.cpu,
        )
        self._tickets: dict[str, Ticket] = {}
        self._progress: dict[int, Progress] = {}  # seq_id -> output so far
        self._prompt_logprobs: dict[str, list[Logprobs | None]] = {}
        self._beams: dict[str, Beams] = {}
        self._candidates: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of paused beams
        self._prefixes: tuple[Any, SharedPrefixes | None] = None, None  # of whom; what they share
        self._swapped: dict[int, SwappedBlocks] = {}  # seq_id -> its blocks in host memory
        self._in_flight: _InFlight | None = None
        self._decode: _Decode | None = None  # the last step, where it was one
        self._work: scheduling.Schedule | None = None  # of the last step
        self._epoch = 0  # how often the device state was made anew
        self._touched: dict[str, None] = {}  # requests with something to tell
        self._seq_ids = itertools.count()
        self._names = itertools.count()
        self._pieces: dict[bool, Pieces] = {}
        self._meter = Meter()
        self._last_tick: float | None = None
        self._dead: str | None = None

    # The outside.

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` still has something to do or to say."""
        return bool(self._tickets)

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        user: str = "",
        stream: bool = False,
        prompt_text: str | None = None,
        cache_salt: str | None = None,
    ) -> str:
        """Queue a request; the name it goes by comes back.

        Args:
            prompt: token ids.
            params: None takes `SamplingParams()`; `BeamSearchParams` make its outputs the beams,
                best first.
            request_id: unique among the unfinished; None makes one up.
            priority: smaller goes first under the policy `priority`.
            user: whose service the policy `fair` counts it as.
            stream: whether `step` reports it after every token or at its end only.
            prompt_text: handed back in the output.
            cache_salt: prefixes are shared only within one salt.

        Raises:
            ValueError: it could never run, or asks for something that this engine cannot do.
            TypeError: an argument of another type than it must have.
            EngineDeadError: the engine lost its device.
        """
        if self._dead:
            raise EngineDeadError(self._dead)
        params = params if params is not None else SamplingParams()
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        check_types(name, params, priority, user)
        if name in self._tickets:
            raise ValueError(f"request_id={name!r} is unfinished already")
        tokens = checked_prompt(prompt, self.config.vocab_size)
        search = None
        if isinstance(params, BeamSearchParams):
            search, params = beam_search(self.config, params, len(tokens))
        request = Request(name, tokens, params, priority, user, prompt_text, cache_salt)
        ticket = new_ticket(
            self.config,
            request,
            stream=stream,
            beams=search is not None,
            tokenizer=self._tokenizer,
            pieces=self._pieces_of,
            now=self._clock(),
            seq_ids=self._seq_ids,
        )
        batch = self._batch
        for seq in ticket.samples:
            batch = scheduling.add(batch, seq)
        self._batch = batch
        self._tickets[name] = ticket
        if search is not None:
            self._beams[name] = search
        begin = start(ticket.rules, tokens.tolist())
        for seq in ticket.samples:
            self._progress[seq.seq_id] = begin
        if params.prompt_logprobs is not None:
            self._prompt_logprobs[name] = [None] * len(tokens)
        if self._last_tick is None:
            self._last_tick = self._clock()
        return name

    def abort(self, request_id: str) -> bool:
        """Cancel a request, waiting or running; the next `step` reports it as aborted.

        False: there is no such unfinished request.
        """
        if request_id not in self._tickets:
            return False
        self._end_request(request_id, "abort")
        return True

    def step(self) -> list[RequestOutput]:
        """Issue one step, read the step before it, and report who got on or ended.

        Requests that stream are reported whenever they got a token, the others when they end.  A
        request that fails is reported with finish_reason "error" and the message as its
        stop_reason; the others go on.
        """
        self._tick()
        flight = self._in_flight
        batch, work = scheduling.schedule(self._batch, drained=flight is None, last=self._work)
        if work is None:  # a preemption is due, and the host must know its tokens first
            self._read(flight)
            flight = None
            batch, work = scheduling.schedule(self._batch)
        assert work is not None  # it is None for a step in flight only
        self._batch, self._work = batch, work
        issued, failure = None, None
        if len(work.seats):
            try:
                issued = self._issue(work)
            except Exception as error:  # whatever the device or the model raises ends here
                failure = error
        elif flight is None and self._batch.unfinished and not self._touched:
            self._end_all("error", "the scheduler has no work and somebody waits")
        self._read(flight)
        if failure is not None:
            self._survive(failure, work.seats)
        self._in_flight = issued if issued and issued.epoch == self._epoch else None
        if not self.config.asynchronous:
            self._read(self._in_flight)
            self._in_flight = None
        return self._report()

    def update_params(self, params: Params) -> None:
        """Take other parameters of the same shapes, wherever they are; nothing compiles.

        What was computed with the old ones is worth nothing: the prefix cache is emptied, and the
        running sequences compute their tokens again.

        Raises:
            ValueError: the tree, a shape or a dtype differs.
        """
        same_params(self._device.params, params)
        self._read(self._in_flight)
        self._in_flight = None
        self._device.set_params(params)
        self._batch = scheduling.preempt_all(self._batch)
        self._swapped.clear()
        self._batch = self._batch.replace(pool=self._batch.pool.clear_prefix_cache())

    def stats(self) -> EngineStats:
        """Where the engine stands, and what it has done."""
        batch = self._batch
        pool = batch.pool.stats()
        size = self.config.block_size
        room, tokens = pool.held * size, batch.num_computed - batch.num_evicted * size
        return self._meter.snapshot(
            running=batch.num_running,
            waiting=len(batch.waiting),
            pool_use=pool.utilization,
            pool_utilization=float(tokens.sum()) / room if room else 0.0,
        )

    @property
    def pool(self) -> BlockPool:
        """The block pool as it is now (immutable)."""
        return self._batch.pool

    # One step, on the way out.

    def _issue(self, work: scheduling.Schedule) -> _InFlight:
        """Hand a step to the device; nothing here waits for it."""
        for seq in work.admitted:
            self._take_seat(seq)
        self._meter.steps += 1
        self._meter.preempted += len(work.preempted)
        for seq_id, blocks in work.swap_outs:
            self._swapped[seq_id] = self._device.swap_out(blocks)
            self._meter.swapped += 1
        for seq_id, places in work.swap_ins:
            self._device.swap_in(self._swapped.pop(seq_id), places)
        self._device.copy_blocks(work.copies)
        rows, shape, packed = self._plan(work)
        self._ban_words(rows)
        out = self._device.run(shape, packed)
        return _InFlight(rows, out, self._epoch, self._decode and self._decode.running)

    def _plan(self, work: scheduling.Schedule) -> tuple[Rows, stepping.Shape, np.ndarray]:
        """The rows of a step, its trace, and the packed plan."""
        rows, shape, pack = self._plan_again(work) or self._plan_anew(work)
        updates, room = work.updates, shape.num_updates
        for at in range(room, len(updates), TABLE_UPDATES):
            self._device.write_tables(updates[at : at + TABLE_UPDATES])
        packed = pack(
            shape,
            max_num_seqs=self.config.max_num_seqs,
            starts=rows.starts,
            updates=updates[:room],
        )
        drew = shape.decode and rows.samples.all()
        self._decode = _Decode(rows, shape, packed, self._batch.running) if drew else None
        return rows, shape, packed

    def _plan_again(self, work: scheduling.Schedule) -> _Planned | None:
        """Where `work` is the decode that follows the last step's decode: with that one's plan."""
        last = self._decode
        if last is None or last.running is not self._batch.running:
            return None
        rows = next_rows(last.rows, work)
        if rows is None:
            return None
        return rows, last.shape, functools.partial(stepping.next_plan, last=last.packed)

    def _plan_anew(self, work: scheduling.Schedule) -> _Planned:
        rows = plan_rows(self._batch, work, self._every, self._drew)
        cascade = self._cascade(rows)
        shape = self._shape(rows, cascade=bool(cascade))
        pack = functools.partial(
            stepping.pack_plan,
            seats=rows.seats,
            writes=np.where(rows.samples, rows.seats, self.config.max_num_seqs),
            counts=rows.counts,
            targets=rows.targets,
            sampling=self._sampling[rows.seats],
            tokens=rows.tokens,
            **(cascade if shape.cascade else {}),
        )
        self._drew[rows.seats[rows.samples]] = True
        return rows, shape, pack

    def _cascade(self, rows: Rows) -> dict[str, np.ndarray]:
        """`group` and `shared` of a plan whose rows share prefixes worth it; else nothing.

        Shared blocks are full: what a set of running sequences shares stays until the set changes.
        """
        least = -(-(self.config.cascade_tokens or 0) // self.config.block_size)
        if not least or (rows.counts != 1).any():
            return {}
        batch = self._batch
        if self._prefixes[0] is not batch.running:
            full = np.minimum(batch.num_computed // self.config.block_size, batch.num_blocks)
            found = shared_prefixes(batch.tables, full, least=max(least, 2))
            self._prefixes = batch.running, found
        found = self._prefixes[1]
        if found is None:
            return {}
        tokens = found.lens * self.config.block_size
        group = found.group[rows.seats]
        inside = (group >= 0) & (rows.starts >= tokens[group])  # else its prompt is asked about
        return dict(
            group=np.where(inside, group, -1), shared=np.stack((found.leaders, tokens), axis=1)
        )

    def _shape(self, rows: Rows, *, cascade: bool) -> stepping.Shape:
        """The cheapest trace that serves these rows; with `cascade` where that costs no padding."""
        telling = rows.seats[rows.samples | (rows.targets >= 0)]
        variant, masked, logprobs = self._needs[telling].max(axis=0, initial=0).tolist()
        needed = stepping.Sampler(
            VARIANTS[variant], bool(masked), logprobs - 1 if logprobs else None
        )
        size = len(rows.counts), len(rows.tokens)
        shape = self._pick_shape(*size, needed)
        if not cascade:
            return shape
        sharing = self._pick_shape(*size, needed, cascade=True)
        return sharing if sharing.num_rows == shape.num_rows else shape

    def _take_seat(self, seq: SequenceState) -> None:
        """Put down what the steps need to know about the sequence in `seq.seat`."""
        ticket, seat = self._tickets[seq.request.request_id], seq.seat
        self._sampling[seat] = ticket.sampling
        self._sampling[seat, 2] = seq.index
        self._needs[seat] = ticket.needs
        self._drew[seat] = False
        self._every[seat] = seq.every_logit
        self._quiet[seat] = False
        self._endings[seat] = ticket.rules.eos_ids | ticket.rules.stop_ids
        if ticket.needs[1]:
            self._device.write_masks(seat, mask_row(self.config, ticket, seq.output.tolist()))
            self._masked[seat] = True
        elif self._masked[seat]:
            self._device.write_masks(seat)
            self._masked[seat] = False
        if seq.num_known == seq.num_prompt and not seq.preemptions:  # else it is no new prompt
            self._meter.admitted_tokens += seq.num_prompt
            self._meter.cached_tokens += seq.num_cached
        self._meter.prompt_tokens += seq.num_prompt - min(seq.num_computed, seq.num_prompt)
        if ticket.metrics.first_scheduled_time is None:
            metrics = dataclasses.replace(ticket.metrics, first_scheduled_time=self._clock())
            ticket = dataclasses.replace(ticket, metrics=metrics, num_cached=seq.num_cached)
        if seq.preemptions:
            metrics = dataclasses.replace(
                ticket.metrics, num_preemptions=ticket.metrics.num_preemptions + 1
            )
            ticket = dataclasses.replace(ticket, metrics=metrics)
        self._tickets[seq.request.request_id] = ticket

    def _ban_words(self, rows: Rows) -> None:
        """Ban what would complete a bad word; such a row is synchronous, so its output is known."""
        if not self._batch.synchronous.any():
            return
        for seat in rows.seats[rows.samples & self._batch.synchronous[rows.seats]]:
            seq = self._batch.sequence(int(seat))
            ticket = self._tickets[seq.request.request_id]
            if not ticket.bad_words:
                continue
            output = seq.output.tolist()
            now = banned_tokens(ticket.bad_words, output)
            if now or banned_tokens(ticket.bad_words, output[:-1]):
                self._device.write_masks(int(seat), mask_row(self.config, ticket, output, now))

    # One step, on the way back.

    def _read(self, flight: _InFlight | None) -> None:
        """Wait for a step's tokens, record them, and end the samples that they end."""
        if flight is None or flight.epoch != self._epoch:
            return
        try:
            out = np.asarray(flight.out)[: len(flight.rows.seats)]
        except Exception as error:  # an error of the device shows only here
            self._lose_device(error)
            return
        rows = flight.rows
        if self._prompt_logprobs:
            self._read_prompt_logprobs(rows, out)
        seats, tokens = rows.seats, out[:, 0]
        if min(tokens.tolist()) < 0:
            self._end_hopeless(rows, out)
        if flight.running is self._batch.running and not self._beams:
            at = np.arange(len(seats))
        else:
            at = (self._alive(rows) & rows.samples).nonzero()[0]
            if self._beams:
                at = self._read_beams(rows, out, at)
            seats, tokens = seats[at], tokens[at]
        self._batch = scheduling.record(self._batch, seats, tokens)
        self._meter.generated_tokens += len(at)
        done = []
        full = self._batch.num_known >= self._batch.limit
        columns = (at, seats, tokens, self._quiet[seats], full[seats])
        for i, seat, token, quiet, last in zip(*(c.tolist() for c in columns), strict=True):
            if quiet and not last and token not in self._endings[seat]:
                continue
            seq = self._batch.running[seat]
            if seq is not None and self._advance(seq, token, out[i]):
                done.append(seat)
        self._batch = scheduling.finish(self._batch, done)

    def _end_hopeless(self, rows: Rows, out: np.ndarray) -> None:
        """End requests whose rows had nothing to draw."""
        for seat in rows.seats[self._alive(rows) & rows.samples & (out[:, 0] < 0)].tolist():
            self._end_request(
                self._batch.at(seat).request.request_id,
                "error",
                "no token has a finite logit: the model gave NaN, or every token is forbidden",
            )

    def _read_beams(self, rows: Rows, out: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Keep the beams' candidates, advance the searches that have all; the other rows."""
        n, others, searches = self.config.max_logprobs, [], {}
        for i in at.tolist():
            seq = self._batch.at(int(rows.seats[i]))
            name = seq.request.request_id
            if name not in self._beams:
                others.append(i)
                continue
            k = self._beams[name].num_candidates
            values = out[i].view(np.float32)[3 + n : 3 + n + k]
            self._candidates[seq.seq_id] = (out[i, 3 : 3 + k], values)
            searches[name] = None
        for name in searches:
            if all(seq.seq_id in self._candidates for seq in self._tickets[name].samples):
                self._advance_beams(name)
        return np.array(others, np.int64)

    def _advance_beams(self, name: str) -> None:
        """One round of a beam search: the beams that go on fork their parents' blocks."""
        ticket = self._tickets[name]
        group = [seq.seq_id for seq in ticket.samples]
        found = [self._candidates.pop(seq_id) for seq_id in group]
        beams, parents = select(self._beams[name], *zip(*found, strict=True))
        self._beams[name] = beams
        self._meter.generated_tokens += max(len(parents), 1)
        metrics = ticket.metrics
        if metrics.first_token_time is None:
            metrics = dataclasses.replace(metrics, first_token_time=self._clock())
        for seq_id in group:
            del self._progress[seq_id]
        if ticket.stream or not parents:
            self._touched[name] = None
        children = [
            (next(self._seq_ids), parent, beam.tokens[-1])
            for parent, beam in zip(parents, beams.running, strict=True)
        ]
        self._batch, samples = scheduling.branch(self._batch, group, children)
        self._tickets[name] = dataclasses.replace(ticket, samples=tuple(samples), metrics=metrics)
        for seq in samples:
            self._progress[seq.seq_id] = Progress(num_tokens=len(beams.running[0].tokens))
            if seq.seat >= 0:
                self._take_seat(seq)

    def _alive(self, rows: Rows) -> np.ndarray:
        """Which rows still belong to the sequence that sits there: others ended meanwhile."""
        return self._batch.seq_ids[rows.seats] == rows.seq_ids

    def _advance(self, seq: SequenceState, token: int, out: np.ndarray) -> bool:
        """Give a sample its token; whether it ended with that."""
        name, known = seq.request.request_id, int(self._batch.num_known[seq.seat])
        ticket = self._tickets[name]
        if ticket.metrics.first_token_time is None:
            metrics = dataclasses.replace(ticket.metrics, first_token_time=self._clock())
            ticket = self._tickets[name] = dataclasses.replace(ticket, metrics=metrics)
        try:
            logprobs = None
            if ticket.request.params.logprobs is not None:
                logprobs = self._logprobs(ticket, token, out, ticket.request.params.logprobs)
            progress = advance(
                self._progress[seq.seq_id],
                ticket.rules,
                seq.log[seq.num_prompt : known],
                last=known >= seq.limit,
                logprobs=logprobs,
            )
        except Exception as error:  # a tokenizer is foreign code: its failure is this request's
            self._end_request(name, "error", f"{type(error).__name__}: {error}")
            return False
        self._progress[seq.seq_id] = progress
        self._quiet[seq.seat] = ticket.quiet
        if ticket.stream or progress.finish_reason is not None:
            self._touched[name] = None
        return progress.finish_reason is not None

    def _logprobs(self, ticket: Ticket, token: int, out: np.ndarray, asked: int) -> Logprobs:
        """One row of a step's output as `Logprobs`: the token's own and the `asked` best."""
        n = self.config.max_logprobs
        values = out.view(np.float32)
        decode = ticket.rules.detokenizer.pieces.one if ticket.rules.detokenizer else None
        return logprobs_of_token(
            token,
            values[1],
            out[2],
            out[3 : 3 + asked],
            values[3 + n : 3 + n + asked],
            decode,
        )

    def _read_prompt_logprobs(self, rows: Rows, out: np.ndarray) -> None:
        for i in np.flatnonzero(self._alive(rows) & (rows.targets >= 0)):
            request = self._batch.at(rows.seats[i]).request
            ticket = self._tickets[request.request_id]
            self._prompt_logprobs[request.request_id][rows.starts[i] + 1] = self._logprobs(
                ticket, int(rows.targets[i]), out[i], request.params.prompt_logprobs
            )

    # Endings.

    def _end_request(
        self, name: str, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End every sample of a request that has not ended; the next report says so."""
        ticket, lengths = self._tickets[name], self._batch.lengths()
        for seq in ticket.samples:
            self._candidates.pop(seq.seq_id, None)
            self._swapped.pop(seq.seq_id, None)
            progress = self._progress[seq.seq_id]
            if progress.finish_reason is None:
                output = seq.log[seq.num_prompt : lengths[seq.seq_id]]
                self._progress[seq.seq_id] = end(
                    progress, ticket.rules, output, reason, stop_reason
                )
        self._batch = scheduling.cancel(self._batch, [seq.seq_id for seq in ticket.samples])
        self._touched[name] = None

    def _end_all(self, reason: FinishReason, stop_reason: str) -> None:
        for name in list(self._tickets):
            self._end_request(name, reason, stop_reason)

    def _survive(self, error: Exception, seats: np.ndarray) -> None:
        """A step could not be issued: those in it fail; if it took the cache along, all running."""
        if self._device.lost:
            self._lose_device(error)
            return
        running = self._batch.running
        for name in {running[s].request.request_id for s in seats if running[s] is not None}:
            self._end_request(name, "error", f"{type(error).__name__}: {error}")
        # Blocks were published, and were to be swapped out, on the strength of that step.
        batch = self._batch.replace(pool=self._batch.pool.clear_prefix_cache())
        lost = [seq.seq_id for seq in batch.waiting if seq.seq_id not in self._swapped]
        self._batch = scheduling.forget_swapped(batch, lost)

    def _lose_device(self, error: Exception) -> None:
        """The cache is gone: whoever runs fails, and whoever waits gets a new one."""
        message = f"{type(error).__name__}: {error}"
        for name in {s.request.request_id for s in self._batch.running if s is not None}:
            self._end_request(name, "error", message)
        self._epoch += 1
        self._swapped.clear()
        waiting = scheduling.forget_swapped(self._batch, [s.seq_id for s in self._batch.waiting])
        self._batch = self._new_batch().replace(
            waiting=waiting.waiting,
            users=waiting.users,
            service=waiting.service,
        )
        try:
            self._device.allocate()
        except Exception as second:  # no memory, or no device any more
            self._dead = f"{message}; then {type(second).__name__}: {second}"
            self._end_all("error", self._dead)

    # Reports.

    def _report(self) -> list[RequestOutput]:
        outputs = []
        for name in self._touched:
            ticket = self._tickets[name]
            done = all(self._progress[seq.seq_id].finish_reason for seq in ticket.samples)
            if ticket.stream or done:
                outputs.append(self._output(ticket, done))
            if done:
                self._forget(ticket, outputs[-1])
        self._touched = {}
        self._tick()
        return outputs

    def _forget(self, ticket: Ticket, output: RequestOutput) -> None:
        """The request has ended and been reported."""
        name = ticket.request.request_id
        self._meter.finish(output)
        del self._tickets[name]
        self._prompt_logprobs.pop(name, None)
        self._beams.pop(name, None)
        for seq in ticket.samples:
            del self._progress[seq.seq_id]

    def _output(self, ticket: Ticket, done: bool) -> RequestOutput:
        name = ticket.request.request_id
        if ticket.beams:
            search = self._beams[name]
            ended = self._progress[ticket.samples[0].seq_id] if search.running else None
            samples = beam_outputs(search, ended, self._tokenizer)
        else:
            samples = sample_outputs(ticket, self._progress)
        finished = self._clock() if done else None
        return request_output(ticket, samples, self._prompt_logprobs.get(name), finished)

    def _tick(self) -> None:
        """Time counts as busy while some request is unfinished."""
        now = self._clock()
        if self._last_tick is not None:
            self._meter.busy_seconds += now - self._last_tick
        self._last_tick = now if self._tickets else None

    def _new_batch(self) -> scheduling.BatchScheduler:
        pool = BlockPool.create(self.config.num_blocks, self.config.block_size)
        config = self.config.scheduler()
        if self._swaps:
            config = dataclasses.replace(config, preemption_mode="swap")
        return scheduling.new_batch(config, pool)

    def _pieces_of(self, skip_special_tokens: bool) -> Pieces:
        """The tokenizer's pieces, made once."""
        if skip_special_tokens not in self._pieces:
            self._pieces[skip_special_tokens] = Pieces(
                self._tokenizer, skip_special_tokens=skip_special_tokens
            )
        return self._pieces[skip_special_tokens]

    # Warm-up.

    def warmup(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        variant: Variant | None = None,
    ) -> int:
        """Compile every program that a request could ask for, then run each once with no rows.

        Args:
            on_progress: called with (done, all) after each program.
            variant: compile only what requests need whose `SamplingParams.variant` is at most this
                and that want neither masks nor logprobs; None: everything.

        Returns:
            How many programs there are.
        """
        if self._tickets:
            raise RuntimeError("warm up before the first request")
        done, self._swaps = self._device.warmup(on_progress, variant)
        if self._swaps:
            limits = dataclasses.replace(self._batch.config, preemption_mode="swap")
            self._batch = self._batch.replace(config=limits)
        return done

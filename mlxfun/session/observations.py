"""The session's routing statistics: collecting, counting chat traffic, loading and saving.

Statistics know the weights they were made on; mixing two states is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mlxfun.calibration import collect as calibrate
from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.reports import CollectReport, StatsAction, StatsReport
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.load import Loaded
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Line, Tokens, line_ids, read_lines, tokenize
from mlxfun.data.lines import BrokenLines
from mlxfun.data.scan_reports import Identity
from mlxfun.data.split import HELD_OUT_LEAST, HELD_OUT_SHARE, split_samples
from mlxfun.editing.earlier import present
from mlxfun.editing.editor import Editor
from mlxfun.errors import ModelError, StateError
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.events import Notice
from mlxfun.hooks.routing import Taps
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.anatomy.context_length import beyond_context
from mlxfun.model.anatomy.masks import mask_of
from mlxfun.model.device.batch_size import batch_size
from mlxfun.session import views
from mlxfun.session.chat_counts import ChatCounter, TrafficCounter, WaitingTokens
from mlxfun.tally import Tally

if TYPE_CHECKING:
    from mlxfun.arrays import Array


def _count_rest(lines: list[Line], drawn: set[int], held: tuple[int, ...], tally: Tally) -> None:
    """Count the lines that calibration did not use: held out, or not drawn at all."""
    for index, line in enumerate(lines):
        tally.part(line.source).left += index not in drawn
    for index in held:
        tally.part(lines[index].source).notes["more held out"] += 1


class Observations:
    """stats: what was collected, None before. held_out: samples kept away from calibration.

    pending: called before statistics are read or replaced; adds what a server has counted and not
    yet handed over, see `add_traffic`.

    calibration: the sequences of the last collect. source_commands:
    the commands that made the statistics in hand.
    """

    def __init__(self, loaded: Loaded, anatomy: MoEMap, taps: Taps, editor: Editor) -> None:
        self._loaded = loaded
        self._anatomy = anatomy
        self._taps = taps
        self._editor = editor
        self._auto_save: Path | None = None
        self._stats: RoutingStats | None = None
        self._waiting = WaitingTokens(anatomy)
        self.pending: Callable[[], None] = lambda: None
        self.held_out: EvalSet | None = None
        self.calibration: tuple[Tokens, ...] = ()
        self.counting = False
        self.source_commands: tuple[str, ...] = ()

    @property
    def stats(self) -> RoutingStats | None:
        """What was collected, with all tokens of chat and of requests that were counted."""
        self.pending()
        if self._stats is not None:
            self._stats = self._waiting.added_to(self._stats)
        return self._stats

    @stats.setter
    def stats(self, stats: RoutingStats | None) -> None:
        self.pending()
        self._replace(stats)

    def _replace(self, stats: RoutingStats | None) -> None:
        self._waiting = WaitingTokens(self._anatomy)
        self._stats = stats

    def chat_counter(self, ctx: Context) -> ChatCounter | None:
        """What counts an answer's forwards, None while chat traffic is not counted."""
        return ChatCounter(self, ctx) if self.counting else None

    def traffic_counter(self, ctx: Context) -> TrafficCounter | None:
        """What counts requests to the model that is live, None while they are not counted, or
        where the statistics in hand are of other weights: those of one side of a staged plan."""
        if not self.counting:
            return None
        live, steered = self._editor.live_state, not self._editor.steering.empty
        counted = self._counts_traffic_of(live)
        return TrafficCounter(self, self._anatomy, ctx, live, steered) if counted else None

    def _counts_traffic_of(self, state: str) -> bool:
        if self._stats is None:
            return state == self._editor.state
        return self._stats.combined != "rank" and self._stats.state == state

    def add_traffic(self, sums: Array, tokens: int, state: str, steered: bool) -> None:
        """Add sums [L, S, E] of tokens that requests were served on `state`.

        Raises ModelError for NaN and infinity.
        """
        if self.counting and self._counts_traffic_of(state):
            stats = self._empty_stats() if self._stats is None else self._stats
            self._stats = stats.plus(sums, 0, tokens, steered)

    def collect(
        self, options: CollectOptions, command: str = "", ctx: Context = SILENT
    ) -> CollectReport:
        """Calibrate on the committed weights without steering: prunes decide by these numbers, and
        steering is no part of the weights. A cancel keeps what was collected and says so."""
        wanted = options.data.max_samples
        tally = ctx.reading()
        lines = read_lines(replace(options.data, max_samples=None), tally)
        chosen, held = split_samples(
            len(lines), wanted, options.data.seed, HELD_OUT_SHARE, HELD_OUT_LEAST
        )
        sequences = self._tokens([lines[i] for i in chosen], options, tally)
        start = self.stats if options.add and self.stats is not None else self._empty_stats()
        self._require_same_state(start)
        self._require_counts(start)
        held_out = self._held_out(options, [lines[i] for i in held])
        tally.short_of(wanted, len(chosen))
        _count_rest(lines, {*chosen, *held}, held, tally)
        before, began = (start.samples, start.tokens), monotonic()
        if options.known is not None:
            found, cancelled = self._read(options.known), False
            self._require_same_state(found)
        else:
            found, cancelled = self._run(sequences, options, start, ctx)
        # All at once and only now: a run that failed leaves what there was, with its own origin.
        self.stats, self.held_out, self.calibration = found, held_out, tuple(sequences)
        self._note(command or f"collect --dataset {options.data.source}", anew=not options.add)
        return self._collect_report(
            self.stats, options, (len(sequences), before[0], before[1], began), cancelled
        )

    def _run(
        self, sequences: list[Tokens], options: CollectOptions, start: RoutingStats, ctx: Context
    ) -> tuple[RoutingStats, bool]:
        model = self._loaded.model
        size = batch_size(model, self._anatomy, options.batch_tokens, options.max_batch)
        longest = max(map(len, sequences), default=0)
        ctx.emit(Notice("info", f"calibrating in {size.summary(longest)}"))
        if warning := beyond_context(self._loaded.config, longest):
            ctx.emit(Notice("warning", warning))
        with self._editor.live("base"), self._editor.unsteered():
            return calibrate.collect(model, self._taps, size.split(sequences), start, ctx)

    def _held_out(self, options: CollectOptions, lines: list[Line]) -> EvalSet | None:
        tokenizer, vocabulary = self._loaded.tokenizer, self._anatomy.vocabulary
        # Lines of a word or two may be all that is held out: then there is nothing to measure on.
        long: list[Line] = []
        broken = BrokenLines(Tally())  # like those, they stay among what was held out
        for line in lines:
            with broken.counted(line.source):
                long += [line] if len(line_ids(line, tokenizer)) >= 2 else []
        tokens = tuple(tokenize(long, tokenizer, options.data.max_tokens, vocabulary))
        return EvalSet(f"{options.data.source} (held out)", tokens) if tokens else None

    def _tokens(self, lines: list[Line], options: CollectOptions, tally: Tally) -> list[Tokens]:
        vocabulary = self._anatomy.vocabulary
        return tokenize(lines, self._loaded.tokenizer, options.data.max_tokens, vocabulary, tally)

    def _collect_report(
        self,
        stats: RoutingStats,
        options: CollectOptions,
        run: tuple[int, int, int, float],
        cancelled: bool,
    ) -> CollectReport:
        planned, samples, tokens, began = run
        alive = mask_of(self._anatomy, self._editor.committed)
        seconds = max(monotonic() - began, 1e-9)
        return CollectReport(
            dataset=options.data.source,
            samples=stats.samples - samples,
            samples_planned=planned,
            tokens=stats.tokens - tokens,
            tokens_per_second=0.0 if options.known else (stats.tokens - tokens) / seconds,
            coverage=stats.coverage(alive),
            unseen=stats.unseen(alive),
            suggested_samples=stats.suggested_samples(alive),
            held_out=len(self.held_out.sequences) if self.held_out else 0,
            cancelled=cancelled,
            steering_off=not self._editor.steering_of("base").empty,
        )

    def _empty_stats(self) -> RoutingStats:
        return RoutingStats.empty(
            self._anatomy.indices,
            self._anatomy.num_experts,
            model=self._loaded.checkpoint_id,
            model_name=self._loaded.model_id,
            state=self._editor.state,
            alive=mask_of(self._anatomy, self._editor.committed),
        )

    def stats_or_empty(self) -> RoutingStats:
        """The statistics in hand, those of no token without any."""
        stats = self.stats
        return self._empty_stats() if stats is None else stats

    def _require_same_state(self, stats: RoutingStats) -> None:
        if stats.state != self._editor.state:
            raise StateError(
                f"the statistics in hand were made on state {stats.state or 'unknown'}, the model "
                f"is at {self._editor.state}; run `stats reset` first, or undo to that state"
            )

    def _require_counts(self, stats: RoutingStats) -> None:
        if stats.combined == "rank":
            raise StateError(
                "the statistics in hand were merged by rank, and tokens cannot be added to ranks; "
                "run `stats reset` first, or merge by sum"
            )

    def _require_stats(self, action: str) -> RoutingStats:
        if self.stats is None:
            raise StateError(f"there are no statistics to {action}; run collect or stats load")
        return self.stats

    def show(self, action: StatsAction = "show") -> StatsReport:
        """The statistics in hand. Raises StateError without any."""
        return self._report(self._require_stats(action), action)

    def _report(
        self, stats: RoutingStats, action: StatsAction, path: Path | None = None
    ) -> StatsReport:
        alive = mask_of(self._anatomy, self._editor.committed)
        return views.stats_report(stats, alive, action, self.counting, self._editor.state, path)

    def save(self, path: Path) -> StatsReport:
        """Write the statistics as `.npz`."""
        stats = self._require_stats("save")
        stats.save(path)
        return self._report(stats, "save", path)

    def _note(self, command: str, *, anew: bool) -> None:
        self.source_commands = (command,) if anew else (*self.source_commands, command)

    def load(self, path: Path) -> StatsReport:
        """Read an `.npz` made on this model. Raises PlanError for another shape or model."""
        named = RoutingStats.read(path).model
        self.stats = self._read(path)
        self._note(f"stats load {path}", anew=True)
        earlier = self._editor.earlier.recognises(named)
        return replace(self._report(self.stats, "load", path), earlier=earlier, unnamed=not named)

    @contextmanager
    def taken_from(self, path: Path, command: str) -> Iterator[None]:
        """Statistics of a file from here on; what there was comes back if the block fails."""
        before = self.stats, self.source_commands
        self.load(path)
        self.source_commands = (command or f"stats load {path}",)
        try:
            yield
        except BaseException:
            self.stats, self.source_commands = before
            raise

    def read(self, path: Path, allow_stale: bool) -> RoutingStats:
        """See Workspace.read_statistics."""
        stats = self._read(path)
        if stats.state != self._editor.state and not allow_stale:
            raise StateError(
                f"{path} was made on state {stats.state}, the model is at {self._editor.state}; "
                "collect again, or use it knowingly with --allow-stale"
            )
        return stats

    def _read(self, path: Path) -> RoutingStats:
        stats = RoutingStats.load(path, self._anatomy.indices, self._anatomy.num_experts)
        found = present(self._editor).known(Identity(stats.model, stats.state))
        stats = replace(stats, model=found.model, state=found.state)
        if stats.model and stats.model != self._loaded.checkpoint_id:
            raise ModelError(
                f"{path} was made on {stats.model_name or stats.model}, not on "
                f"{self._loaded.model_id} ({self._loaded.checkpoint_id}); collect on this model"
            )
        # A file of another tool does not say; it can only have been made on the checkpoint.
        return replace(
            stats,
            model=self._loaded.checkpoint_id,
            model_name=self._loaded.model_id,
            state=stats.state or self._editor.root_state,
        )

    def reset(self) -> StatsReport:
        """Forget the statistics."""
        self.stats = self._empty_stats()
        report = self._report(self.stats, "reset")
        self.stats = None
        return report

    def set_counting(self, on: bool, auto_save: Path | None = None) -> StatsReport:
        """Count chat traffic too; with `auto_save` write the statistics after every answer."""
        self.pending()
        self.counting, self._auto_save = on, auto_save if on else None
        return self._report(self.stats or self._empty_stats(), "count on" if on else "count off")

    def count_prompt(self, sums: Array, tokens: int, ctx: Context) -> None:
        """Add sums [L, S, E] of chat tokens to the statistics."""
        if self.may_count(ctx):
            stats = self.stats or self._empty_stats()
            self.stats = stats.plus(sums, 0, tokens, not self._editor.steering.empty)

    def count_token(self, experts: Array, weights: Array, norms: Array, ctx: Context) -> None:
        """Add a token of chat, [L, K] of each, to the statistics."""
        if not self.may_count(ctx):
            return
        if self._stats is None:
            self._stats = self._empty_stats()
        if self._waiting.add(experts, weights, norms, not self._editor.steering.empty):
            self._stats = self._waiting.added_to(self._stats)

    def show_counts(self, ctx: Context) -> None:
        """Show the routing so far."""
        if self.counting:
            ctx.emit(calibrate.frame(self.stats or self._empty_stats(), job=0))

    def end_answer(self, ctx: Context) -> None:
        """An answer is over: its routing is shown, and saved where that was asked for."""
        if not self.counting:
            return
        stats = self.stats or self._empty_stats()
        stats = replace(stats, samples=stats.samples + 1)
        self._replace(stats)
        ctx.emit(calibrate.frame(stats, job=0))
        if self._auto_save is not None:
            stats.save(self._auto_save)

    def end_request(self) -> None:
        """One answer of many is over; what is counted is shown now and then."""
        if not self.counting:
            return
        stats = self._empty_stats() if self._stats is None else self._stats
        self._stats = replace(stats, samples=stats.samples + 1)
        if self._auto_save is not None and self.stats is not None:
            self.stats.save(self._auto_save)

    def may_count(self, ctx: Context) -> bool:
        """Whether the statistics are of the weights that run; counting stops where they are not."""
        if not self.counting:
            return False  # it stopped in the middle of this answer
        live = self._editor.live_state
        if self._stats is None or (self._stats.combined != "rank" and self._stats.state == live):
            return True
        self.counting = False
        why = f"the statistics are of state {self._stats.state}, this chat runs on {live}"
        if self._stats.combined == "rank":
            why = "the statistics were merged by rank, and tokens cannot be added to ranks"
        ctx.emit(Notice("warning", f"counting stopped: {why}; `stats reset` to start anew"))
        return False

"""What is held of the model in memory: reports, profiles, and what needs the whole of it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import ModelError, PlanError, SaveError, StateError, UsageError
from mlxfun.events import Event, ResidencyFrame, RoutingFrame, Token
from mlxfun.generation.decoder import Decoder
from mlxfun.generation.options import GenerateOptions
from mlxfun.memory.profile import Layers, read_profile, write_profile
from mlxfun.memory.reports import ResidencyReport, SweepReport, SweepRow, some_of
from mlxfun.memory.slots.partly import AUTO_SHARE
from mlxfun.memory.slots.slots import ExpertSlots
from mlxfun.model.device.memory import free_bytes
from mlxfun.model.parameters import flatten
from mlxfun.report import TextReport
from mlxfun.session.base import SessionBase
from mlxfun.tally import Tally

if TYPE_CHECKING:
    from mlxfun.arrays import Array


STEPS = 6
"""How many numbers of slots a sweep tries by itself."""

FRAME_SECONDS = 0.1

SWEEP_PROMPT = "Explain in a few paragraphs how a mortgage works and who should take one."


class _Watched(Context):
    """A context that is told where experts are, a few times a second, while tokens pass."""

    def __init__(self, ctx: Context, slots: ExpertSlots, experts: int) -> None:
        self._ctx, self._slots, self._experts = ctx, slots, experts
        self._last = 0.0

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        """See Context."""
        self._ctx.progress(label, done, total, unit)

    def check(self) -> None:
        """See Context."""
        self._ctx.check()

    def reading(self) -> Tally:
        """See Context."""
        return self._ctx.reading()

    def interlude(self) -> None:
        """See Context."""
        self._ctx.interlude()

    def emit(self, event: Event) -> None:
        """Hand on the event, and how things stand if it shows that tokens have passed."""
        self._ctx.emit(event)
        now = perf_counter()
        if isinstance(event, Token | RoutingFrame) and now - self._last > FRAME_SECONDS:
            self._last = now
            self._ctx.emit(ResidencyFrame(0, self._slots.frame(self._experts)))


class _Endless:
    """A tokenizer without a token that ends an answer: all answers are of one length."""

    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def endless_decoder(session: SessionBase) -> Decoder:
    """A decoder whose answers all have the length that is asked for, to measure speed with."""
    tokenizer = cast("Tokenizer", _Endless(session.tokenizer))
    return Decoder(session.model, tokenizer, session.taps, kv=session.kv)


def _steps(slots: ExpertSlots, least: int) -> tuple[int, ...]:
    """Numbers of slots from `least` to what fits, each larger than the last by the same factor."""
    most = max(layer.bank.experts for layer in slots.layers) - 1
    free = free_bytes()
    if free is not None:
        most = min(most, slots.report().capacity + int(free * AUTO_SHARE) // slots.slot_bytes)
    most = max(most, least)
    steps = {round(least * (most / least) ** (i / (STEPS - 1))) for i in range(STEPS)}
    return tuple(sorted(steps))


class Residency(SessionBase):
    """Sessions whose experts may be in slots."""

    def _held(self) -> Array | None:
        """Where the experts are, None where all are in memory."""
        slots = self._workspace.slots
        return None if slots is None else slots.frame(self._layers.experts, fresh=False)

    def _watched(self, ctx: Context) -> Context:
        """`ctx`, told of where experts are as well where some are on disk."""
        slots = self._workspace.slots
        return ctx if slots is None else _Watched(ctx, slots, self._layers.experts)

    def _opened(self, options: LoadOptions) -> None:
        slots = self._workspace.slots
        if slots is None:
            return
        if options.profile is not None:
            self.load_profile(options.profile)
            slots.forget_counts()
        # Which experts are there must not depend on earlier runs where the others are left out.
        elif options.profiles is not None and options.miss == "read":
            remembered = options.profiles / f"{self.checkpoint_id.replace(':', '-')}.json"
            with suppress(PlanError):  # there is none yet, or it is of no use
                self.load_profile(remembered)
            slots.forget_counts()
            self.before_close.append(partial(self._remember, remembered))

    def _remember(self, path: Path) -> None:
        """Keep for the next time which experts were used, if any were."""
        slots = self._workspace.slots
        if slots is not None and slots.report().tokens:
            with suppress(SaveError, OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.save_profile(path)

    def residency(self) -> ResidencyReport:
        """What is in memory, and what reading the rest has cost."""
        self._own()
        slots = self._workspace.slots
        if slots is not None:
            return slots.report()
        store = self._workspace.resident.store
        if store is not None:
            outside = sum(
                array.nbytes
                for path, array in flatten(self.model.parameters())
                if store.place(path) is None
            )
            layers, experts = len(self.anatomy.layers), self.anatomy.num_experts
            return ResidencyReport(
                layers, experts, 0, 0, outside, outside + store.total, streamed=True
            )
        size = sum(array.nbytes for array in self._workspace.export().resident_arrays())
        return ResidencyReport(len(self.anatomy.layers), self.anatomy.num_experts, 0, 0, size, size)

    def forget_residency(self) -> ResidencyReport:
        """Count hits, misses and bytes from now on; the report until now."""
        before = self.residency()
        if self._workspace.slots is not None:
            self._workspace.slots.forget_counts()
        return before

    def sweep_residency(
        self, capacities: tuple[int, ...], tokens: int, ctx: Context = SILENT
    ) -> SweepReport:
        """Decode `tokens` tokens at each number of slots, none given for six of them.

        The slots are as many as before afterwards, whatever happens. Raises StateError for a model
        that is whole, UsageError for a number that no layer can have, BudgetError for one that does
        not fit.
        """
        slots = self._slots("compare numbers of slots")
        capacity, before, shape = slots.report().capacity, slots.slots, self._layers
        least = self.anatomy.top_k
        wrong = [n for n in capacities if not least <= n < shape.experts]
        if wrong:
            raise UsageError(
                f"--capacity {wrong[0]}: give {least} (what a token uses) to {shape.experts - 1}"
            )
        rows, said = [], set()
        try:
            for number, one in enumerate(capacities or _steps(slots, least)):
                ctx.check()
                ctx.progress("slots", number, len(capacities) or STEPS, "sizes")
                slots.resize(one)
                row, answer = self._decoded_with(slots, tokens, ctx)
                rows.append(row)
                said.add(answer)
        finally:
            slots.decided.capacity = capacity
            slots.resize_each(before)
        if len(said) > 1:
            raise ModelError(
                "the answers differ with the number of slots, which must not be: load the model "
                "with --resident all, and report the architecture"
            )
        return SweepReport(tuple(rows), tokens, capacity)

    def _decoded_with(
        self, slots: ExpertSlots, tokens: int, ctx: Context
    ) -> tuple[SweepRow, tuple[int, ...]]:
        """The figures of an answer without its prompt, after one that has filled the slots."""
        prompt, options = self.tokenizer.encode(SWEEP_PROMPT), GenerateOptions(max_tokens=tokens)
        began, end = 0.0, 0.0

        def timed(index: int, *_: object) -> None:
            nonlocal began, end
            end = perf_counter()
            if index == 0:
                began = end
                slots.forget_counts()

        decoder = endless_decoder(self)
        decoder.run(prompt, options, self.editor.key, timed, ctx=ctx)
        decoder.clear()  # or the second would find the prompt read
        answer = decoder.run(prompt, options, self.editor.key, timed, ctx=ctx)
        ctx.check()  # an answer that was cut short says nothing
        now, steps = slots.report(), max(len(answer.tokens) - 1, 1)
        row = SweepRow(
            now.capacity,
            now.slot_bytes,
            steps / max(end - began, 1e-9),
            now.hit_rate,
            now.bytes_per_token,
        )
        return row, answer.tokens

    def save_profile(self, path: Path) -> TextReport:
        """Write how much each expert is used: by the slots' own count, and by the statistics in hand
        where the model is whole in memory. Raises StateError without either."""
        self._own()
        self.map.require_experts("profile")
        slots, shape = self._workspace.slots, self._layers
        stats = self._observations.stats
        if slots is not None:
            scores, held = slots.scores(shape.experts), slots.resident(shape.experts)
        elif stats is not None:
            scores = stats.score("freq")
            held = scores > 0
        else:
            raise StateError(
                "nothing is known of how much each expert is used: run collect first, or load the "
                "model with --resident auto and let it answer"
            )
        write_profile(path, shape, scores, held, (self._loaded.model_id, self.checkpoint_id))
        return TextReport(f"wrote the profile of {len(shape.indices)} layers to {path}")

    def load_profile(self, path: Path) -> TextReport:
        """Hold the experts that a file names: a profile, or routing statistics (`.npz`).

        Raises PlanError for a file that cannot be used, StateError for a model that is whole."""
        self._own()
        slots = self._slots("load a profile")
        scores = self._scores(path)
        for row, live in zip(scores, self.editor.committed, strict=True):
            row[[e for e in range(len(row)) if e not in set(live)]] = 0.0  # pruned
        slots.seed(scores)
        return TextReport(f"{some_of(slots.slots)} experts a layer are held by {path}")

    def _scores(self, path: Path) -> Array:
        shape = self._layers
        if path.suffix.lower() == ".npz":
            return RoutingStats.load(path, shape.indices, shape.experts).score("freq")
        return read_profile(path, shape)

    @property
    def _layers(self) -> Layers:
        return Layers(self.anatomy.indices, self.anatomy.num_experts)

    def _slots(self, action: str) -> ExpertSlots:
        slots = self._workspace.slots
        if self._workspace.resident.store is not None:
            raise StateError(
                f"each layer is read whole when it runs, so there are no slots to {action}: load it "
                "with --resident auto, a size, or --capacity to hold some experts"
            )
        if slots is None:
            raise StateError(
                f"the whole model is in memory, so there is no need to {action}: load it with "
                "--resident auto, a size, or --capacity to hold some experts only"
            )
        return slots

    def _require_whole(self, action: str) -> None:
        """Raise StateError where experts are on disk. action: what needs all of them."""
        if self._workspace.slots is not None:
            raise StateError(
                f"{action} makes new tensors of experts, and those of this model are partly on "
                "disk: load it with --resident none, which runs layer by layer, or --resident all"
            )

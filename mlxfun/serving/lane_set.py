"""The lanes of a scheduler: one for each side and steering that requests are answered by."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mlxfun.editing.earlier import present
from mlxfun.generation.answers import takes_ragged_batches
from mlxfun.generation.decoder import Decoder
from mlxfun.generation.kv_cache import Key
from mlxfun.serving.lanes import AloneLane, BatchLane, Lane, drawing
from mlxfun.serving.prompt_cache import PromptCache
from mlxfun.serving.requests import Wish
from mlxfun.serving.routing import Observer
from mlxfun.steering import sources as wishes
from mlxfun.steering.options import SteerOptions

if TYPE_CHECKING:
    from mlxfun.session.session import Session


class Lanes:
    """Opens, finds and closes lanes; lives on the model's thread. batched: whether requests share
    batches, or are decoded one at a time."""

    def __init__(self, session: Session, cache: PromptCache, observer: Observer) -> None:
        self._session, self._editor = session, session.editor
        self._cache, self._observer = cache, observer
        # Caches that are packed in mid-answer are not of one kind: such answers come one at a time.
        whole = session.kv is None or session.kv.start == 0
        self.batched = takes_ragged_batches(session.model) and whole
        s = session
        self._decoder = Decoder(s.model, s.tokenizer, s.taps, drawing, s.kv)
        self._wired: int | None = None  # the limit before the first lane
        self._lanes: dict[Wish, Lane] = {}
        self._order: deque[Wish] = deque()

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, wish: Wish) -> Lane:
        return self._lanes[wish]

    @contextmanager
    def live(self, wish: Wish) -> Iterator[None]:
        """Make the model live that answers `wish`."""
        side, steer = wish
        with self._editor.live(side):
            if steer is None:
                yield
                return
            before = self._editor.steering
            options = SteerOptions(dict(steer.activate), dict(steer.deactivate))
            steering, _ = wishes.changed(options, self._editor, present(self._editor))
            self._editor.set_steering(steering)
            try:
                yield
            finally:
                self._editor.set_steering(before)

    def of(self, wish: Wish) -> Lane:
        """The lane of a wish, opened if there is none of the present state."""
        lane = self._lanes.get(wish)
        if lane is not None and not len(lane) and lane.key != self._key(wish):
            self.close(wish)
            lane = None
        if lane is None:
            s = self._session
            with self.live(wish):
                key = self._editor.key()
                if self.batched:
                    self._wire()
                    lane = BatchLane(s, key, self._cache, self._observer)
                else:
                    lane = AloneLane(self._decoder, key, self._observer)
            self._lanes[wish] = lane
            self._order.append(wish)
        return lane

    def _wire(self) -> None:
        """Let the system keep the model's memory wired, as mlx-lm does for each generator."""
        if self._wired is None:
            self._wired = maybe_set_recommended_wired_limit()

    def end(self) -> None:
        """Close every lane for good."""
        self.close_all()
        before, self._wired = self._wired, None
        if before is not None:
            mx.synchronize()  # not while anything runs
            mx.set_wired_limit(before)

    def _key(self, wish: Wish) -> Key:
        with self.live(wish):
            return self._editor.key()

    def next(self) -> Wish | None:
        """The lane whose turn it is, of those with requests."""
        for _ in range(len(self._order)):
            wish = self._order[0]
            self._order.rotate(-1)
            if len(self._lanes[wish]):
                return wish
        return None

    def count(self) -> None:
        """Have everything counted that has run."""
        for lane in self._lanes.values():
            lane.count()

    def close(self, wish: Wish) -> None:
        """Close a lane."""
        self._order.remove(wish)
        self._lanes.pop(wish).close()

    def close_all(self) -> None:
        """Close every lane."""
        for wish in list(self._lanes):
            self.close(wish)

    def close_empty(self) -> None:
        """Close those without requests."""
        for wish in [wish for wish, lane in self._lanes.items() if not len(lane)]:
            self.close(wish)

    def forget(self) -> None:
        """Drop caches: what they were made under is gone."""
        self._cache.clear()
        self._decoder.clear()

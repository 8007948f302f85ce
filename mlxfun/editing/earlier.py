"""The names that earlier versions gave to a checkpoint and to states of its weights.

A state's name depends on the fingerprint of the checkpoint, so files that hold an earlier one (see
mlxfun.checkpoint.identity) name states of the same weights differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mlxfun.data.scan_reports import Identity
from mlxfun.model.identity import Ledger, describe, state_over

MOST = 1024
"""How many states are remembered; they take some kilobytes each."""


class EarlierNames:
    """What the resident checkpoint and the states seen so far were called.

    compute: gives the earlier fingerprint, "" where the files are not there any more.
    """

    def __init__(self) -> None:
        self.compute: Callable[[], str] = lambda: ""
        self._checkpoint: str | None = None
        self._states: dict[str, bytes] = {}

    @property
    def checkpoint(self) -> str:
        """The earlier fingerprint of the resident checkpoint, "" where it cannot be told."""
        if self._checkpoint is None:
            self._checkpoint = self.compute()
        return self._checkpoint

    def note(self, state: str, ledger: Ledger) -> None:
        """Remember what weights `state` stands for."""
        if state not in self._states and len(self._states) >= MOST:
            # The first is the checkpoint's own state, which files name most.
            del self._states[list(self._states)[1]]
        self._states[state] = describe(ledger)

    def of(self, state: str) -> str:
        """What a state was called; a state that is not remembered keeps its name."""
        known = self._states.get(state)
        return state if known is None or not self.checkpoint else state_over(self.checkpoint, known)

    def recognises(self, checkpoint: str) -> bool:
        """Whether `checkpoint` is the earlier fingerprint of the resident one."""
        return bool(checkpoint) and checkpoint == self.checkpoint

    def present(self, state: str) -> str:
        """What is now called as `state` was; a state that is not remembered keeps its name."""
        return next((now for now in self._states if self.of(now) == state), state)


@dataclass(frozen=True, slots=True)
class Present(Identity):
    """The identity of the resident weights, which knows their earlier names."""

    names: EarlierNames | None = None

    def known(self, made_on: Identity) -> Identity:
        """`made_on` by its present names, if it has those of an earlier version."""
        if self.names is None or not self.names.recognises(made_on.model):
            return made_on
        return replace(made_on, model=self.model, state=self.names.present(made_on.state))


class Named(Protocol):
    """An editor, as far as it says where the model stands; see mlxfun.editing.editor.Editor."""

    checkpoint_id: str
    model_name: str
    earlier: EarlierNames

    @property
    def state(self) -> str: ...


def present(editor: Named) -> Present:
    """The identity of the committed weights."""
    return Present(editor.checkpoint_id, editor.state, editor.model_name, editor.earlier)

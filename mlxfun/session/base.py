"""A resident model with everything that is made for it: what every part of a session works with."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import mlx.core as mx

from mlxfun.checkpoint.load import Loaded, load
from mlxfun.checkpoint.on_disk import LayersOnDisk, LeaveOnDisk
from mlxfun.checkpoint.options import LoadOptions, PackedCache
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.data.scan_reports import Identity
from mlxfun.editing.earlier import present
from mlxfun.errors import StateError
from mlxfun.generation.conversation import AnsweredElsewhere, Conversation
from mlxfun.generation.decoder import Decoded, Decoder, Steps
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.packed_cache import require_packable
from mlxfun.memory.reports import skipping
from mlxfun.memory.slots.partly import Partly, whole
from mlxfun.model.anatomy.context_length import context_length
from mlxfun.scans.topics import TopicBook
from mlxfun.session.measuring.measurements import Measurements
from mlxfun.session.reports import InfoReport
from mlxfun.session.workspace import SessionWorkspace
from mlxfun.techniques.ablate.technique import Abliterate
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.vectors.vectors import SteeringVectors


class SessionBase:
    """Opens and closes a session, and keeps it on the thread that opened it."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        undo_budget: int | None = None,
        seed: int = 0,
        partly: Partly | None = None,
        kv: PackedCache | None = None,
    ) -> None:
        """Wrap an already loaded model. kv: how the KV caches of answers are packed.

        Raises ModelError for an unknown architecture, or one whose caches cannot be packed.
        """
        self._thread = threading.get_ident()
        self._loaded = loaded
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.config = loaded.config
        self.seed = seed
        self.command = ""
        self._workspace = workspace = SessionWorkspace(loaded, undo_budget, partly)
        self.model, self.map, self.taps = workspace.model, workspace.map, workspace.taps
        self.anatomy = workspace.anatomy
        self.editor = workspace.editor
        self.evaluator = workspace.evaluator
        self._observations = workspace.observations
        self._tracer = Tracer(workspace.parts)
        self._topics = TopicBook()
        self._vectors: dict[str, SteeringVectors] = {}
        self.kv = kv
        if kv is not None:
            require_packable(self.model, kv)
        self._decoder = Decoder(self.model, self.tokenizer, self.taps, kv=kv)
        self._conversation = Conversation(
            self.tokenizer, self._decoder, self.editor, context_length(self.config)
        )
        self._measurements = Measurements(workspace, self._decoder)
        self._abliterate = Abliterate()
        self.before_close: list[Callable[[], None]] = []
        self._info: tuple[tuple[str, int], InfoReport] | None = None

    @classmethod
    def open(
        cls,
        source: str | Path,
        options: LoadOptions | None = None,
        *,
        undo_budget: int | None = None,
        seed: int = 0,
        ctx: Context = SILENT,
    ) -> Self:
        """Load a local directory, a Hub id, or "demo" (the bundled model).

        undo_budget: bytes of edit-made tensors that the history may hold; None for no limit.
        Raises ModelError (missing, broken, unsupported) or BudgetError (does not fit).
        """
        o = options or LoadOptions()
        partly = None if whole(o) or o.resident == "none" else Partly(o)
        held: LeaveOnDisk | LayersOnDisk | None = partly
        if o.resident == "none":
            held = LayersOnDisk() if o.scratch is None else LayersOnDisk(o.scratch)
        try:
            loaded = load(source, o.revision, ctx, o.chat_template, o.identities, held)
            session = cls(loaded, undo_budget=undo_budget, seed=seed, partly=partly, kv=o.kv)
            session._opened(o)
            return session
        except BaseException:
            if partly is not None and partly.reader is not None:
                partly.reader.close()
            raise

    def _opened(self, options: LoadOptions) -> None:
        """The session is there; what the options of loading ask for besides."""

    @property
    def caveat(self) -> str:
        """What is different about the model's answers, "" for nothing."""
        slots = self._workspace.slots
        return "" if slots is None else skipping(slots.decided.options.miss)[2:]

    @property
    def state(self) -> str:
        """Identity of the committed weights; staging does not change it."""
        return self.editor.state

    @property
    def steering_in_history(self) -> bool:
        """Whether steering is a step of the history, which undo takes back (the default).

        Session files of format 1 were recorded when it was none.
        """
        return self.editor.steering_in_history

    @steering_in_history.setter
    def steering_in_history(self, on: bool) -> None:
        self.editor.steering_in_history = on

    @property
    def checkpoint_id(self) -> str:
        """Identity of the checkpoint that was loaded."""
        return self._loaded.checkpoint_id

    @property
    def source(self) -> Path:
        """The directory that the checkpoint was loaded from."""
        return self._loaded.path

    def recognises(self, checkpoint: str) -> bool:
        """Whether an earlier version gave the resident checkpoint the identity `checkpoint`."""
        return self.editor.earlier.recognises(checkpoint)

    def known(self, made_on: Identity) -> Identity:
        """`made_on` by its present names, if an earlier version gave the resident model those."""
        return present(self.editor).known(made_on)

    def earlier_state(self, state: str) -> str:
        """What a state was called by versions that gave the checkpoint another identity."""
        return self.editor.earlier.of(state)

    def greedy(self, prompt: list[int], options: GenerateOptions, ctx: Context = SILENT) -> Decoded:
        """Continue token ids with the live side, outside the conversation."""
        self._own()
        return self._decoder.run(prompt, options, self.editor.key, lambda *_: None, ctx=ctx)

    def answer_steps(
        self, prompt: list[int], options: GenerateOptions, on_text: Callable[[str], None]
    ) -> Steps:
        """An answer of the live side to token ids, outside the conversation, step by step."""
        self._own()
        return self._decoder.steps(
            prompt, options, self.editor.key, lambda _i, _t, text, *_: on_text(text)
        )

    def chat_through(self, elsewhere: AnsweredElsewhere | None) -> None:
        """Have the conversation answered by `elsewhere`, by the session itself for None."""
        self._own()
        self._conversation.elsewhere = elsewhere

    def close(self) -> None:
        """Detach the taps and let go of the model; the session cannot be used after that.

        Those in `before_close`, who hold parts of it too, are called first.

        Its memory is free when this returns, unless somebody else still holds a part of it.
        """
        self._own()
        for let_go in self.before_close:
            let_go()
        if self.editor.standing is not None:
            self.editor.standing.install(())  # mlx-lm's modules would go on holding the model
        self.taps.detach()
        if self._workspace.slots is not None:
            self._workspace.slots.close()
        self._decoder.clear()
        # Modules, taps and editor refer to each other in circles. Without what leads there from
        # here they can be collected while the caller still holds this object.
        thread = self._thread
        self.__dict__.clear()
        self._thread = thread
        gc.collect()
        mx.clear_cache()

    def _own(self) -> None:
        if threading.get_ident() != self._thread:
            raise StateError(
                "a Session belongs to the thread that opened it (MLX streams are per thread); "
                "use mlxfun.session.worker to drive one from another thread"
            )

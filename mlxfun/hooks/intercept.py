"""Intercepts calls and attribute reads of any module of an MLX model, by swapping its class.

    hooks = Hooks(dict(model.named_modules()))
    hooks.on_call("model.layers.3.mlp", lambda own, x: own(x) * 0)
    with hooks:
        model(tokens)

While hooks are attached, a module's class is a dynamic subclass of its own one, so it keeps its
parameters, its path and its code: nothing is wrapped (which would rename parameters) and no
forward is copied (copies go out of date when mlx-lm changes). Modules without hooks are untouched
and cost nothing. `__call__` has to be intercepted on the class because Python ignores one that is
set on an instance.

Hooks nest: several may be attached to one module, the one attached last runs outermost, and each
can be detached in any order. Detaching the last one restores the module's own class.

This is the only module of the project that assigns `__class__` of a module
(`tests/mlxfun/hooks/test_only_place.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from types import TracebackType
from typing import Any

import mlx.nn as nn

from mlxfun.errors import HookError

Handler = Callable[..., Any]
"""(own, *args, **kwargs) -> output. own: the module's own forward, or the handler inside this one;
a handler that observes returns `own(*args, **kwargs)` as it is."""

Reader = Callable[[Any], Any]
"""(value of the attribute) -> what a read of it returns."""

NEAR_NAMES = 5


class _Entry:
    """One handler on one method of one module."""

    def __init__(self, path: str, method: str, handler: Handler, required: bool) -> None:
        self.path, self.method, self._handler, self.required = path, method, handler, required
        self.reached = False

    @property
    def called(self) -> Handler:
        """What is called: the handler itself where it does not matter whether it was reached, as a
        frame more counts in decoding."""
        return self._noted if self.required else self._handler

    def _noted(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.reached = True
        return self._handler(own, *args, **kwargs)


class _Site:
    """A module whose class is swapped: its own class, and its hooks, innermost first."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.original = module, type(module)
        self.entries: list[_Entry] = []
        self.readers: list[tuple[str, Reader]] = []

    @classmethod
    def of(cls, module: nn.Module) -> _Site:
        """The site of a module, a new one if nothing intercepts it yet."""
        found = getattr(type(module), "_mlxfun_site", None)
        return found if isinstance(found, _Site) else cls(module)

    def install(self) -> None:
        """Make the module's class what the present hooks need."""
        if not (self.entries or self.readers):
            self.module.__class__ = self.original
            return
        namespace: dict[str, Any] = {
            "__module__": self.original.__module__,
            "_mlxfun_site": self,
        }
        for method in {entry.method for entry in self.entries}:
            namespace[method] = self._method(method)
        for name in {name for name, _ in self.readers}:
            namespace[name] = self._attribute(name)
        self.module.__class__ = type(self.original.__name__, (self.original,), namespace)

    def _method(self, name: str) -> staticmethod[..., Any]:
        # Bound to the module already and no function of our own around it: a frame of Python for
        # each hooked module is a few percent of the time of a token.
        own: Callable[..., Any] = partial(getattr(self.original, name), self.module)
        *inner, outermost = [entry.called for entry in self.entries if entry.method == name]
        for handler in inner:
            own = partial(handler, own)
        return staticmethod(partial(outermost, own))

    def _attribute(self, name: str) -> property:
        readers = [read for which, read in self.readers if which == name]

        def value(module: Any) -> Any:
            found = module[name]
            for read in readers:
                found = read(found)
            return found

        return property(value)


class Hooks:
    """A set of hooks that is attached and detached as one.

    modules: {path: module}, as `dict(model.named_modules())`. Attaching is idempotent. Leaving the
    `with` block without an error raises HookError if a required target was never reached although
    another one was: a hook that silently does nothing is the worst fault such a tool can have.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._entries: list[_Entry] = []
        self._readers: list[tuple[str, str, Reader]] = []
        self._attached = False

    def on_call(
        self, path: str, handler: Handler, *, method: str = "__call__", required: bool = True
    ) -> None:
        """Let `handler` answer calls of the module at `path`. Raises HookError for unknown names.

        method: which method, for instance "as_linear" of a tied embedding. required: False for a
        module that a forward need not reach.
        """
        module = self._require(path)
        if not callable(getattr(type(module), method, None)):
            raise HookError(f"{path or 'the model'} ({type(module).__name__}) has no {method}")
        self._add_while_detached()
        self._entries.append(_Entry(path, method, handler, required))

    def on_attribute(self, path: str, name: str, read: Reader) -> None:
        """Let `read` answer reads of the array, module or list `name` of the module at `path`.

        Reads as an attribute (`self.weight`), not as an item (`self["weight"]`, as nn.Linear does).
        """
        module = self._require(path)
        if name not in module:
            raise HookError(f"{path} has no {name}; it has {', '.join(sorted(module))}")
        self._add_while_detached()
        self._readers.append((path, name, read))

    def _require(self, path: str) -> nn.Module:
        if path not in self._modules:
            raise HookError(f"the model has no module {path!r}{near(path, self._modules)}")
        return self._modules[path]

    def _add_while_detached(self) -> None:
        if self._attached:
            raise RuntimeError("hooks cannot be added while they are attached")

    @property
    def attached(self) -> bool:
        """Whether the hooks are in force."""
        return self._attached

    def attach(self) -> None:
        """Put the hooks in force, outside of those that are attached already."""
        if self._attached:
            return
        self._attached = True
        sites: dict[int, _Site] = {}
        for entry in self._entries:
            entry.reached = False
            site = self._site(entry.path, sites)
            site.entries.append(entry)
        for path, name, read in self._readers:
            self._site(path, sites).readers.append((name, read))
        for site in sites.values():
            site.install()

    def detach(self) -> None:
        """Take the hooks away; a module without any other gets its own class back."""
        if not self._attached:
            return
        self._attached = False
        sites: dict[int, _Site] = {}
        for entry in self._entries:
            self._site(entry.path, sites).entries.remove(entry)
        for path, name, read in self._readers:
            self._site(path, sites).readers.remove((name, read))
        for site in sites.values():
            site.install()

    def _site(self, path: str, sites: dict[int, _Site]) -> _Site:
        module = self._modules[path]
        return sites.setdefault(id(module), _Site.of(module))

    def require_reached(self) -> None:
        """Raise HookError naming the required targets that no forward has reached so far."""
        missed = [e.path for e in self._entries if e.required and not e.reached]
        if missed:
            shown = ", ".join(missed[:NEAR_NAMES])
            more = f" and {len(missed) - NEAR_NAMES} more" if len(missed) > NEAR_NAMES else ""
            raise HookError(
                f"the forward did not reach {shown}{more}: the hook has no effect there"
            )

    def __enter__(self) -> Hooks:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None and any(entry.reached for entry in self._entries):
            self.require_reached()


def snapshot(module: nn.Module) -> nn.Module:
    """A leaf module of the same class, without hooks, that holds the arrays `module` holds now.

    The arrays are shared, not copied: what is assigned to `module` later does not reach the
    snapshot, and the snapshot keeps alive what it holds.
    """
    original = _Site.of(module).original
    found = original.__new__(original)
    vars(found).update(vars(module))
    dict.update(found, module)
    return found


def near(name: str, known: Iterable[str]) -> str:
    """`"; near names are ..."`, "" when no known name is close."""
    close = get_close_matches(name, list(known), n=NEAR_NAMES, cutoff=0.5)
    return f"; near names are {', '.join(close)}" if close else ""

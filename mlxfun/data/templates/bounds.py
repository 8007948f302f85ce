"""Bounds on a chat template while it runs: time, memory, and the length of what it makes.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and processes,
not from loops without end or from text that fills the memory. Three things do here, and a template
that is within its bounds gives what it gave:

* Lines of Python that run for the template are followed: for the time, for the memory, and for a
  cancel of the job.
* Operations that one call of C does, and that can make much of little (`'x' * 10 ** 10`) or take
  long over little (a comparison of lists that hold one list twice, which holds one twice, ...), are
  judged by their operands before they run: see `mlxfun.data.templates.sizes`. Every list, tuple and
  mapping that comes about is weighed, so that none can be there that takes long.
* What is made is counted, and the memory of the process looked at again after every 16 MiB.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MappingView
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.tests import test_divisibleby
from markupsafe import Markup

from mlxfun.context import Context, running
from mlxfun.data.templates.sizes import (
    BITS,
    TOO_LARGE,
    binary,
    called,
    filtered,
    remember,
    remembered,
    weight,
    widest,
)
from mlxfun.errors import DatasetError

SECONDS = 10.0
"""The processor's time that a template may take for one conversation; usual ones take 1 ms."""

CHARACTERS = 16 << 20
"""How long its text may become, and any text that it makes on the way."""

MEMORY = 256 << 20
"""Bytes by which the process may grow meanwhile."""

_SOURCE = "<template>"  # what Jinja calls the code of a template that is no file
_EVERY = 64
_UNWATCHED = (__file__, weight.__code__.co_filename)

Trace = Callable[[FrameType, str, Any], Any]


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Run a chat template inside the block. where: the conversation, for the error.

    Raises DatasetError where it exceeds a bound, and Cancelled when the running job is cancelled.
    """
    _prepare()
    watch = _Watch(where, running())
    before, token = sys.gettrace(), _WATCH.set(watch)
    sys.settrace(watch.enter)
    try:
        with remembered():
            yield
    finally:
        sys.settrace(before)
        _WATCH.reset(token)


class _Watch:
    """Follows one run of a template in this thread."""

    def __init__(self, where: str, ctx: Context) -> None:
        self.where = where
        self.ctx = ctx
        self.deadline = time.thread_time() + SECONDS
        self.memory = _memory()
        self.lines = 0
        self.written = 0
        self.made = 0
        ctx.check()

    def enter(self, frame: FrameType, event: str, argument: Any) -> Trace | None:
        """A function is called: its lines are followed."""
        file = frame.f_code.co_filename
        if file == _SOURCE:
            return self.line
        # Jinja's filters are Python too, and may be given much to do.
        return None if file in _UNWATCHED else self.tick

    def tick(self, frame: FrameType, event: str, argument: Any) -> Trace:
        """A line of Python that the template has called is about to run."""
        self.lines += 1
        if self.lines % _EVERY == 0:
            self.look()
        return self.tick

    def line(self, frame: FrameType, event: str, argument: Any) -> Trace:
        """A line of the template is about to run, or a piece of text was made (its return)."""
        self.tick(frame, event, argument)
        if event == "return" and isinstance(argument, str):
            self.written += len(argument)
            if self.written > CHARACTERS:
                raise self.too_long()
        return self.line

    def look(self) -> None:
        """Compare with the bounds."""
        self.ctx.check()
        if time.thread_time() > self.deadline:
            raise self.refused(f"runs for more than {SECONDS:g} seconds")
        if _memory() - self.memory > MEMORY:
            raise self.refused(f"takes more than {MEMORY >> 20} MiB of memory")

    def allow(self, size: float) -> None:
        """Something of `size` characters or elements is about to be made."""
        if size > CHARACTERS:
            raise self.too_long()
        self.made += int(size)
        if self.made > CHARACTERS:
            self.made = 0
            self.look()

    def too_long(self) -> DatasetError:
        return self.refused(f"makes more than {CHARACTERS:,} characters")

    def refused(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.where}: the model's chat template {what}; use a model with another template, "
            "or a data set without conversations"
        )


_WATCH: ContextVar[_Watch | None] = ContextVar("template", default=None)


def _memory() -> int:
    """The memory of this process in bytes; on macOS the largest that it has had so far."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _allow(size: float) -> None:
    watch = _WATCH.get()
    if watch is not None:
        watch.allow(size)
    elif size >= TOO_LARGE:  # compiled elsewhere; no conversation to name
        raise MemoryError("the chat template makes too much text")


def _weighed(result: Any) -> Any:
    """What a function or a filter has given, once it is judged."""
    if isinstance(result, str | bytes | list | tuple | Mapping | MappingView):
        _allow(weight(result))
    elif isinstance(result, int) and result.bit_length() > BITS:
        _allow(TOO_LARGE)
    return result


class _Generator(CodeGenerator):
    """Writes `a ~ b`, lists, tuples and mappings as calls, so that they can be judged."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.held(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.held(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "store":  # names that are assigned to
            super().visit_Tuple(node, frame)
            return
        self.write("environment.held(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(environment.weighed((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Fields:
    """For a formatter: each field is judged once its width is known, which may be an argument."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        _allow(weight(value) + widest(format_spec))
        return super().format_field(value, format_spec)  # type: ignore[misc]


class _Formatter(_Fields, SandboxedFormatter):
    pass


class _Escaping(_Fields, SandboxedEscapeFormatter):
    pass


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers runs templates, with operations judged before they run."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "+", "-", "**", "//", "%"))

    def from_string(self, source: Any, *rest: Any, **more: Any) -> Template:
        """Compile a template. Filters that were added by now are judged, too."""
        self.tests["divisibleby"] = _divisible
        for name, function in self.filters.items():
            if not hasattr(function, "judged"):
                self.filters[name] = _judged(name, function)
        self.finalize = self.shown
        return super().from_string(source, *rest, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`."""
        size = binary(operator, left, right)
        _allow(size)
        made = super().call_binop(context, operator, left, right)
        if operator == "+":
            remember(made, size)
        return made

    def call(self, __context: Any, __obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`obj(*args)`, often a method of a text."""
        args, size = called(__obj, args, kwargs)
        _allow(size)
        return _weighed(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format`, which the sandbox runs itself."""
        if super().wrap_str_format(value) is None:
            return None
        text, mapped = value.__self__, value.__name__ == "format_map"
        escaping = isinstance(text, Markup)
        formatter = _Escaping(self, escape=text.escape) if escaping else _Formatter(self)

        def wrapper(*args: Any, **kwargs: Any) -> str:
            if mapped and (len(args) != 1 or kwargs):
                raise TypeError(f"format_map() takes exactly one argument ({len(args)} given)")
            given = ((), args[0]) if mapped else (args, kwargs)
            made: str = type(text)(formatter.vformat(text, *given))
            _allow(len(made))
            return made

        return wrapper

    def held(self, made: Any) -> Any:
        """A list, tuple or mapping that the template writes down."""
        _allow(weight(made))
        return made

    def weighed(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """The parts of `a ~ b ~ c`, which are then joined."""
        _allow(sum(map(weight, parts)))
        return parts

    def shown(self, value: Any) -> Any:
        """What is written out."""
        if not isinstance(value, str):
            _allow(weight(value))
        return value


def _judged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def judged(*args: Any, **kwargs: Any) -> Any:
        own, size = filtered(name, args[skip:], kwargs)
        _allow(size)
        return _weighed(function(*args[:skip], *own, **kwargs))

    judged.judged = True  # type: ignore[attr-defined]
    return judged


def _divisible(value: Any, number: Any) -> bool:
    """Jinja's test divisibleby, whose division nothing intercepts."""
    _allow(binary("%", value, number))
    return bool(test_divisibleby(value, number))


@functools.cache
def _prepare() -> None:
    """Make transformers compile templates in a `BoundedEnvironment`.

    It names the class of its environment in one place and lets nobody choose it.
    """
    from transformers.utils import chat_template_utils  # seconds; who has a tokenizer has it

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()

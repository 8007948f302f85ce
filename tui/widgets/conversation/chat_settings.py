"""The chat settings form: system prompt, temperature, length, seed, thinking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label

from tui.state.app_state import ChatOptions
from tui.widgets.line import Line

FIELDS = (
    ("system", "system prompt", "none"),
    ("temperature", "temperature", ""),
    ("max_tokens", "longest answer", ""),
    ("seed", "seed", ""),
    ("thinking", "thinking", "on, off, or empty for the template's default"),
)


def read(values: dict[str, str], talk: ChatOptions) -> ChatOptions:
    """The options as typed. Raises ValueError with a sentence for an invalid value.

    >>> read({"temperature": "0.5", "thinking": "off"}, ChatOptions()).thinking
    False
    """
    given = {name: values.get(name, "").strip() for name, _, _ in FIELDS}
    thinking = given["thinking"].lower()
    if thinking not in ("", "on", "off"):
        raise ValueError(f"thinking is on, off or empty, not {given['thinking']!r}")
    temperature = _number(given["temperature"], "temperature", float, 0.0)
    length = _number(given["max_tokens"], "longest answer", int, 1)
    seed = _number(given["seed"], "seed", int, None)
    # After a system prompt, "no system prompt" must be explicit: the conversation would keep it.
    system = given["system"] or ("" if talk.system is not None else None)
    return replace(
        talk,
        system=system,
        temperature=temperature,
        max_tokens=None if length is None else int(length),
        seed=None if seed is None else int(seed),
        thinking=None if not thinking else thinking == "on",
    )


def _number(text: str, name: str, kind: type, least: float | None) -> float | None:
    if not text:
        return None
    try:
        value = kind(text)
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {whole}, not {text!r}") from None
    if least is not None and not value >= least:
        raise ValueError(f"{name} is at least {least:g}, not {text}")
    return float(value) if kind is float else value


def shown(talk: ChatOptions) -> dict[str, str]:
    """The options as shown in the fields."""
    thinking = {None: "", True: "on", False: "off"}[talk.thinking]
    values = {name: getattr(talk, name) for name, _, _ in FIELDS if name != "thinking"}
    return {
        **{name: "" if value is None else str(value) for name, value in values.items()},
        "thinking": thinking,
    }


class ChatSettings(ModalScreen[ChatOptions | None]):
    """Enter accepts the options, Escape discards changes."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "close")]

    DEFAULT_CSS = """
    ChatSettings { align: center middle; }
    ChatSettings > Vertical { width: 90%; max-width: 76; height: auto; border: round $accent;
                              background: $surface; padding: 0 1; }
    ChatSettings Horizontal { height: 1; }
    ChatSettings Label { width: 16; color: $foreground 70%; }
    ChatSettings Input, ChatSettings Input:focus { border: none; height: 1; padding: 0; width: 1fr; }
    ChatSettings Input:focus { background: $panel; }
    """

    def __init__(self, talk: ChatOptions, defaults: Mapping[str, float]) -> None:
        """defaults: what is used where a field is empty, by name."""
        super().__init__()
        self._talk = talk
        self._defaults = defaults

    def _in_force(self, name: str) -> str:
        """What is used while the field is empty."""
        value = f"{self._defaults[name]:g}"
        more = {"temperature": " (0 is greedy)", "max_tokens": " tokens"}
        return value + more.get(name, "")

    def compose(self) -> ComposeResult:
        values = shown(self._talk)
        with Vertical() as box:
            box.border_title = "chat settings"
            box.border_subtitle = "enter accepts, escape cancels"
            for name, label, hint in FIELDS:
                with Horizontal():
                    yield Label(label)
                    yield Input(
                        values[name],
                        placeholder=hint or self._in_force(name),
                        id=name,
                        select_on_focus=False,
                    )
            yield Line(id="wrong")

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        event.stop()
        values = {field.id or "": field.value for field in self.query(Input)}
        try:
            talk = read(values, self._talk)
        except ValueError as problem:
            self.query_one("#wrong", Line).put(f"✗ {problem}")
            return
        self.dismiss(talk)

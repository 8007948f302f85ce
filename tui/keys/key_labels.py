"""Labels of keys as the user configured them, and their names in sentences.

Sentences of the screen are templates with the ids of keys: "Press {collect} to calibrate". Words
from outside, such as file names and what the model says, are put in after `say`, never before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from textual.keys import KEY_NAME_REPLACEMENTS, format_key

from tui.keys.keymap import BY_ID, KEYS, command_words

MODIFIERS = ("ctrl", "alt", "shift", "super", "hyper", "meta")
GLYPHS = {
    "up": "↑", "down": "↓", "left": "←", "right": "→", "escape": "esc", "backspace": "⌫",
    "delete": "del", "insert": "ins", "pageup": "page up", "pagedown": "page down",
    "space": "space", "enter": "enter", "tab": "tab", "home": "home", "end": "end",
    **{f"f{number}": f"F{number}" for number in range(1, 25)},
}  # fmt: skip
"""Keys that are no character. All others are written as the character that they type."""
SPOKEN = {",": "comma", ".": "full stop", ";": "semicolon"}
SAME = {
    "return": "enter", "esc": "escape", "ctrl+i": "tab", "ctrl+m": "enter",
    "ctrl+left_square_bracket": "escape", "ctrl+space": "ctrl+@", "ctrl+at": "ctrl+@",
}  # fmt: skip
"""Other names of a key, and combinations that reach us as another key from a plain terminal."""
FIELD_KEYS = frozenset(GLYPHS) - {"escape", "insert"} - {f"f{number}" for number in range(1, 25)}
"""Keys beside characters that a text field needs for itself."""

ESSENTIAL = ("command", "palette", "help", "escape")
"""Keys that cannot be removed: what has no key of its own is reached by them."""


def canonical(key: str) -> str:
    """`key` as Textual reports it when it is pressed. Raises ValueError for an unknown key.

    >>> [canonical(key) for key in ("+", "ctrl+]", "Ctrl+A", "shift+alt+x", "return", "ctrl+i")]
    ['plus', 'ctrl+right_square_bracket', 'ctrl+a', 'alt+shift+x', 'enter', 'tab']
    """
    *held, base = key.split("+") if key != "+" else ["+"]
    held = [word.lower() for word in held]
    if held and len(base) == 1 and base.isupper():
        # A terminal does not tell ctrl+A from ctrl+a, but alt+A from alt+a.
        held, base = held if "ctrl" in held else [*held, "shift"], base.lower()
    if len(base) == 1 and not base.isalnum():
        base = _name_of(base)
    name = "+".join([*sorted(set(held)), base])
    name = SAME.get(name, name)
    base = name.rpartition("+")[2]
    sign = format_key(base)
    known = base in GLYPHS or (len(sign) == 1 and sign.isprintable())
    if not known or not set(held) <= set(MODIFIERS):
        raise ValueError(
            f"{key!r} is no key: it is a character or the name of one, as in space, enter, left, "
            "pageup, f9, and in front of it perhaps ctrl+, alt+ or shift+"
        )
    if held == ["shift"] and base not in GLYPHS:
        raise ValueError(f"{key!r} types a character of its own: name that one")
    return name


def _name_of(character: str) -> str:
    """The name by which Textual knows a character that is neither letter nor digit."""
    import unicodedata

    name = unicodedata.name(character, character).lower().replace("-", "_").replace(" ", "_")
    return KEY_NAME_REPLACEMENTS.get(name, name)


def parsed(keys: str) -> tuple[str, ...]:
    """The keys of a list with commas, each in its canonical name; () for none.

    >>> parsed("f, x"), parsed(","), parsed("")
    (('f', 'x'), ('comma',), ())
    """
    words = ["comma"] if keys.strip() == "," else [word.strip() for word in keys.split(",")]
    # A key that is named twice would be shown twice.
    return tuple(dict.fromkeys(canonical(word) for word in words if word))


def written(key: str) -> str:
    """A canonical key as shown on the screen.

    >>> [written(key) for key in ("plus", "left", "f1", "ctrl+r", "shift+up", "alt+x", "ctrl+@")]
    ['+', '←', 'F1', '^r', 'shift+↑', 'alt+x', '^space']
    """
    *held, base = key.split("+")
    sign = "space" if key == "ctrl+@" else GLYPHS.get(base) or format_key(base)
    if held == ["ctrl"] and (len(base) == 1 or base not in GLYPHS):
        return f"^{sign}"
    return "+".join([*held, sign])


def typed(key: str) -> bool:
    """Whether a text field needs the canonical `key` for itself."""
    return key in FIELD_KEYS or key == "shift+tab" or ("+" not in key and key not in GLYPHS)


def why_not(id: str, keys: str) -> str:
    """Why `keys` cannot be assigned to the key `id`, "" if they can."""
    try:
        wanted = parsed(keys)
    except ValueError as problem:
        return str(problem)
    if not wanted and id in ESSENTIAL:
        return "it needs a key: what has none is reached by it"
    taken = [key for key in wanted if typed(key)] if BY_ID[id].scope == "always" else []
    return f"{taken[0]} is for typing, and this key works in text fields too" if taken else ""


@dataclass(frozen=True, slots=True, eq=False)
class KeyNames:
    """What the keys are called. keys: {id: its keys in canonical names, () when it has none}."""

    keys: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, wishes: Mapping[str, str]) -> KeyNames:
        """The names with the user's `wishes` {id: "a,b"}, "" for no key.

        Raises ValueError for an unknown key.
        """
        return cls({key.id: parsed(wishes.get(key.id, key.keys)) for key in KEYS})

    def all(self, id: str) -> tuple[str, ...]:
        """All keys of an id, as shown on the screen; () if it has none."""
        return tuple(written(key) for key in self.keys[id])

    def __getitem__(self, id: str) -> str:
        """The name of a key in a sentence; without a key its command, else its palette entry."""
        ways = self.all(id)
        if ways:
            return ways[0]
        key = BY_ID[id]
        if key.kind == "do":
            return f"{self['palette']} {key.label}"
        sign = self["command"]
        return f"{sign}{'' if len(sign) == 1 else ' '}{command_words(key)}"

    def say(self, template: str) -> str:
        """`template` with the name of the key for every {id}. Raises KeyError for an unknown id.

        A key that would be taken for the sentence's own stop is spelled out.

        >>> USUAL.say("Press {collect} to calibrate, {palette} for all there is.")
        'Press c to calibrate, ^p for all there is.'
        >>> USUAL.say("{talk} sets the system prompt")
        'comma sets the system prompt'
        """
        return _ID.sub(lambda found: SPOKEN.get(self[found[1]], self[found[1]]), template)

    def bindings(self) -> dict[str, str]:
        """The bindings that differ from the keymap, {id: "a,b"}, for `App.set_keymap`."""
        # Textual ignores "". The name of a key that does not exist stands for no key.
        return {
            id: ",".join(keys) or f"no_key_for_{id}"
            for id, keys in self.keys.items()
            if keys != USUAL.keys[id]
        }


_ID = re.compile(r"\{(\w+)\}")

USUAL = KeyNames.of({})
"""The keys as they come."""

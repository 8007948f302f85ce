"""Checks of the user's configuration that need the screen: theme names and keys."""

from __future__ import annotations

from commands.config import Config
from tui import themes
from tui.keys import key_labels
from tui.keys.key_labels import KeyNames
from tui.keys.keymap import BY_ID, KEYS, Scope, keys_for


def check_config(config: Config) -> None:
    """Raise UsageError, with file and line, for an unknown theme or key, or keys that clash."""
    known = [theme.name for theme in themes.THEMES]
    if config.theme not in (None, *known):
        raise config.error("theme", f"{config.theme!r} is unknown; known are {', '.join(known)}")
    for name, given in config.keys.items():
        if name not in BY_ID:
            raise config.error(f"keys.{name}", f"unknown; known are {', '.join(BY_ID)}")
        problem = key_labels.why_not(name, given)
        if problem:
            raise config.error(f"keys.{name}", problem)
    names = KeyNames.of(config.keys)
    for scope in sorted({scope for key in KEYS for scope in key.scopes}):
        _check_clashes(config, names, scope)


def _check_clashes(config: Config, names: KeyNames, scope: Scope) -> None:
    """Raise UsageError if the configuration gives one key two meanings in `scope`."""
    taken: dict[str, str] = {}
    for key in keys_for(scope):
        for name in names.keys[key.id]:
            other = taken.setdefault(name, key.id)
            if other == key.id:
                continue
            changed, kept = (key.id, other) if key.id in config.keys else (other, key.id)
            if changed in config.keys:  # the keys as they come may share one, by panel
                raise config.error(f"keys.{changed}", f"{name} is the key of {kept} already")

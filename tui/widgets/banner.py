"""The banner at the top: what was found at the start, and the key that takes it."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from tui.keys.key_labels import KeyNames
from tui.state.app_state import AppState, Offer
from tui.widgets.line import Line


def banner_text(offer: Offer, names: KeyNames, width: int) -> Text:
    """The offer in one line; the keys stay when the sentence is too long."""
    keys = Text()
    for key, label in (("take", offer.line.split()[0] if offer.line else ""), ("decline", "hide")):
        if label and names.all(key):
            keys.append(f"  {names[key]}", Style(bold=True)).append(f" {label}")
    text = Text(offer.text[:1].upper() + offer.text[1:], no_wrap=True, overflow="ellipsis")
    text.truncate(max(1, width - keys.cell_len), overflow="ellipsis")
    return text.append_text(keys)


class Banner(Line):
    """The newest offer; hidden without one."""

    DEFAULT_CSS = """
    Banner { dock: top; height: 1; padding: 0 1; background: $warning; color: $background;
             display: none; }
    """

    def show(self, state: AppState) -> None:
        """Draw the newest offer of `state`."""
        offer = state.offer
        self.display = offer is not None
        if offer is not None:
            self.put(banner_text(offer, state.names, self.app.size.width - 2))

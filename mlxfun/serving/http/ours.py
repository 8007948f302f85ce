"""What only this server offers with an answer: the experts of its tokens, and steering of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxfun.serving.ask import Ask, Levels, SteerWish, TokenRouting
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields, quoted
from mlxfun.serving.http.tickets import Ticket
from mlxfun.serving.service import Card


@dataclass(frozen=True, slots=True)
class Extras:
    """What is asked for in the field `mlxfun`."""

    routing: bool = False
    steer: SteerWish | None = None
    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, ask: Ask, card: Card) -> Extras:
        """Those of a request that has been read."""
        return cls(ask.routing, ask.steer, card.layers)

    def on(self, ask: Ask) -> Ask:
        """The request with them."""
        return replace(ask, routing=self.routing, steer=self.steer)


def extras_of(fields: Fields, card: Card) -> Extras:
    """The field `mlxfun` of a request. Raises Bad."""
    table = fields.table("mlxfun")
    if table is None:
        return Extras()
    for name in table.values:
        if name not in ("routing", "steer"):
            raise Bad(f"mlxfun has no field {quoted(name)}: it has routing and steer", "mlxfun")
    steer = table.table("steer")
    if (table.switch("routing") or steer is not None) and not card.experts:
        raise Bad(f"{card.model} is a dense model: it has no experts", "mlxfun")
    wish = None
    if steer is not None:
        for name in steer.values:
            if name not in ("activate", "deactivate"):
                raise Bad(f"mlxfun.steer has no field {quoted(name)}: activate, deactivate")
        up, down = levels_of(steer, "activate", card), levels_of(steer, "deactivate", card)
        wish = SteerWish(up, down) if up or down else None
    return Extras(table.switch("routing"), wish, card.layers)


def levels_of(fields: Fields, name: str, card: Card) -> Levels:
    """Experts by layer: {"3": [0, 7]}. Raises Bad for layers and experts that are not there."""
    table = fields.table(name)
    if table is None:
        return ()
    found = {}
    for word, experts in table.values.items():
        layer = int(word) if word.isascii() and word.isdecimal() and len(word) < 9 else -1
        if layer not in card.layers:
            raise Bad(f"{name}: {quoted(word)} is no layer with experts", name)
        good = isinstance(experts, list) and all(type(e) is int for e in experts)
        if not good:
            raise Bad(f"{name}: layer {layer} needs a list of experts, not {quoted(experts)}", name)
        wrong = [e for e in experts if not 0 <= e < card.experts]
        if wrong:
            raise Bad(
                f"{name}: layer {layer} has no expert {quoted(wrong[0])}; they are 0 to "
                f"{card.experts - 1}",
                name,
            )
        found[layer] = tuple(sorted(set(experts)))
    return tuple(sorted((layer, some) for layer, some in found.items() if some))


def extras_said(
    extras: Extras, ticket: Ticket | None, routing: Sequence[TokenRouting] = ()
) -> dict[str, Any]:
    """The field `mlxfun` of an answer."""
    admitted = ticket.admitted if ticket is not None else None
    said: dict[str, Any] = {}
    if admitted is not None:
        said = {"state": admitted.state, "side": admitted.side, "steering": admitted.steering}
    if extras.routing and routing:
        said["layers"] = list(extras.layers)
        said["routing"] = [_routed(one) for one in routing]
    return {"mlxfun": said} if said else {}


def _routed(one: TokenRouting) -> dict[str, Any]:
    """The experts of a token by layer, and the weights they were applied with."""
    used = one.experts >= 0
    return {
        "token": one.token,
        "experts": [row[mask].tolist() for row, mask in zip(one.experts, used, strict=True)],
        "weights": [
            [round(float(w), 6) for w in row[mask]]
            for row, mask in zip(one.weights, used, strict=True)
        ],
    }

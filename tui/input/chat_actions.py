"""State changes for the keys of the chat. Pure."""

from __future__ import annotations

import shlex
from dataclasses import replace

from mlxfun.events import Side
from tui.state.app_state import AppState, ChatOptions, Entry
from tui.state.chat_turns import Turn, quoted
from tui.text import SHOWN_SIDES


def line_for(state: AppState, text: str) -> str:
    """The command line that sends `text` to the live model or to both, with the chat's options."""
    talk = state.talk
    words = ["ab" if talk.both else "chat", *options(talk)]
    if talk.revise and not talk.both:
        words += ["--back", str(talk.revise)]
    return " ".join(words) + f" {quoted(text)}"


def options(talk: ChatOptions) -> list[str]:
    """The options that differ from the shell's, as words of a command line."""
    words: list[str] = []
    for name, value in (
        ("--system", talk.system),
        ("--temperature", talk.temperature),
        ("--max-tokens", talk.max_tokens),
        ("--seed", talk.seed),
    ):
        if value is not None:
            words += [name, shlex.quote(str(value))]
    if talk.thinking is not None:
        words.append("--thinking" if talk.thinking else "--no-thinking")
    return words


def settings_words(talk: ChatOptions) -> str:
    """The options that differ from the shell's, in a few words."""
    words = []
    if talk.system:
        words.append("system prompt")
    if talk.temperature is not None:
        words.append(f"temperature {talk.temperature:g}")
    if talk.max_tokens is not None:
        words.append(f"{talk.max_tokens} tokens")
    if talk.thinking is not None:
        words.append(f"thinking {'on' if talk.thinking else 'off'}")
    return " · ".join(words)


def kept(state: AppState) -> list[Turn]:
    """The turns that are part of the model's conversation."""
    return [turn for turn in state.turns if turn.kept]


def chosen(state: AppState) -> Turn | None:
    """The turn under the token cursor, or the last one."""
    if state.token is not None:
        found = next((turn for turn in state.turns if turn.job == state.token[0]), None)
        if found is not None:
            return found
    return state.turns[-1] if state.turns else None


def back_to(state: AppState, turn: Turn | None) -> int:
    """How many turns to remove so that `turn` is removed; 0 if it is not in the conversation."""
    held = kept(state)
    jobs = [one.job for one in held]
    if turn is None or turn.job not in jobs:
        return 0
    return len(jobs) - jobs.index(turn.job)


def again_line(state: AppState) -> str:
    """The command line that asks the chosen question again, "" if there is none."""
    turn = chosen(state)
    if turn is not None and turn.both:
        return " ".join(["ab", *options(state.talk)]) + f" {quoted(turn.prompt)}"
    back = back_to(state, turn)
    if not back:
        return ""
    talk = state.talk
    if talk.temperature:
        # The same seed would draw the same answer.
        talk = replace(talk, seed=(talk.seed or 0) + 1)
    return " ".join(["chat", *options(talk), "--back", str(back)])


def after_again(state: AppState) -> AppState:
    """The next seed, so that sampling gives another answer."""
    talk = state.talk
    if not talk.temperature:
        return state
    return replace(state, talk=replace(talk, seed=(talk.seed or 0) + 1))


# Tokens and experts -----------------------------------------------------------------------------
def step(state: AppState, by: int) -> AppState:
    """Move the token cursor by `by` tokens, over all answers whose tokens are known."""
    known = places(state)
    if not known:
        return replace(state, echo=Entry("info", "", "no answer yet whose tokens are known"))
    if state.token in known:
        place = known.index(state.token) + by
    else:
        place = len(known) - 1 if by < 0 else 0
        last = state.turns[-1].job
        if by > 0 and (last, 0) in known:
            place = known.index((last, 0))
    return at(state, known[max(0, min(place, len(known) - 1))])


def places(state: AppState) -> list[tuple[int, int]]:
    """(job, index) of every token whose experts may be known."""
    return [(t.job, i) for t in state.turns for i in range(len(t.every_piece))]


def other_side(state: AppState) -> AppState:
    """Move the token cursor to the same token of the other side of an A/B answer."""
    turn = chosen(state)
    if turn is None or not turn.other_pieces or not turn.pieces:
        return replace(state, echo=Entry("info", "", "there is no other side: this is one answer"))
    index = state.token[1] if state.token is not None else 0
    side, place = turn.place_of(index)
    own, other = len(turn.pieces), len(turn.other_pieces)
    place = min(place, other - 1) + own if side == "base" else min(place, own - 1)
    return at(state, (turn.job, place))


def at(state: AppState, token: tuple[int, int] | None) -> AppState:
    """Move the token cursor to (job, index), None for no token; its experts are lit in the map."""
    if token is None:
        return replace(state, token=None, lit=None)
    turn = next(turn for turn in state.turns if turn.job == token[0])
    return replace(state, token=token, lit=turn.every_piece[token[1]].experts)


def token_words(state: AppState) -> str:
    """The token under the cursor and its experts in words, "" without one."""
    if state.token is None or state.view.heat is None:
        return ""
    job, index = state.token
    turn = next((turn for turn in state.turns if turn.job == job), None)
    if turn is None or index >= len(turn.every_piece):
        return ""
    piece = turn.every_piece[index]
    side, place = turn.place_of(index)
    name = f"token {place + 1} {piece.text!r}"
    if turn.both:
        name = f"{SHOWN_SIDES[side]} {name}{_compared(turn, side, place)}"
    if piece.experts is None:
        return f"{name}: the last token, which is not read again and so is not routed"
    rows = zip(state.view.heat.layers, piece.experts.tolist(), strict=False)
    served = "  ".join(f"L{ly}:{','.join(str(e) for e in row if e >= 0)}" for ly, row in rows)
    return f"{name} routed to {served}"


def _compared(turn: Turn, side: Side, place: int) -> str:
    """How a token of an A/B answer differs from the other side's: KL, and layers routed otherwise."""
    words = ""
    report = turn.comparison
    if report is not None and place < len(report.kl):
        words += f" · KL {report.kl[place]:.3g}"
    if place >= min(len(turn.pieces), len(turn.other_pieces)):
        return words + " · the other answer is shorter"
    one, other = turn.pieces[place], turn.other_pieces[place]
    if one.text != other.text:
        words += f", there {(other if side == 'base' else one).text!r}"
    if one.experts is None or other.experts is None or one.experts.shape != other.experts.shape:
        return words
    pairs = zip(one.experts.tolist(), other.experts.tolist(), strict=True)
    apart = sum(set(a) != set(b) for a, b in pairs)
    return f"{words}, {apart} of {len(one.experts)} layers routed otherwise"


def tint(state: AppState) -> tuple[int, int] | None:
    """(position, expert) whose tokens are tinted, None while brushing is off."""
    return state.cursor if state.brush else None

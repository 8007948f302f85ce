"""One record of a data set, whatever its form, as a `Line`.

Recognised in this order, a value of null counting as absent: `messages`; ShareGPT's
`conversations`; preference pairs (`chosen`, of which `rejected` is left out); `prompt` with or
without `completion`, each text or a conversation; Alpaca's `instruction`; plain text under a key.
"""

from __future__ import annotations

from typing import Any

from mlxfun.data.conversations import conversation, from_json_text, kind_of, string
from mlxfun.data.lines import BrokenLine, Line, Message

DEFAULT_TEXT_KEY = "content"
FORMS = ("messages", "conversations", "conversation", "chosen", "prompt", "instruction")

Record = dict[str, Any]


def parse(value: Any, text_key: str, where: str) -> Line | None:
    """The sample in a record, None if the record is blank.

    Raises BrokenLine, and Unusable (see mlxfun.data.conversations) for one that is
    well-formed but cannot be used.
    """
    if not isinstance(value, dict):
        raise BrokenLine(where, f"expected a JSON object, found {kind_of(value)}")
    record = {key: found for key, found in value.items() if found is not None}
    keys = _text_keys(text_key)
    line = _line(record, keys, where)
    if line is None:
        if any(key in value for key in (*FORMS, *keys)):
            return None  # the columns are there, and all of them are null
        seen = ", ".join(repr(str(key)[:40]) for key in list(value)[:20]) or "none"
        what = f"no text under {text_key!r}"
        raise BrokenLine(where, what, f" (keys seen: {seen}); choose one with --text-key")
    return None if _blank(line) else line


def _text_keys(text_key: str) -> tuple[str, ...]:
    # Nobody asked for a key, so the other common name is as good.
    return (text_key, "text") if text_key == DEFAULT_TEXT_KEY else (text_key,)


def _line(record: Record, keys: tuple[str, ...], where: str) -> Line | None:
    if "messages" in record:
        return _chat(record, conversation(record["messages"], "messages", where), where, "messages")
    for key in ("conversations", "conversation"):
        if key in record:
            turns = conversation(record[key], key, where)
            return _chat(record, turns, where, "ShareGPT conversations")
    if "chosen" in record:
        return _preference(record, where)
    text = next((key for key in keys if key in record), None)
    if "prompt" in record and ("completion" in record or text is None):
        return _prompt(record, where)
    if "instruction" in record and text is None:
        return _instruction(record, where)
    if text is None:
        return None
    return Line("text", string(record[text], text, where), where, form=f"text under {text!r}")


def _chat(
    record: Record, turns: tuple[Message, ...], where: str, form: str, notes: tuple[str, ...] = ()
) -> Line:
    system = record.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": string(system, "system", where)}, *turns)
    return Line("messages", turns, where, _tools(record, where), form=form, notes=notes)


def _tools(record: Record, where: str) -> tuple[Message, ...]:
    tools = from_json_text(record.get("tools", record.get("functions")))
    if tools is None or tools in ("", []):
        return ()
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BrokenLine(where, f"'tools' must be a list of objects, found {kind_of(tools)}")
    return tuple(tools)


def _is_conversation(value: Any) -> bool:
    value = from_json_text(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _prompt(record: Record, where: str) -> Line:
    """TRL's prompt and completion: two texts, or two conversations."""
    prompt, completion = record["prompt"], record.get("completion", "")
    if not _is_conversation(prompt) and not _is_conversation(completion):
        pair = string(prompt, "prompt", where), string(completion, "completion", where)
        if not record.get("tools") and not record.get("system"):
            form = "prompt and completion" if "completion" in record else "prompt"
            return Line("prompt", pair, where, form=form)
    turns = _turns(prompt, "prompt", "user", where)
    turns += _turns(completion, "completion", "assistant", where)
    return _chat(record, turns, where, "prompt and completion as messages")


def _turns(value: Any, key: str, role: str, where: str) -> tuple[Message, ...]:
    """A conversation, or a text as one turn; none for an empty text."""
    if _is_conversation(value):
        return conversation(value, key, where)
    text = string(value, key, where)
    return ({"role": role, "content": text},) if text else ()


def _preference(record: Record, where: str) -> Line:
    """The chosen answer; the other is what the model shall not do."""
    prompt = _turns(record.get("prompt", ""), "prompt", "user", where)
    turns = prompt + _turns(record["chosen"], "chosen", "assistant", where)
    notes = ("without its rejected answer",) if "rejected" in record else ()
    if not turns:
        return Line("text", "", where)
    if not prompt and not _is_conversation(record["chosen"]):
        # TRL's implicit prompt: one text with both sides in it.
        text = string(record["chosen"], "chosen", where)
        return Line("text", text, where, form="chosen text", notes=notes)
    return _chat(record, turns, where, "preference pairs", notes)


def _instruction(record: Record, where: str) -> Line:
    """Alpaca: an instruction, further input, and the output."""
    asked = [string(record.get(k, ""), k, where) for k in ("instruction", "input")]
    prompt = "\n\n".join(text for text in asked if text.strip())
    output = string(record.get("output", ""), "output", where)
    return Line("prompt", (prompt, output), where, form="instruction, input and output")


def _blank(line: Line) -> bool:
    if isinstance(line.payload, str):
        return not line.payload.strip()
    if line.kind == "prompt":
        return not any(str(text).strip() for text in line.payload)
    turns = line.messages or []
    return not any(str(t["content"]).strip() or t.get("tool_calls") for t in turns)

"""The outcome of a command as one JSON object, in printable ASCII.

A module of its own, so that a headless run does not import Rich.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from mlxfun.events import JobEnded
from mlxfun.text import escaped


def json_line(ended: JobEnded) -> str:
    """`report_json` as one line of text, without its end."""
    return escaped(json.dumps(report_json(ended), allow_nan=False))


def report_json(ended: JobEnded) -> dict[str, object]:
    """One line of `--headless --json`: command, ok, state, seconds, report, data (and error)."""
    report = ended.report
    found: dict[str, object] = {
        "command": ended.line,
        "ok": ended.error is None,
        "state": ended.state,
        "seconds": round(ended.seconds, 6),
        "report": report.summary() if report is not None else None,
        "data": {"kind": report.kind} | finite(report.data()) if report is not None else {},
    }
    if ended.error is not None:
        found["error"] = ended.error
    return found


def finite(data: Mapping[str, object]) -> dict[str, object]:
    """`data` with NaN and infinity replaced by null, which JSON can hold."""
    return {key: _finite(value) for key, value in data.items()}


def _finite(value: object) -> object:
    """`value` with NaN and infinity replaced by null, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value

"""The results of commands as text: one JSON object for programs, lines for people."""

from __future__ import annotations

import dataclasses
import json
from itertools import zip_longest
from typing import Any

MOST_SHOWN = 10
"""Entries of a table that are shown in one line; the JSON object has them all."""


def json_of(result: Any) -> str:
    """A dataclass as one JSON object; what JSON does not know becomes its text."""
    return json.dumps(_fields(result), default=str)


def lines_of(result: Any) -> list[str]:
    """A dataclass, a line a field and a further one for each further text of it."""
    values = _fields(result)
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        of_value = _readable(value).splitlines() or ["-"]
        lines += [
            f"{title:<{width}}  {line}"
            for title, line in zip_longest([name.replace("_", " ")], of_value, fillvalue="")
        ]
    return lines


def _fields(result: Any) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def _readable(value: Any) -> str:
    match value:
        case bool() | None:
            return {True: "yes", False: "no", None: "-"}[value]
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
        case dict():
            shown = [f"{_readable(str(k))}: {_readable(v)}" for k, v in list(value.items())[:MOST_SHOWN]]
            more = len(value) - len(shown)
            return ", ".join([*shown, f"and {more} more"] if more else shown) or "-"
        case list() | tuple() if any(isinstance(one, str) and " " in one for one in value):
            return "\n".join(_readable(" ".join(one.split())) for one in value)  # texts: one a line
        case list() | tuple():
            return ", ".join(map(_readable, value)) or "-"
    # a store may be anyone's, and a terminal obeys control characters
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in str(value))

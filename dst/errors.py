"""A mistake of the user's in one sentence: `ConfigError`, and the rules that values keep."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Whether a value is allowed; what is, in words, asked for only when one is not.
Rule = tuple[Callable[[Any], bool], str | Callable[[], str]]


class ConfigError(ValueError):
    """A mistake of the user's, told in one sentence that says what is allowed; exit code 2."""


def quoted(error: BaseException) -> str:
    """Another's error within a sentence: its type and text on one line, not too long."""
    text = re.sub(r"\.? \(https?://\S+\)", "", f"{type(error).__name__}: {error}")
    return textwrap.shorten(text, 400, placeholder=" ...")


def check_value(name: str, value: Any, rule: Rule) -> None:
    """`ConfigError` that calls it `name` if `value` breaks the rule."""
    ok, allowed = rule
    if not ok(value):
        words = allowed if isinstance(allowed, str) else allowed()
        raise ConfigError(f"{name} must be {words}, not {value!r}.")


def near(name: str, names: Collection[str], elsewhere: Mapping[str, str]) -> str:
    """A hint at the name that was meant: what it is called `elsewhere`, or one much like it."""
    found = [elsewhere[name]] if name in elsewhere else difflib.get_close_matches(name, names, n=1)
    return f'; did you mean "{found[0]}"?' if found else ""


# -------------------------------------------------------------------------------------------- rules
def is_int(value: Any) -> bool:
    """An integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """An integer or a finite float."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def one_of(names: Collection[str]) -> Rule:
    """One of the strings in `names`, which may grow."""
    return lambda v: isinstance(v, str) and v in names, lambda: listed(names)


def choice(*names: str) -> Rule:
    """One of these strings."""
    return one_of(names)


def listed(names: Collection[str]) -> str:
    """'a', 'b' or 'c'."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


def integer(low: int, high: float = math.inf) -> Rule:
    """An integer from `low` to `high`."""
    allowed = f"an integer >= {low}" if high == math.inf else f"an integer from {low} to {high}"
    return lambda v: is_int(v) and low <= v <= high, allowed


def number(inside: Callable[[float], bool], allowed: str) -> Rule:
    """A finite number for which `inside` is true."""
    return lambda v: is_number(v) and inside(v), f"a number {allowed}"


def tuple_of(each: Callable[[Any], bool], inside: Callable[[tuple], bool], allowed: str) -> Rule:
    """A tuple all of whose entries are `each`, and that is `inside` as a whole."""

    def ok(v: Any) -> bool:
        return isinstance(v, tuple) and all(map(each, v)) and inside(v)

    return ok, allowed


YES_OR_NO: Rule = (lambda v: isinstance(v, bool), "True or False")

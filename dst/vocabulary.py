"""Names that a config may say, each with its row: the package's own and those that a user adds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from dst.errors import ConfigError

Row = TypeVar("Row")


class Names(Mapping[str, Row], Generic[Row]):
    """name -> row, in the order in which they were added."""

    def __init__(
        self,
        what: str,
        kind: type[Row],
        rows: Mapping[str, Row],
        check: Callable[[str, Row], None] = lambda who, row: None,
    ):
        self._what, self._kind, self._check = what, kind, check  # check(who, row): ConfigError
        self._rows = dict(rows)
        self._files: dict[str, str] = {}  # of a user's own names

    def register(self, name: str, row: Row) -> None:
        """Adds a row; the same file may do so again, as it does whenever it is loaded.

        Raises: ConfigError for a name that exists already, one that no folder may have, a bad row.
        """
        file = os.path.abspath(sys._getframe(1).f_code.co_filename)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.]*", name):
            raise ConfigError(
                f"the name of a {self._what} must be letters, digits, '_' and '.', not {name!r}."
            )
        if name in self._rows and self._files.get(name) != file:
            where = f"in {self._files[name]}" if name in self._files else "in dst itself"
            raise ConfigError(
                f"{self._what} {name!r} exists already, {where}; choose another name."
            )
        who = f"{self._what} {name!r}"
        if not isinstance(row, self._kind):
            kind, found = self._kind.__name__, type(row).__name__
            raise ConfigError(f"{who} must be registered with {kind}(...), not with a {found}.")
        self._check(who, row)
        self._rows[name], self._files[name] = row, file

    def remove(self, name: str) -> None:
        """Forgets a name that was registered, as a notebook may want to. Raises: KeyError."""
        del self._files[name]
        del self._rows[name]

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

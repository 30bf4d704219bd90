"""The house keeps its order: arrows point one way, and what differs is asked in one room only."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

DST = Path(__file__).parents[1] / "dst"
FILES = sorted(p for p in DST.rglob("*.py") if "native" not in p.parts)
# What may import what: only what stands in a row above, or in the same room.
ORDER = [
    {"errors", "sown"},
    {"vocabulary", "hosts", "arguments", "axis"},
    {"optimizer"},
    {"layers"},
    {"network", "data", "models"},
    {"connections", "discovery"},
    {"state", "observe"},
    {"loss"},
    {"update"},
    {"methods"},
    {"start", "rewire", "config"},
    {"training"},
    {"main", "__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
# Few look up: a config's fields become a method among the methods, a ticket is a first state, what
# is carried lies between two states, and a step ends with what the method remembers.
UPWARDS = {
    ("methods/settings.py", "config"),
    ("methods/lottery.py", "start"),
    ("connections/carry.py", "state"),
    ("update.py", "methods"),
}


def room(path: Path) -> str:
    """The top-level module or package of a file."""
    return path.relative_to(DST).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, also where only types are."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dst"):
            if node.module == "dst":
                found |= {name.name for name in node.names}
            else:
                found.add(node.module.split(".")[1])
    return found


def test_every_module_has_its_place():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DST)))
def test_arrows_point_one_way(path):
    name, mine = str(path.relative_to(DST)), room(path)
    allowed = {other for other in FLOOR if FLOOR[other] < FLOOR[mine] or other == mine}
    allowed |= {target for file, target in UPWARDS if file == name}
    assert imported(path) - allowed == set() or mine == "__init__"


@pytest.mark.parametrize(
    ("pattern", "where"),
    [
        (r"isinstance\([^)]*\bArena\)|execution\s*[!=]=\s*[\"']", "connections"),
        (r"layer\.kind\b", "layers"),
        (r"\bpmap\(", "update"),
        (r"default_backend\(\)", "connections"),
    ],
)
def test_what_differs_is_asked_in_one_room(pattern, where):
    """Which execution runs, which kind a layer is, on which devices and backend."""
    asking = {room(p) for p in FILES if re.search(pattern, p.read_text())}
    assert asking <= {where, "layers" if "backend" in pattern else where}


PUBLIC = ["dst", "dst.config", "dst.layers", "dst.methods", "dst.data", "dst.models"]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented(module):
    """Whatever `make docs` shows: functions, classes, and what these have of their own."""
    room = importlib.import_module(module)
    bare = []
    for name in getattr(room, "__all__", vars(room)):
        value = getattr(room, name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        own = {n: v for n, v in vars(value).items() if not n.startswith("_") and callable(v)}
        methods = {n: v for n, v in own.items() if inspect.isclass(value) and inspect.isfunction(v)}
        documented = {n: inspect.getdoc(getattr(value, n)) for n in methods}
        documented[""] = value.__doc__
        bare += [f"{name}.{n}" for n, text in documented.items() if not text]
    assert not bare

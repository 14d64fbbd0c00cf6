"""Who may import whom (docs/architecture.md, section 2), what no file may contain, and how large one may be.

Every import counts: those inside functions and those for the type checker only, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "remote_modules"
NAME = PACKAGE.name

ROOT = ("errors", "spans", "peers", "identity", "config")  # each may use those before it
# What each subpackage may use besides itself, the root modules and third parties.
MAY_USE: dict[str, set[str]] = {
    "wire": set(),
    "plan": set(),
    "discovery": {"plan.leases"},  # who may change a record is a decision
    "net": {"wire", "plan.deadlines"},  # a connection's heartbeat is a decision, so it lives in plan
    "model": set(),
    "client": {"wire", "plan", "discovery", "net", "model"},
    "server": {"wire", "plan", "discovery", "net", "model"},
    "training": {"client"},  # what loops log of a client
    "testing": {"wire", "plan", "discovery", "net", "model", "client", "server"},
    "cli": {"wire", "plan", "discovery", "net", "model", "client", "server", "testing"},
}
WIRE_MAY_USE_OF_ROOT = {"errors"}
MODEL_MAY_USE_OF_ROOT = {"errors", "spans"}
# The public names of the package, loaded when first used, and the entry point.
EXEMPT = {"__init__", "__main__"}

IMPURE = {"asyncio", "socket", "threading", "time", "random", "secrets", "selectors", "ssl", "subprocess", "datetime"}
USERS_OF: dict[str, set[str]] = {
    "torch": {
        *("wire.tensors", "wire.codecs", "wire.forms", "wire.mxint8", "wire.outliers", "net.client_connection"),
        *("model", "client", "training.swarm_metrics", "server", "cli"),
    },
    "transformers": {"model", "client", "cli", "testing", "training.trainer"},
    "lightning": {"training.lightning"},
    "aiohttp": {"net", "discovery"},
    "zeroconf": {"discovery"},
    "huggingface_hub": {"model"},
    "safetensors": {"model"},
    "bitsandbytes": {"model"},
    "accelerate": {"model"},
    "cryptography": {"identity"},
    "prometheus_client": {"discovery", "server"},
    "redis": {"discovery"},
    "typer": {"cli"},
    "rich": {"cli"},
    "uvloop": {"net"},
}

FORBIDDEN_MODULES = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "yaml", "imp", "xmlrpc"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("joblib", "load")}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# (module, function): why it may be longer.
LONG_FUNCTIONS = {("cli.serve", "serve"): "one parameter for each option of the command; the body is one call"}


class Import(NamedTuple):
    """One imported module; ``name`` is what was taken from it, if anything."""

    line: int
    module: str
    name: str | None
    is_typing_only: bool

    def __str__(self) -> str:
        return f"line {self.line}: {self.module}" + (f".{self.name}" if self.name else "")


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax trees by dotted name below the package, such as ``wire.framing`` or ``cli`` (its ``__init__``)."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text("utf-8"), filename=str(path))
    return trees


def imports_of(tree: ast.Module) -> Iterator[Import]:
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None, id(node) in typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                yield Import(node.lineno, node.module or "", alias.name, id(node) in typing_only)


def target_of(found: Import) -> str | None:
    """The module of ours that an import names, below the package; None for others'."""
    if found.module != NAME and not found.module.startswith(f"{NAME}."):
        return None
    inner = found.module.removeprefix(NAME).removeprefix(".")
    deeper = ".".join(part for part in (inner, found.name) if part)
    return deeper if deeper in modules() else inner


def is_in(module: str, areas: set[str]) -> bool:
    return any(module == area or module.startswith(f"{area}.") for area in areas)


def area_of(module: str) -> str:
    return module.partition(".")[0]


def may_import(module: str, target: str) -> bool:
    area, goal = area_of(module), area_of(target)
    if goal in ROOT:
        if area in ROOT:
            return ROOT.index(goal) < ROOT.index(area)
        limits = {"wire": WIRE_MAY_USE_OF_ROOT, "model": MODEL_MAY_USE_OF_ROOT}
        return goal in limits.get(area, ROOT)
    return area not in ROOT and (goal == area or is_in(target, MAY_USE[area]))


@pytest.mark.parametrize("module", [name for name in modules() if name not in EXEMPT])
def test_module_imports_only_from_its_layer_and_below(module: str) -> None:
    found = {
        str(an_import): target
        for an_import in imports_of(modules()[module])
        if (target := target_of(an_import)) is not None
    }
    assert [text for text, target in found.items() if not may_import(module, target)] == []


def test_every_subpackage_has_a_layer() -> None:
    assert {area_of(name) for name in modules()} == {*ROOT, *EXEMPT, *MAY_USE}


def test_nobody_imports_the_command_line_or_the_test_helpers() -> None:
    assert not [area for area, used in MAY_USE.items() if "cli" in used or ("testing" in used and area != "cli")]


@pytest.mark.parametrize("module", [name for name in modules() if area_of(name) in ("wire", "plan")])
def test_wire_and_plan_know_no_clock_chance_or_io(module: str) -> None:
    """`Random` as the type of a parameter is fine: whoever calls brings the instance."""
    impure = [
        str(found)
        for found in imports_of(modules()[module])
        if area_of(found.module) in IMPURE
        and (found.module, found.name, found.is_typing_only) != ("random", "Random", True)
    ]
    assert impure == []


@pytest.mark.parametrize("library", USERS_OF)
def test_library_is_used_where_it_belongs(library: str) -> None:
    strangers = [
        f"{module}, {found}"
        for module, tree in modules().items()
        for found in imports_of(tree)
        if area_of(found.module) == library and not is_in(module, USERS_OF[library])
    ]
    assert strangers == []


@pytest.mark.parametrize("module", modules())
def test_no_module_can_run_code_from_others(module: str) -> None:
    tree = modules()[module]
    found = [str(one) for one in imports_of(tree) if area_of(one.module) in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(name) if name in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {name}()")
            case ast.Attribute(ast.Name(owner), name) if (owner, name) in FORBIDDEN_METHODS:
                found.append(f"line {node.lineno}: {owner}.{name}()")
        for keyword in node.keywords:
            is_on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if keyword.arg in ("shell", "trust_remote_code") and is_on:
                found.append(f"line {node.lineno}: {keyword.arg}")
    assert found == []


def test_modules_import_each_other_in_one_direction() -> None:
    """A module counts as importing another even where it does so inside a function: late imports hide cycles."""
    graph = {
        name: {target for found in imports_of(tree) if (target := target_of(found)) in modules()}
        for name, tree in modules().items()
        if name not in EXEMPT
    }
    assert find_cycle(graph) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The names along one cycle, if there is any."""
    left = {name: set(targets) & graph.keys() - {name} for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets]:
        for name in free:
            del left[name]
        for targets in left.values():
            targets.difference_update(free)
    if not left:
        return []
    walk = [min(left)]
    while walk[-1] not in walk[:-1]:
        walk.append(min(left[walk[-1]]))
    return walk[walk.index(walk[-1]) :]


def test_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_file_is_too_long() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path.relative_to(PACKAGE)): count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long = {
        (module, node.name): count
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (count := code_lines(node)) > MAX_FUNCTION_LINES
    }
    assert {key: count for key, count in long.items() if key not in LONG_FUNCTIONS} == {}
    assert LONG_FUNCTIONS.keys() <= long.keys(), "an exception that is no longer needed"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end that hold code; the docstring does not count."""
    numbers = {
        line
        for node in ast.walk(function)
        if isinstance(node, ast.stmt | ast.expr | ast.arg) and node.end_lineno is not None
        for line in (node.lineno, node.end_lineno)
    }
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        numbers -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(numbers)

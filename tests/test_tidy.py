"""What reviews would otherwise have to repeat: who may import whom, what nobody may call, how large things may grow.

Everything is read off the syntax tree; nothing is imported or run.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import cast

import pytest

import hetero_async

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hetero_async"
SHIPPED = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
ALL = sorted([*SHIPPED, *(ROOT / "tests").rglob("*.py")])

# The command line: a verb or a family of them each.
VERBS = {
    "cli", "cli_doctor", "cli_events", "cli_keys", "cli_log", "cli_plan", "cli_sim", "cli_status", "cli_study",
    "exporting", "repairing", "restoring",
}  # fmt: skip
# What a training script works with.
TRAINING = {
    "session", "drawing", "evaluation", "group", "group_inner", "inner_state", "inspection", "schedule", "loading",
    "folders", "probing",
}  # fmt: skip
# Lowest first. A file imports from lower layers, from its own folder, and if it lies in the package's root folder
# from files of the same layer there.
LAYERS = [
    {"errors", "arrays"},
    {"core"},
    {"ports", "formats", "actors"},
    {
        "archiving",
        "desk",
        "rounds",
        "traffic",
        "download",
        "transfers",
        "replay",
        "quarantine",
        "bulk",
        "best",
        "checkpoints",
        "feed",
        "reigning",
        "takeover",
        "serve",
        "standby",
        "node",
        "parts",
        "train",
    },
    {"tensors", "shell"},
    {"tables", "complaints", "config", "watch"},
    TRAINING
    | {
        "streams",
        "extras",
        "assembly",
        "agent",
        "asking",
        "looking",
        "remains",
        "following",
        "reporting",
        "roster",
        "enrolment",
        "standby_enrolment",
        "planning",
        "measuring",
        "unarchiving",
    },
    {"sim", "integrations", "doctor"},
    VERBS | {"", "__main__"},
]
LEVEL = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}

# Packages that only these may touch, so that each can be replaced, or left out, in one place.
ONLY_IN = {
    "torch": TRAINING | {"tensors", "integrations", "sim"},
    "zmq": {"shell"},
    "httpx2": {"shell"},
    "msgpack": {"formats"},
    "zstandard": {"formats"},
    "tenacity": {"shell", "actors", "archiving"},
    "pydantic": {"tables", "complaints", "shell", "sim", "watch"},
    "obstore": {"shell"},
    "typer": VERBS,
    "huggingface_hub": {"folders"},
    "transformers": {"integrations"},
    "lightning": {"integrations"},
    "accelerate": {"integrations"},
    "matplotlib": {"watch"},
    "tensorboard": {"watch"},
    "prometheus_client": {"watch"},
    "starlette": {"watch"},
    "hypercorn": {"watch"},
    "rich": VERBS | {"watch"},
}
# The core decides by its records alone: no clock, no chance, no world.
NOT_IN_CORE = {"asyncio", "datetime", "io", "os", "pathlib", "random", "secrets", "socket", "threading", "time", "uuid"}
NOT_CALLED_IN_CORE = {"open", "print", "input", "id", "hash"}

# Each of these runs or allocates what a peer or a file says, without a bound; or retries for ever.
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "yaml"}
BANNED_NAMES = {
    "eval", "exec", "builtins.eval", "builtins.exec", "__import__", "allow_pickle", "torch.load",
    "recv_pyobj", "send_pyobj", "recv_json", "send_json",
    "retry_if_not_exception_type", "retry_always",
}  # fmt: skip
# A thing belongs to its subject, not to a drawer.
BANNED_FILES = {"utils.py", "util.py", "common.py", "helpers.py", "base.py", "misc.py"}

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
# path or path:function → the reason why splitting it would make it worse.
LARGER_FOR_A_REASON: dict[str, str] = {}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit_of(path: Path) -> str:
    """The folder or root file of the package that a file belongs to; '' is the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, kinds))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports from."""
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            yield from _from_imports(node)


def _from_imports(node: ast.ImportFrom) -> Iterator[tuple[int, str]]:
    """`from hetero_async import core` imports hetero_async.core; any other `from x import y` counts as x."""
    module = node.module or ""
    is_folder = module == "hetero_async"
    yield from ((node.lineno, f"{module}.{alias.name}" if is_folder else module) for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(path):
        package, *rest = module.split(".")
        if package == "hetero_async":
            yield line, rest[0] if rest and rest[0] in LEVEL else ""


def may_import(path: Path, target: str) -> bool:
    unit = unit_of(path)
    is_root_file = path.parent == PACKAGE
    is_root_target = not (PACKAGE / target).is_dir() or target == ""
    beside = is_root_file and is_root_target and LEVEL[target] == LEVEL[unit]
    return LEVEL[target] < LEVEL[unit] or target == unit or beside


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert unit_of(path) in LEVEL, f"{name_of(path)}: give it a place in LAYERS"
    upward = [
        f"{name_of(path)}:{line} imports {unit}" for line, unit in own_imports(path) if not may_import(path, unit)
    ]
    assert not upward


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=name_of)
def test_the_core_needs_nothing_but_the_standard_library(path: Path) -> None:
    for line, module in imports(path):
        first = module.split(".")[0]
        is_pure = first in sys.stdlib_module_names and first not in NOT_IN_CORE
        assert is_pure or first == "hetero_async", f"{name_of(path)}:{line} imports {module}"
    waits = [*nodes(path, ast.Await, ast.AsyncFunctionDef)]
    assert not waits, f"{name_of(path)}: the core never waits"
    assert not [found for found in calls(path) if found.split(":")[1] in NOT_CALLED_IN_CORE]


def calls(path: Path) -> Iterator[str]:
    for node in nodes(path, ast.Call):
        function = cast(ast.Call, node).func
        if isinstance(function, ast.Name):
            yield f"{function.lineno}:{function.id}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_each_foreign_package_has_one_home(path: Path) -> None:
    for line, module in imports(path):
        homes = ONLY_IN.get(module.split(".")[0])
        assert homes is None or unit_of(path) in homes, f"{name_of(path)}:{line} imports {module}, a matter of {homes}"


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_dangerous_is_named(path: Path) -> None:
    assert not [f"{name_of(path)}:{found}" for found in dangers(path)]


def dangers(path: Path) -> list[str]:
    modules = [f"{line}:{module}" for line, module in imports(path) if module.split(".")[0] in BANNED_MODULES]
    return modules + [found for found in names(path) if found.split(":")[1] in BANNED_NAMES]


DANGEROUS = [
    "import pickle", "from pickle import loads", "import marshal", "import shelve", "import dill", "import yaml",
    "eval(x)", "exec(code)", "import builtins\nbuiltins.exec(code)", "run = eval", "__import__(name)",
    "socket.recv_pyobj()", "self._raw.recv_pyobj()", "torch.load(path)", "from torch import load",
    "numpy.load(path, allow_pickle=True)",
]  # fmt: skip


@pytest.mark.parametrize("code", DANGEROUS)
def test_what_is_dangerous_is_found(tmp_path: Path, code: str) -> None:
    path = tmp_path / "dangerous.py"
    path.write_text(code)
    assert dangers(path)


def names(path: Path) -> Iterator[str]:
    """Every name that is used, imported, or looked up as an attribute: alone, and as `owner.name`."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Name(id=name) | ast.alias(name=name):
                yield f"{node.lineno}:{name}"
            case ast.ImportFrom(module=module):
                yield from (f"{node.lineno}:{module}.{alias.name}" for alias in node.names)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                yield f"{node.lineno}:{owner}.{name}"
                # `loader.exec` may be anything; `zmq_socket.recv_pyobj` is what it says.
                yield f"{node.lineno}:{name}" if name not in {"eval", "exec"} else f"{node.lineno}:"
            case ast.Attribute(attr=name) if name not in {"eval", "exec"}:
                yield f"{node.lineno}:{name}"
            case ast.keyword(arg=str(name)):
                yield f"{node.value.lineno}:{name}"


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_only_supervisors_catch_whatever_comes(path: Path) -> None:
    supervisors = (PACKAGE / "actors/supervisor.py", PACKAGE / "sim/world.py")  # of real and of simulated processes
    allowed = {"Exception"} if path in supervisors else set()
    for line, caught in caught_names(path):
        is_broad = caught in {"", "Exception", "BaseException"}
        assert not is_broad or caught in allowed, f"{name_of(path)}:{line} catches {caught or 'everything'}"


def caught_names(path: Path) -> Iterator[tuple[int, str]]:
    """What is caught by `except` and not raised on, or swallowed by `contextlib.suppress`; '' is a bare except."""
    for node in nodes(path, ast.ExceptHandler, ast.Call):
        if isinstance(node, ast.ExceptHandler):
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            yield from ((node.lineno, ast.unparse(kind) if kind else "") for kind in kinds)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield from ((node.lineno, ast.unparse(kind)) for kind in node.args)


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_waits_are_bounded_by_the_caller(path: Path) -> None:
    for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
        arguments = cast(ast.FunctionDef, node).args
        taken = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs, *arguments.posonlyargs]}
        assert "timeout" not in taken, f"{name_of(path)}:{cast(ast.FunctionDef, node).name} takes a timeout"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    is_marker = path.name == "__init__.py" and not tree(path).body
    assert is_marker or ast.get_docstring(tree(path)), f"{name_of(path)} begins without a docstring"
    assert path.name not in BANNED_FILES, f"{name_of(path)}: name it after its subject"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_and_functions_fit_in_a_head(path: Path) -> None:
    sizes = {name_of(path): (len(path.read_text(encoding="utf-8").splitlines()), FILE_LINES_MAX)}
    for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
        function = cast(ast.FunctionDef, node)
        lines = cast(int, function.end_lineno) - function.lineno + 1
        sizes[f"{name_of(path)}:{function.name}"] = (lines, FUNCTION_LINES_MAX)
    too_large = {
        name: lines for name, (lines, most) in sizes.items() if lines > most and name not in LARGER_FOR_A_REASON
    }
    assert not too_large


def test_reasons_for_large_files_are_still_needed() -> None:
    assert all((ROOT / name.split(":")[0]).exists() and reason for name, reason in LARGER_FOR_A_REASON.items())


def test_public_names_are_listed_in_order() -> None:
    listed: list[str] = []
    bound: set[str] = set()
    for node in nodes(PACKAGE / "__init__.py", ast.ImportFrom, ast.Assign):
        if isinstance(node, ast.ImportFrom) and node.module != "typing":
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            assigned = {target.id for target in node.targets if isinstance(target, ast.Name)}
            listed = ast.literal_eval(node.value) if "__all__" in assigned else listed
            bound |= {name for name in assigned - {"__all__"} if name.startswith("__") or not name.startswith("_")}
    assert listed, "hetero_async has no __all__"
    assert list(listed) == sorted(listed)
    assert set(listed) == bound
    assert all(hasattr(hetero_async, name) for name in listed), "also those that are loaded when they are asked for"

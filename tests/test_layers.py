"""The house: imports go downward only, cost little, and change nothing."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tea_llm

PACKAGE = Path(tea_llm.__file__).parent

FLOORS = (
    ("errors",),
    ("tools",),
    ("params",),
    ("settings",),
    ("chat", "constraint", "models", "template"),
    ("_llama",),
    ("blocking", "session", "sizing"),
    ("ticket",),
    ("stream",),
    ("engine",),
    ("registry",),
    ("backend",),  # the seam: what a backend is. It opens `local` and `api`, which stand on it, by LATE below
    ("api_format",),
    ("api_io",),
    ("answer", "api"),
    ("local",),
    ("actions",),
    ("workflow_file",),
    ("workflow",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

LATE = {"backend": {"api", "local"}}
"""Imports that go up, made inside a function when the first backend of the kind is opened."""

HEAVY = ("numpy", "httpx", "httpx_sse", "jinja2", "yaml", "tqdm", "tenacity", "asyncio", "tea_llm._llama")


def _imports(module: Path) -> Iterator[tuple[str, bool]]:
    """The rooms that a module imports, each with whether it does so as soon as it is imported itself."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inside = {n for f in ast.walk(tree) if _is_late(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for room in [node.module] if node.module else [name.name for name in node.names]:
                yield room.split(".")[0], node not in inside
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tea_llm":
            pytest.fail(f"{module.name}:{node.lineno} imports {node.module}; inside the package write it relatively")


def _is_late(node: ast.AST) -> bool:
    """Whether what stands in there is not done by an import of the module: a function, or names for type checkers."""
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_every_room_has_its_floor() -> None:
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR_OF) - {"_llama"}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor if room != "_llama"])
def test_imports_go_downward_only(room: str) -> None:
    """A room imports rooms of lower floors; the few exceptions are made late, and are listed."""
    for other, at_once in _imports(PACKAGE / f"{room}.py"):
        downward = FLOOR_OF[other] < FLOOR_OF[room]
        assert downward or (not at_once and other in LATE.get(room, ())), f"{room} imports {other}"


def test_only_the_engine_touches_the_extension() -> None:
    touching = {room for room in FLOOR_OF if room != "_llama" and ("_llama", True) in _imports(PACKAGE / f"{room}.py")}
    assert touching == {"engine"}


def _after(code: str) -> dict[str, list[str]]:
    """What a fresh interpreter has loaded, and what it has done to the world, after `code`."""
    program = f"""
import json, logging, os, signal, sys, threading
done = []
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    started = event.split(".")[0] in ("socket", "subprocess", "signal", "shutil", "tempfile") or event in (
        "os.putenv", "os.unsetenv", "os.mkdir", "os.remove", "os.rename", "os.chdir", "os.fork", "os.system")
    if writes or started:
        done.append(f"{{event}} {{args!r:.200}}")
before = dict(os.environ), list(sys.path), threading.active_count(), signal.getsignal(signal.SIGINT)
sys.addaudithook(watch)
{code}
after = dict(os.environ), list(sys.path), threading.active_count(), signal.getsignal(signal.SIGINT)
if before != after:
    done.append("environment, sys.path, threads or signal handlers are not what they were")
if logging.root.handlers:
    done.append("logging has a handler")
print(json.dumps({{"loaded": sorted(sys.modules), "done": done}}))
"""
    # An editable install rebuilds on import, which is an effect of that kind of install and not of ours.
    answer = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True)
    result: dict[str, list[str]] = json.loads(answer.stdout.splitlines()[-1])
    return result


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = set(_after("import tea_llm")["loaded"])
    assert not loaded & set(HEAVY)


def test_importing_the_package_loads_no_room() -> None:
    """Each name comes from its room when it is first used."""
    loaded = _after("import tea_llm; tea_llm.LlmCallParams")["loaded"]
    rooms = [name for name in loaded if name.startswith("tea_llm.")]
    assert rooms == ["tea_llm.errors", "tea_llm.params", "tea_llm.tools"]


@pytest.mark.parametrize("room", sorted(FLOOR_OF.keys() - {"_llama", "engine", "registry", "__main__"}))
def test_no_room_loads_numpy_or_the_extension_and_only_the_api_loads_httpx(room: str) -> None:
    loaded = set(_after(f"import tea_llm.{room}")["loaded"])
    assert not loaded & {"numpy", "tea_llm._llama"}
    assert "httpx" not in loaded or room in ("api", "api_io")


@pytest.mark.parametrize("room", sorted(FLOOR_OF.keys() - {"__main__"}))
def test_an_import_has_no_effects(room: str) -> None:
    """No file written, no socket, no process, no thread, no signal handler, no environment change, no log handler."""
    if room in ("_llama", "engine", "registry") and importlib.util.find_spec("tea_llm._llama") is None:
        pytest.skip("tea_llm is built without llama.cpp")
    if _is_editable():
        pytest.skip("an editable install rebuilds when it is imported; ci/test-wheel runs this on an installed wheel")
    assert _after(f"import tea_llm.{room}")["done"] == []


def _is_editable() -> bool:
    return "site-packages" not in PACKAGE.parts


def test_every_public_name_is_there_and_documented() -> None:
    for name in tea_llm.__all__:
        value = getattr(tea_llm, name)
        assert name == "__tea_actions__" or (value.__doc__ or "").strip(), name
    assert set(tea_llm.__all__) <= set(dir(tea_llm))


def test_the_table_of_rooms_and_the_public_names_agree() -> None:
    """`__init__` lists its names for readers, for type checkers and for the loader: three lists of one thing."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level for alias in n.names}
    assert typed == set(tea_llm.__all__) == set(tea_llm._ROOM_OF)

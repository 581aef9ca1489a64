"""Workflow files: what one says, with everything that is wrong with it found before anything runs.

    path or dict ─read→ data and the lines of its keys ─check→ Workflow
"""

from __future__ import annotations

import ast
import difflib
import itertools
import logging
import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, TypeAlias

import yaml

from .errors import WorkflowError
from .settings import LlmSettings
from .template import check_condition, check_template, is_template

__all__ = ["CODE_NAME", "END", "START", "Fork", "Node", "Route", "Workflow", "kind_of", "load_workflow"]

logger = logging.getLogger("tea_llm")

_Path: TypeAlias = tuple[str | int, ...]  # where something stands in the file: ("nodes", 0, "with")

START, END = "__start__", "__end__"
CODE_NAME = "__node__"
"""The function that a node's `run` becomes."""

_FILE_KEYS = ("name", "description", "settings", "variables", "state_schema", "initial_state", "nodes", "edges")
_TEA_KEYS = ("imports", "config")  # The Edge Agent's own; without effect here
_NODE_KEYS = ("name", "description", "uses", "action", "with", "params", "output", "outputs", "run", "goto", "fan_in")
_EDGE_KEYS = ("from", "to", "type", "fan_in", "when", "condition")
_RULE_KEYS = ("if", "to")
_MAX_ITEMS = 100_000


# --- what a file says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A way to `target`, open while `when` is as true as `expected`."""

    target: str
    place: str
    when: Any = True
    expected: bool = True

    @property
    def always(self) -> bool:
        """Whether it is open whatever the state."""
        return self.when is True and self.expected


@dataclass(frozen=True)
class Node:
    """One step: an action with its parameters, Python code, or neither; then where to go from here."""

    name: str
    place: str
    action: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    output: str | Mapping[str, Any] | None = None
    code: CodeType | None = None
    goto: tuple[Route, ...] = ()


@dataclass(frozen=True)
class Fork:
    """Branches that run at once, and the node where they join."""

    routes: tuple[Route, ...]
    fan_in: str


@dataclass(frozen=True)
class Workflow:
    """A checked workflow. `edges` and `forks` are by the node they leave."""

    name: str
    settings: Mapping[str, Any]
    variables: Mapping[str, Any]
    initial_state: Mapping[str, Any]
    nodes: Mapping[str, Node]
    edges: Mapping[str, tuple[Route, ...]]
    forks: Mapping[str, Fork]

    @property
    def entered_by_edge(self) -> frozenset[str]:
        """The nodes that some edge leads to; none of them is fallen into from the node written above it."""
        routes = [*self.edges.values(), *(fork.routes for fork in self.forks.values())]
        return frozenset(route.target for way in routes for route in way)

    def as_written_after(self, name: str) -> str:
        """Where a node without an open way of its own leads: the next node of the file, unless edges lead to that."""
        names = list(self.nodes)
        if name == START:
            return END if START in self.edges else names[0]
        following = names[names.index(name) + 1 :]
        return END if not following or following[0] in self.entered_by_edge else following[0]

    def fork_after(self, name: str) -> Fork | None:
        """The fork that follows a node; a node's goto comes before its edges, parallel ones too."""
        return None if self._goto(name) else self.forks.get(name)

    def ways_out(self, name: str) -> tuple[Route, ...]:
        """The routes that leave `name`: its goto, else its edges, those with a condition first."""
        return self._goto(name) or tuple(sorted(self.edges.get(name, ()), key=lambda route: route.always))

    def may_follow(self, name: str) -> set[str]:
        """Every node that can come right after `name`; a fork counts as its branches and its join."""
        if fork := self.fork_after(name):
            return {route.target for route in fork.routes} | {fork.fan_in}
        ways = self.ways_out(name)
        targets = {route.target for route in ways}
        return targets if any(route.always for route in ways) else targets | {self.as_written_after(name)}

    def reachable(self, name: str, without: str | None = None) -> set[str]:
        """Every node that can come after `name` or is it, going no further than `without`."""
        found, todo = {name}, [name]
        while todo:
            if (at := todo.pop()) in (without, END):
                continue
            new = self.may_follow(at) - found
            found |= new
            todo.extend(new)
        return found

    def _goto(self, name: str) -> tuple[Route, ...]:
        return self.nodes[name].goto if name in self.nodes else ()


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's plain types, and no key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises ConstructorError for a key that is there twice."""
        first_lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in first_lines:
                first = first_lines[key.tag, key.value]
                problem = f"key {key.value!r} is there twice, first on line {first}; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first_lines[key.tag, key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _read_file(path: str | os.PathLike[str]) -> tuple[Any, Mapping[_Path, int]]:
    """What a file holds, and the lines of its first levels."""
    try:
        loader = _Loader(Path(path).read_bytes())
    except (OSError, ValueError) as exc:
        raise WorkflowError(f"Can't read the workflow {os.fspath(path)}: {exc}") from exc
    except yaml.YAMLError as exc:
        raise _bad_yaml(path, exc) from exc
    try:
        root = loader.get_single_node()
        if (size := _size(root, {})) > _MAX_ITEMS:
            raise WorkflowError(f"{os.fspath(path)} spells out to {size:.0g} items; at most {_MAX_ITEMS} are allowed")
        data = loader.construct_document(root) if root is not None else None
    except yaml.YAMLError as exc:
        raise _bad_yaml(path, exc) from exc
    except (RecursionError, ValueError) as exc:  # ValueError: a date such as 2024-13-45
        raise WorkflowError(f"{os.fspath(path)} is no usable YAML: {exc}") from exc
    finally:
        loader.dispose()
    return data, _lines(root)


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many items a node has with every alias written out; infinite where an alias is inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known; only an alias inside itself asks before that
        children = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else ()
        children = node.value if isinstance(node, yaml.SequenceNode) else children
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def _bad_yaml(path: str | os.PathLike[str], exc: yaml.YAMLError) -> WorkflowError:
    mark = getattr(exc, "problem_mark", None)
    problem = getattr(exc, "problem", None) or " ".join(str(exc).split())
    return WorkflowError(f"{os.fspath(path)}{f':{mark.line + 1}' if mark else ''}: {problem}")


def _lines(root: yaml.Node | None, depth: int = 5) -> dict[_Path, int]:
    """The line of each key and item, as deep as messages point. Bounded, since an alias may repeat without end."""
    lines: dict[_Path, int] = {}
    todo: list[tuple[_Path, yaml.Node | None]] = [((), root)]
    while todo:
        path, node = todo.pop()
        if len(path) >= depth:
            continue
        if isinstance(node, yaml.MappingNode):
            children = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        elif isinstance(node, yaml.SequenceNode):
            children = [(i, item, item) for i, item in enumerate(node.value)]
        else:
            continue
        for key, marked, value in children:
            lines[(*path, key)] = marked.start_mark.line + 1
            todo.append(((*path, key), value))
    return lines


# --- checking --------------------------------------------------------------------------------------------------------


def load_workflow(workflow: str | os.PathLike[str] | Mapping[str, Any], actions: Collection[str]) -> Workflow:
    """The checked workflow of a file, or of an already parsed dict; `actions` are the names that nodes may use.

    Raises WorkflowError with everything that is wrong with it, each with its line; SettingsError for `settings.llm`.
    """
    if isinstance(workflow, Mapping):
        return _Checker(None, {}, actions).workflow(workflow)
    if not isinstance(workflow, (str, os.PathLike)):
        raise WorkflowError(f"The workflow is {kind_of(workflow)}; give the path of a workflow file, or a dict")
    data, lines = _read_file(workflow)
    return _Checker(os.fspath(workflow), lines, actions).workflow(data)


class _Checker:
    """Turns parsed data into a Workflow, and keeps every problem it meets until the end."""

    def __init__(self, file: str | None, lines: Mapping[_Path, int], actions: Collection[str]) -> None:
        self._file = file
        self._lines = lines
        self._actions = actions
        self._problems: list[str] = []

    def workflow(self, data: Any) -> Workflow:
        """The workflow. Raises WorkflowError when there was any problem."""
        if not isinstance(data, Mapping):
            raise WorkflowError(f"{self._place(())} holds {kind_of(data)}; a workflow is a mapping with 'nodes'")
        self._check_keys(data, (), _FILE_KEYS, _TEA_KEYS)
        for key in _TEA_KEYS:
            if key in data:
                logger.warning("%s: %r is for The Edge Agent and has no effect here", self._place((key,)), key)
        parts = {key: self._mapping(data, (key,)) for key in ("settings", "variables", "initial_state", "state_schema")}
        for key in ("variables", "initial_state", "settings"):
            self._check_templates(parts[key], (key,))
        nodes = self._nodes(data)
        edges, forks = self._edges(data, nodes)
        checked = Workflow(
            str(data.get("name") or "workflow"),
            parts["settings"],
            parts["variables"],
            parts["initial_state"],
            nodes,
            edges,
            forks,
        )
        if not self._problems:
            self._check_flow(checked)
        if self._problems:
            raise WorkflowError("\n".join(self._problems))
        self._check_llm_settings(parts["settings"])
        return checked

    def _nodes(self, data: Mapping[str, Any]) -> dict[str, Node]:
        items = data.get("nodes")
        if not isinstance(items, list) or not items:
            self._report(("nodes",), f"'nodes' is {kind_of(items)}; give a list with at least one node")
            return {}
        names = {str(item.get("name")) for item in items if isinstance(item, Mapping)}
        nodes: dict[str, Node] = {}
        for i, item in enumerate(items):
            path = ("nodes", i)
            if not isinstance(item, Mapping):
                self._report(path, f"node {i + 1} is {kind_of(item)}; a node is a mapping with a 'name'")
                continue
            name = item.get("name")
            if not isinstance(name, str) or not name or name in (START, END):
                self._report(path, f"node {i + 1} has the name {name!r}; give it a text of its own")
            elif name in nodes:
                self._report((*path, "name"), f"node {name!r} is there twice, first at {nodes[name].place}; rename one")
            else:
                nodes[name] = self._node(name, item, path, names)
        return nodes

    def _node(self, name: str, item: Mapping[str, Any], path: _Path, names: Collection[str]) -> Node:
        self._check_keys(item, path, _NODE_KEYS)
        action = self._either(item, path, "uses", "action")
        params = self._either(item, path, "with", "params")
        output = self._either(item, path, "output", "outputs")
        code = item.get("run")
        if action is not None and action not in self._actions:
            known = _nearest(str(action), self._actions)
            self._report(self._given(item, path, "uses", "action"), f"unknown action {action!r}; {known}")
        if action is not None and code is not None:
            self._report((*path, "run"), f"node {name!r} has both an action and 'run'; make it two nodes")
        if params is None:
            params = {}
        elif not isinstance(params, Mapping):
            self._report(path, f"the parameters of {name!r} are {kind_of(params)}; give a mapping")
            params = {}
        elif bad := [key for key in params if not isinstance(key, str) or key == "state"]:
            self._report(path, f"{name!r} has a parameter {bad[0]!r}; the name is taken or no text, choose another")
        if output is not None and not isinstance(output, (str, Mapping)):
            self._report(path, f"the output of {name!r} is {kind_of(output)}; give a key, or a mapping to templates")
        self._check_templates(params, self._given(item, path, "with", "params"))
        if isinstance(output, Mapping):
            self._check_templates(output, self._given(item, path, "output", "outputs"))
        return Node(
            name,
            self._place(path),
            action,
            params,
            output,
            None if code is None else self._code(code, (*path, "run")),
            self._goto(item.get("goto"), (*path, "goto"), names),
        )

    def _code(self, code: Any, path: _Path) -> CodeType | None:
        if not isinstance(code, str):
            self._report(path, f"'run' is {kind_of(code)}; give Python code")
            return None
        first_line = self._lines.get(path, 0)  # lines above the code, so that tracebacks point into the file
        try:
            module = ast.parse(f"def {CODE_NAME}(): pass")
            body = ast.parse("\n" * first_line + textwrap.dedent(code)).body  # a bare `return` parses; exec refuses it
            function = module.body[0]
            assert isinstance(function, ast.FunctionDef)
            function.body = body or function.body
            return compile(module, self._file or "<workflow>", "exec")
        except (SyntaxError, ValueError, RecursionError) as exc:
            line = f" in line {exc.lineno}" if isinstance(exc, SyntaxError) else ""
            self._report(path, f"'run' is no valid Python{line}: {getattr(exc, 'msg', exc)}")
            return None

    def _goto(self, goto: Any, path: _Path, names: Collection[str]) -> tuple[Route, ...]:
        if goto is None:
            return ()
        if isinstance(goto, str):
            self._check_target(goto, path, names)
            return (Route(goto, self._place(path)),)
        if not isinstance(goto, list):
            self._report(path, f"'goto' is {kind_of(goto)}; give a node's name, or a list of {{if, to}}")
            return ()
        routes = []
        for i, rule in enumerate(goto):
            if not isinstance(rule, Mapping):
                self._report((*path, i), f"a rule of 'goto' is {kind_of(rule)}; give {{if, to}}")
                continue
            self._check_keys(rule, (*path, i), _RULE_KEYS)
            self._check_target(rule.get("to"), (*path, i), names)
            self._check_condition(rule.get("if", True), (*path, i))
            routes.append(Route(str(rule.get("to")), self._place((*path, i)), rule.get("if", True)))
        return tuple(routes)

    def _edges(
        self, data: Mapping[str, Any], nodes: Mapping[str, Node]
    ) -> tuple[dict[str, tuple[Route, ...]], dict[str, Fork]]:
        items = data.get("edges")
        if items is None:
            return {}, {}
        if not isinstance(items, list):
            self._report(("edges",), f"'edges' is {kind_of(items)}; give a list of {{from, to}}")
            return {}, {}
        edges: dict[str, tuple[Route, ...]] = {}
        forks: dict[str, Fork] = {}
        for i, item in enumerate(items):
            path = ("edges", i)
            if not isinstance(item, Mapping):
                self._report(path, f"edge {i + 1} is {kind_of(item)}; an edge is a mapping with 'from' and 'to'")
                continue
            self._check_keys(item, path, _EDGE_KEYS)
            source = item.get("from")
            if source != START:
                self._check_target(source, path, nodes, "from", ends=False)
            self._check_target(item.get("to"), path, nodes)
            self._add_edge(str(source), self._edge_route(item, path), item, path, edges, forks, nodes)
            if str(source) in nodes and nodes[str(source)].goto:
                logger.warning("%s: the edge has no effect, since %r has a goto", self._place(path), source)
        return edges, forks

    def _add_edge(
        self,
        source: str,
        route: Route,
        item: Mapping[str, Any],
        path: _Path,
        edges: dict[str, tuple[Route, ...]],
        forks: dict[str, Fork],
        nodes: Mapping[str, Node],
    ) -> None:
        kind, fan_in = item.get("type", "normal"), item.get("fan_in")
        if kind not in ("normal", "parallel"):
            self._report(path, f"the edge's type is {kind!r}; choose 'normal' or 'parallel'")
        elif kind == "parallel":
            self._check_target(fan_in, path, nodes, "fan_in", ends=False)
            fork = forks.get(source)
            if fork and fork.fan_in != fan_in:
                self._report(path, f"parallel edges from {source!r} join at {fork.fan_in!r} and {fan_in!r}; choose one")
            forks[source] = Fork((*(fork.routes if fork else ()), route), str(fan_in))
        elif fan_in is not None:
            self._report(path, "'fan_in' is for parallel edges; add 'type: parallel' or leave it out")
        else:
            if route.always and any(other.always for other in edges.get(source, ())):
                self._report(path, f"two edges always lead on from {source!r}; add 'when', or 'type: parallel' to both")
            edges[source] = (*edges.get(source, ()), route)
        if source in edges and source in forks:
            self._report(path, f"{source!r} has parallel edges and others; make them all parallel, or none")

    def _edge_route(self, item: Mapping[str, Any], path: _Path) -> Route:
        target, place = str(item.get("to")), self._place(path)
        when, condition = item.get("when", True), item.get("condition")
        if isinstance(condition, Mapping):  # The Edge Agent's long form
            condition = condition.get("value")
        if condition is None:
            self._check_condition(when, path)
            return Route(target, place, when)
        self._check_condition(condition, path)
        if not isinstance(when, bool):
            self._report(path, f"the edge has a 'condition' and 'when: {when}'; with one, 'when' is true or false")
        return Route(target, place, condition, bool(when))

    def _check_flow(self, workflow: Workflow) -> None:
        for fork in workflow.forks.values():
            for route in fork.routes:
                if fork.fan_in not in workflow.reachable(route.target, without=fork.fan_in):
                    self._problems.append(
                        f"{route.place}: the branch {route.target!r} never joins; add an edge from its end to "
                        f"{fork.fan_in!r}"
                    )
        reached = workflow.reachable(START)
        for name, node in workflow.nodes.items():
            if name not in reached:
                logger.warning("%s: node %r is never reached", node.place, name)

    def _check_llm_settings(self, settings: Mapping[str, Any]) -> None:
        """Keys and plain values; a templated value is checked when an action reads it."""
        llm = settings.get("llm")
        if isinstance(llm, Mapping):
            llm = {key: None if is_template(value) else value for key, value in llm.items()}
        where = f"{self._file}: settings.llm" if self._file else "settings.llm"
        lines = {str(path[-1]): line for path, line in self._lines.items() if path[:-1] == ("settings", "llm")}
        LlmSettings.from_mapping(llm, where=where, line_of=lines)

    # small checks

    def _check_keys(self, item: Mapping[str, Any], path: _Path, known: Sequence[str], also: Sequence[str] = ()) -> None:
        for key in item:
            if key not in known and key not in also:
                self._report((*path, key), f"unknown key {key!r}; {_nearest(str(key), known)}")

    def _check_target(
        self, target: Any, path: _Path, names: Collection[str], key: str = "to", *, ends: bool = True
    ) -> None:
        if not isinstance(target, str) or (target not in names and not (ends and target == END)):
            what = f"unknown node {target!r} in {key!r}" if target is not None else f"{key!r} is missing"
            self._report((*path, key), f"{what}; {_nearest(str(target), names)}")

    def _check_condition(self, condition: Any, path: _Path) -> None:
        if isinstance(condition, str):
            try:
                check_condition(condition)
            except WorkflowError as exc:
                self._report(path, str(exc))

    def _check_templates(self, value: Any, path: _Path) -> None:
        for text in _texts(value):
            try:
                check_template(text)
            except WorkflowError as exc:
                self._report(path, str(exc))

    def _either(self, item: Mapping[str, Any], path: _Path, *keys: str) -> Any:
        """The value under whichever of two keys that mean the same is there."""
        given = [key for key in keys if item.get(key) is not None]
        if len(given) > 1:
            self._report((*path, given[1]), f"{given[0]!r} and {given[1]!r} mean the same; keep one of them")
        return item[given[0]] if given else None

    def _given(self, item: Mapping[str, Any], path: _Path, *keys: str) -> _Path:
        return (*path, next((key for key in keys if key in item), keys[0]))

    def _mapping(self, data: Mapping[str, Any], path: _Path) -> Mapping[str, Any]:
        value = data.get(str(path[-1]))
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._report(path, f"{path[-1]!r} is {kind_of(value)}; give a mapping")
            return {}
        return value

    def _report(self, path: _Path, problem: str) -> None:
        self._problems.append(f"{self._place(path)}: {problem}")

    def _place(self, path: _Path) -> str:
        """`file:line`, or the way through a dict: `nodes[0].with`."""
        if self._file is None:
            dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            return dotted.lstrip(".") or "workflow"
        for end in range(len(path), 0, -1):
            if path[:end] in self._lines:
                return f"{self._file}:{self._lines[path[:end]]}"
        return self._file


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def kind_of(value: Any) -> str:
    """A value, as an error message calls it."""
    if value is None:
        return "missing"
    return f"{value!r:.60}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _nearest(name: str, known: Collection[str]) -> str:
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return f"choose one of {', '.join(known)}"

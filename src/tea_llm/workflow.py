"""Run a workflow node by node, its branches at once.

    workflow_file.load_workflow → Workflow ─walk→ final state

The dialect is The Edge Agent's, as docs/workflows.md describes it.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeAlias

from .actions import ActionFunction, register_actions
from .backend import BackendPool, LlmBackend
from .errors import LlmError, WorkflowError
from .settings import LlmSettings
from .template import holds, render
from .workflow_file import CODE_NAME, END, START, Node, Route, Workflow, kind_of, load_workflow

__all__ = ["MAX_STEPS", "Event", "run_workflow"]

logger = logging.getLogger("tea_llm")

Event: TypeAlias = Mapping[str, Any]
"""What `on_event` is given: `event` (`start`, `end`, `error`) and `node`; at the end `duration_s`, and any `error`."""

MAX_STEPS = 10_000
"""Node runs in one workflow run; a loop that takes more is stopped."""


@dataclass(frozen=True)
class _Engine:
    """What the actions ask an engine for, under the names that The Edge Agent gives it."""

    variables: Mapping[str, Any]
    secrets: Mapping[str, Any]
    cli_overrides: Mapping[str, Any]
    actions_registry: dict[str, ActionFunction]
    _config: Mapping[str, Any]
    llm_backend_pool: BackendPool
    llm_backend: LlmBackend | None


def run_workflow(
    workflow: str | os.PathLike[str] | Mapping[str, Any],
    input: Mapping[str, Any] | None = None,
    *,
    gguf: str | os.PathLike[str] | None = None,
    backend: str | LlmBackend | None = None,
    actions: Mapping[str, ActionFunction] | None = None,
    on_event: Callable[[Event], object] | None = None,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Any]:
    """The final state of a workflow: its `initial_state`, `input` over that, and what its nodes gave.

    `workflow` is a path or an already parsed dict. `gguf` is the model file to use before any other, `backend` a name
    (`local`, `api`, `auto`) or a backend of your own, which is not closed. `actions` are further ones by name, each
    called as `action(state=…, **parameters)`. `on_event` hears of each node's start and end, from the thread that runs
    it; `progress` of a model that loads, 0 to 1.

    Raises WorkflowError for a file that can't run (before anything runs) and for a node that failed, with its name;
    SettingsError for `settings.llm` or `backend`.
    """
    known: dict[str, ActionFunction] = {}
    register_actions(known)
    checked = load_workflow(workflow, [*known, *(actions or ())])
    if not isinstance(input, Mapping | None):
        raise WorkflowError(f"The input is {kind_of(input)}; give a mapping of state keys to values")
    scope: dict[str, Any] = {"env": os.environ, "secrets": os.environ, "settings": checked.settings}
    variables = render(checked.variables, scope)
    state = {**render(checked.initial_state, {**scope, "variables": variables}), **copy.deepcopy(dict(input or {}))}
    own = backend if isinstance(backend, LlmBackend) else None
    if backend is not None and own is None:
        LlmSettings(backend=str(backend))  # raises for a name that is none
    LlmSettings(model_path=gguf or None)  # type: ignore[arg-type]  # raises for what is no path
    overrides = {"model_path": os.fspath(gguf) if gguf else None, "backend": None if own else backend}
    pool = BackendPool(progress=progress)
    engine = _Engine(
        variables=variables,
        secrets=os.environ,
        cli_overrides={key: value for key, value in overrides.items() if value is not None},
        actions_registry={},
        _config={"settings": checked.settings},
        llm_backend_pool=pool,
        llm_backend=own,
    )
    register_actions(engine.actions_registry, engine)
    engine.actions_registry.update(actions or {})
    try:
        return _Run(checked, engine, on_event).from_start(state)
    finally:
        pool.close()


class _Run:
    """One run of a workflow."""

    def __init__(self, workflow: Workflow, engine: _Engine, on_event: Callable[[Event], object] | None) -> None:
        self._workflow = workflow
        self._engine = engine
        self._on_event = on_event
        self._steps = itertools.count(1)  # next() is atomic, and branches share it

    def from_start(self, state: dict[str, Any]) -> dict[str, Any]:
        """The final state."""
        at, results = self._leave(START, state, None)
        return self._walk(at, state, None, results, END)

    def _walk(
        self, at: str, state: dict[str, Any], result: Any, parallel_results: list[Any] | None, until: str
    ) -> dict[str, Any]:
        """Run from `at` up to `until`, which is not run. `parallel_results` is what the first node sees of a fork."""
        while at not in (until, END):
            node = self._workflow.nodes[at]
            if next(self._steps) > MAX_STEPS:
                raise WorkflowError(
                    f"Stopped before node {at!r} ({node.place}): {MAX_STEPS} nodes have run; check the loop it is in",
                    node=at,
                )
            seen = state if parallel_results is None else {**state, "parallel_results": parallel_results}
            result, updates = self._run(node, seen, result)
            state = {**state, **updates}
            at, parallel_results = self._leave(at, state, result)
        return state if parallel_results is None else {**state, "parallel_results": parallel_results}

    def _leave(self, name: str, state: dict[str, Any], result: Any) -> tuple[str, list[Any] | None]:
        """Where to go from a node, and after a fork what its branches gave."""
        workflow = self._workflow
        try:
            scope = self._scope(state, result)
            if fork := workflow.fork_after(name):
                routes = [route for route in fork.routes if holds(route.when, scope) == route.expected]
                return fork.fan_in, self._branch(routes, fork.fan_in, state, result)
            for route in workflow.ways_out(name):
                if holds(route.when, scope) == route.expected:
                    return route.target, None
        except WorkflowError as exc:
            if exc.node is not None:
                raise
            raise WorkflowError(f"Can't tell where to go from node {name!r}: {exc}", node=name) from exc
        return workflow.as_written_after(name), None

    def _branch(self, routes: Sequence[Route], fan_in: str, state: dict[str, Any], result: Any) -> list[Any]:
        """What each branch gave, in the order of the edges: its state's keys, with `branch`, `success` and `state`."""

        def run(route: Route) -> dict[str, Any]:
            own = self._walk(route.target, _copied(state), result, None, fan_in)
            return {**own, "branch": route.target, "success": True, "state": own}

        if not routes:
            return []
        threads = ThreadPoolExecutor(len(routes), thread_name_prefix="tea-llm-branch")
        try:
            return [future.result() for future in [threads.submit(run, route) for route in routes]]
        finally:
            # Ctrl-C doesn't wait for the branches: closing the backends, which follows, ends what they are at.
            threads.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)

    def _run(self, node: Node, state: dict[str, Any], previous: Any) -> tuple[Any, Mapping[str, Any]]:
        """The result of a node, and what it changes in the state. Raises WorkflowError with the node's name."""
        started = time.perf_counter()
        self._tell(event="start", node=node.name)
        try:
            result = self._result(node, state, previous)
            updates = self._updates(node, state, result)
        except (Exception, SystemExit) as exc:  # a node's exit() ends the node, not the program it runs in
            self._tell(event="error", node=node.name, duration_s=time.perf_counter() - started, error=str(exc))
            text = str(exc) if isinstance(exc, LlmError) else f"{type(exc).__name__}: {exc}"
            place = _place_in_code(exc, node.code) or node.place
            raise WorkflowError(f"Node {node.name!r} ({place}) failed: {text}", node=node.name) from exc
        self._tell(event="end", node=node.name, duration_s=time.perf_counter() - started)
        return result, updates

    def _result(self, node: Node, state: dict[str, Any], previous: Any) -> Any:
        if node.code is not None:
            return self._run_code(node.code, state)
        if node.action is None:
            return {}
        params = render(node.params, self._scope(state, previous))
        result = self._engine.actions_registry[node.action](state=dict(state), **params)
        if isinstance(result, Mapping) and result.get("success") is False:
            raise WorkflowError(str(result.get("error") or f"{node.action} says success: false"))
        return result

    def _run_code(self, code: CodeType, state: dict[str, Any]) -> Any:
        names: dict[str, Any] = {
            "state": dict(state),
            "variables": self._engine.variables,
            "json": json,
            "actions": self._engine.actions_registry,
            "parallel_results": state.get("parallel_results"),
            "__name__": CODE_NAME,
        }
        exec(code, names)  # a workflow's author writes programs, see docs/workflows.md
        result = names[CODE_NAME]()
        if not isinstance(result, Mapping | None):
            raise WorkflowError(f"'run' returned {kind_of(result)}; return a dict, or nothing")
        return result or {}

    def _updates(self, node: Node, state: dict[str, Any], result: Any) -> Mapping[str, Any]:
        if node.output is None:
            return result if isinstance(result, Mapping) else {"result": result}
        if isinstance(node.output, str):
            return {node.output: result}
        scope = {**self._scope(state, result), "action_result": result}
        return {key: _picked(value, result, scope) for key, value in node.output.items()}

    def _scope(self, state: Mapping[str, Any], result: Any) -> dict[str, Any]:
        scope = {
            "state": state,
            "variables": self._engine.variables,
            "env": os.environ,
            "secrets": self._engine.secrets,
            "result": result,
        }
        scope["settings"] = render(self._workflow.settings, scope)
        return scope | {key: state[key] for key in ("parallel_results",) if key in state}

    def _tell(self, **event: Any) -> None:
        logger.debug("Node %(node)s: %(event)s", event)
        if self._on_event is not None:
            self._on_event(event)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state, deep enough that a branch changes nothing outside. What can't be copied is shared."""
    memo: dict[int, Any] = {}
    copied: dict[str, Any] = {}
    for key, value in state.items():
        try:
            copied[key] = copy.deepcopy(value, memo)
        except Exception as exc:  # noqa: BLE001  anybody's objects; a lock or a connection, for one
            logger.debug("Branches share state[%r]: %s", key, exc)
            copied[key] = value
    return copied


def _picked(value: Any, result: Any, scope: Mapping[str, Any]) -> Any:
    """One value of `outputs`: a bare name picks that key of the result, anything else is rendered."""
    if not isinstance(value, str) or not value.isidentifier():
        return render(value, scope)
    if not isinstance(result, Mapping) or value not in result:
        has = f"it has {', '.join(map(str, result))}" if isinstance(result, Mapping) else f"it is {kind_of(result)}"
        raise WorkflowError(f"the result has no {value!r}; {has}. If it may be missing, write {{{{ result.{value} }}}}")
    return result[value]

def _place_in_code(exc: BaseException, code: CodeType | None) -> str | None:
    """The line of a node's `run` that an error came through last."""
    place, traceback = None, exc.__traceback__
    while traceback is not None and code is not None:
        if traceback.tb_frame.f_code.co_filename == code.co_filename:
            place = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place

"""Workflows: what a file may say, what is found before it runs, and what a run gives."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tea_llm.backend import LlmBackend
from tea_llm.errors import SettingsError, WorkflowError
from tea_llm.params import LlmCallParams, LlmCallResult, Usage
from tea_llm.workflow import MAX_STEPS, run_workflow

Write = Callable[[str], Path]


class Parrot(LlmBackend):
    """Says what it was asked."""

    closed = False

    def call(self, params: LlmCallParams) -> LlmCallResult:
        text = str(params.messages[-1]["content"] if params.messages else params.prompt)
        return LlmCallResult(text.upper(), "parrot", finish_reason="stop", usage=Usage(3, 2), backend="local")

    def chat(self, messages: Any, **options: Any) -> LlmCallResult:
        return self.call(LlmCallParams("", messages=messages, **options))

    def stream(self, params: LlmCallParams, callback: Callable[[str], object]) -> LlmCallResult:
        result = self.call(params)
        for letter in result.content:
            callback(letter)
        return result

    def embed(self, text: Any, **options: Any) -> Any:
        return [[float(len(t))] for t in text]

    def is_available(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a workflow file."""

    def write(text: str) -> Path:
        path = tmp_path / "flow.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def run(workflow: Any, given: dict[str, Any] | None = None, **how: Any) -> dict[str, Any]:
    return run_workflow(workflow, given, **{"backend": Parrot(), **how})


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["uses", "action"])
@pytest.mark.parametrize("params", ["with", "params"])
@pytest.mark.parametrize("output", ["output", "outputs"])
def test_both_spellings_of_a_node_mean_the_same(action: str, params: str, output: str) -> None:
    node = {"name": "a", action: "llm.call", params: {"prompt": "hi {{ state.who }}"}, output: {"answer": "content"}}
    assert run({"nodes": [node]}, {"who": "you"}) == {"who": "you", "answer": "HI YOU"}


def test_an_output_key_takes_the_whole_result() -> None:
    state = run({"nodes": [{"name": "a", "uses": "llm.call", "with": {"prompt": "x"}, "output": "r"}]})
    assert set(state) == {"r"}
    assert state["r"]["content"] == "X"


def test_without_an_output_the_result_is_merged() -> None:
    state = run({"nodes": [{"name": "a", "uses": "llm.chat", "with": {"prompt": "x"}}]}, {"kept": 1})
    assert (state["content"], state["model"], state["kept"]) == ("X", "parrot", 1)


def test_an_output_mapping_has_result_and_action_result_in_scope() -> None:
    outputs = {
        "text": "content",
        "total": "{{ result.usage.total_tokens }}",
        "said": "{{ action_result.content }} by {{ result.model }}",
        "maybe": "{{ result.nothing }}",
        "literal": 5,
        "plain text": "two words",
    }
    node = {"name": "a", "uses": "llm.call", "with": {"prompt": "x"}, "outputs": outputs}
    assert run({"nodes": [node]}) == {
        "text": "X", "total": 5, "said": "X by parrot", "maybe": None, "literal": 5, "plain text": "two words",
    }  # fmt: skip


def test_a_bare_name_that_the_result_has_not_fails_the_node() -> None:
    node = {"name": "a", "uses": "llm.call", "with": {"prompt": "x"}, "outputs": {"text": "contnt"}}
    with pytest.raises(WorkflowError, match=r"Node 'a'.*no 'contnt'; it has content, model"):
        run({"nodes": [node]})


def test_run_is_python_that_returns_what_changes() -> None:
    code = """
        import math
        doubled = [n * 2 for n in state["ns"]]
        def total(): return sum(doubled)
        text = '''kept
        as is'''
        answer = actions["llm.call"](state=state, prompt=variables["word"])["content"]
        return {"total": total(), "pi": round(math.pi), "answer": answer, "dumped": json.dumps(doubled)}
    """
    state = run({"variables": {"word": "hey"}, "nodes": [{"name": "a", "run": code}]}, {"ns": [1, 2]})
    assert state == {"ns": [1, 2], "total": 6, "pi": 3, "answer": "HEY", "dumped": "[2, 4]"}


def test_run_may_return_nothing_and_does_not_change_the_state_by_itself() -> None:
    assert run({"nodes": [{"name": "a", "run": "state['x'] = 1"}]}, {"y": 2}) == {"y": 2}


def test_run_is_no_template() -> None:
    assert run({"nodes": [{"name": "a", "run": "return {'x': '{{ state.y }}'}"}]}, {"y": 2})["x"] == "{{ state.y }}"


def test_parameters_keep_their_types_down_to_the_leaves() -> None:
    seen: dict[str, Any] = {}

    def keep(state: Any, **params: Any) -> dict[str, Any]:
        seen.update(params)
        return {}

    params = {"n": "{{ state.n }}", "deep": [{"x": "{{ state.xs }}"}]}
    params |= {"text": "n={{ state.n }}", "gone": "{{ state.no }}"}
    run({"nodes": [{"name": "a", "uses": "keep", "with": params}]}, {"n": 3, "xs": [1]}, actions={"keep": keep})
    assert seen == {"n": 3, "deep": [{"x": [1]}], "text": "n=3", "gone": None}


def test_a_result_that_is_no_mapping_is_kept_as_result() -> None:
    assert run({"nodes": [{"name": "a", "uses": "seven"}]}, actions={"seven": lambda state: 7}) == {"result": 7}


def test_templates_see_variables_settings_env_secrets_and_the_last_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEA_TEST_VALUE", "from env")
    outputs = {
        "v": "{{ variables.v }}",
        "s": "{{ settings.mine.x }}",
        "e": "{{ env.TEA_TEST_VALUE }}",
        "k": "{{ secrets.TEA_TEST_VALUE }}",
    }
    workflow = {
        "settings": {"mine": {"x": 1}},
        "variables": {"v": "{{ env.TEA_TEST_VALUE }}!"},
        "nodes": [
            {"name": "a", "run": "return {'q': 5}"},
            {"name": "b", "uses": "echo", "with": {"x": "{{ result.q }}"}},
            {"name": "c", "output": outputs},
        ],
    }
    state = run(workflow, actions={"echo": lambda state, x: {"x": x}})
    assert state == {"q": 5, "x": 5, "v": "from env!", "s": 1, "e": "from env", "k": "from env"}


def test_templates_in_settings_are_rendered_before_use() -> None:
    workflow = {
        "settings": {"greeting": "Hello {{ variables.who }}", "llm": {"model": "{{ variables.who }}"}},
        "variables": {"who": "you"},
        "nodes": [{"name": "a", "output": {"said": "{{ settings.greeting }}", "model": "{{ settings.llm.model }}"}}],
    }
    assert run(workflow) == {"said": "Hello you", "model": "you"}


def test_input_goes_over_the_initial_state_and_is_no_template() -> None:
    workflow = {"variables": {"v": 1}, "initial_state": {"a": "{{ variables.v }}", "b": 2}, "nodes": [{"name": "n"}]}
    given = {"b": "{{ variables.v }}"}
    assert run(workflow, given) == {"a": 1, "b": "{{ variables.v }}"}


def test_neither_the_input_nor_the_dict_is_changed() -> None:
    workflow = {"initial_state": {"xs": [1]}, "nodes": [{"name": "a", "run": "state['ys'].append(2); return {}"}]}
    given: dict[str, Any] = {"ys": [1]}
    before = json.dumps([workflow, given])
    run(workflow, given)
    assert json.dumps([workflow, given]) == before


# --- order -----------------------------------------------------------------------------------------------------------


def _named(*names: str, **goto: Any) -> list[dict[str, Any]]:
    """Nodes that write their names down."""
    code = "return {'path': [*state.get('path', []), %r]}"
    return [{"name": n, "run": code % n, **({"goto": goto[n]} if n in goto else {})} for n in names]


def path_of(workflow: dict[str, Any], **given: Any) -> str:
    return "".join(run(workflow, given).get("path", ()))


def test_nodes_run_as_written() -> None:
    assert path_of({"nodes": _named("a", "b", "c")}) == "abc"


def test_goto_jumps() -> None:
    assert path_of({"nodes": _named("a", "b", "c", a="c")}) == "ac"
    assert path_of({"nodes": _named("a", "b", a="__end__")}) == "a"


@pytest.mark.parametrize(("n", "path"), [(9, "ac"), (5, "ad"), (1, "abcd")])
def test_the_first_rule_that_holds_is_taken_else_the_next_node_as_written(n: int, path: str) -> None:
    rules = [{"if": "state.n > 8", "to": "c"}, {"if": "{{ state.n > 4 }}", "to": "d"}]
    nodes = _named("a", "b", "c", "d", a=rules, c=[{"if": "state.n > 8", "to": "__end__"}])
    assert path_of({"nodes": nodes}, n=n) == path


def test_goto_can_loop() -> None:
    again = [{"if": "state.path | length < 3", "to": "a"}]
    assert path_of({"nodes": _named("a", "b", a=again)}) == "aaab"


def test_edges_give_the_order() -> None:
    edges = [{"from": "__start__", "to": "b"}, {"from": "b", "to": "a"}, {"from": "a", "to": "__end__"}]
    assert path_of({"nodes": _named("a", "b"), "edges": edges}) == "ba"


@pytest.mark.parametrize(("ok", "path"), [(True, "ab"), (False, "ac")])
@pytest.mark.parametrize(
    "conditions",
    [
        ({"when": "state.ok"}, {"when": "not state.ok"}),
        ({"when": "ok"}, {"when": "!ok"}),
        ({"when": "{{ state['ok'] == True }}"}, {}),
        ({"condition": "state.ok"}, {"condition": "state.ok", "when": False}),
        ({"condition": {"type": "expression", "value": "state.ok"}, "when": True}, {}),
    ],
)
def test_a_conditional_edge_is_taken_when_it_holds(conditions: Any, ok: bool, path: str) -> None:
    edges = [{"from": "a", "to": "c", **conditions[1]}, {"from": "a", "to": "b", **conditions[0]}]
    assert path_of({"nodes": _named("a", "b", "c"), "edges": edges}, ok=ok) == path


def test_a_node_that_edges_lead_to_is_not_fallen_into_from_above() -> None:
    edges = [{"from": "a", "to": "b", "when": "yes"}, {"from": "a", "to": "c"}]
    assert path_of({"nodes": _named("a", "b", "c"), "edges": edges}, yes=True) == "ab"


def test_a_node_without_an_edge_goes_on_as_written() -> None:
    edges = [{"from": "b", "to": "d"}]
    assert path_of({"nodes": _named("a", "b", "c", "d", "e"), "edges": edges}) == "abde"


def test_a_conditional_start() -> None:
    edges = [{"from": "__start__", "to": "b", "when": "state.late"}, {"from": "__start__", "to": "a"}]
    assert path_of({"nodes": _named("a", "b", a="__end__"), "edges": edges}, late=True) == "b"
    assert path_of({"nodes": _named("a", "b", a="__end__"), "edges": edges}, late=False) == "a"


def test_goto_comes_before_edges(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tea_llm"):
        assert path_of({"nodes": _named("a", "b", "c", a="c"), "edges": [{"from": "a", "to": "b"}]}) == "ac"
    assert "no effect" in caplog.text


def test_an_endless_loop_is_stopped() -> None:
    with pytest.raises(WorkflowError, match=f"{MAX_STEPS} nodes have run"):
        run({"nodes": [{"name": "a", "goto": "a"}]})


def test_a_node_that_is_never_reached_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tea_llm"):
        run({"nodes": _named("a", "b", a="__end__")})
    assert "'b' is never reached" in caplog.text


# --- branches --------------------------------------------------------------------------------------------------------

FORK = [
    {"from": "s", "to": "a", "type": "parallel", "fan_in": "j"},
    {"from": "s", "to": "b", "type": "parallel", "fan_in": "j"},
    {"from": "a", "to": "j"},
    {"from": "b", "to": "j"},
]


def test_the_join_sees_what_each_branch_gave() -> None:
    nodes = [
        {"name": "s", "run": "return {'n': 10}"},
        {"name": "a", "run": "return {'n': state['n'] + 1}"},
        {"name": "b", "uses": "llm.call", "with": {"prompt": "b"}, "output": {"said": "content"}},
        {
            "name": "j",
            "fan_in": True,
            "run": "rs = parallel_results\n"
                   "return {'ns': [r['n'] for r in rs], 'same': rs is state['parallel_results']}",
            "outputs": {"ns": "ns", "same": "same", "said": "{{ parallel_results[1].said }}",
                        "branches": "{{ parallel_results | map(attribute='branch') | list }}",
                        "deep": "{{ state.parallel_results[0].state.n }}"},
        },
        {"name": "last", "run": "return {'gone': 'parallel_results' not in state}"},
    ]  # fmt: skip
    assert run({"nodes": nodes, "edges": FORK}) == {
        "n": 10, "ns": [11, 10], "same": True, "said": "B", "branches": ["a", "b"], "deep": 11, "gone": True,
    }  # fmt: skip


def test_branches_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def meet(state: Any) -> dict[str, Any]:
        meeting.wait()  # breaks, and fails the node, unless both branches are here
        return {}

    nodes = [{"name": "s"}, {"name": "a", "uses": "meet"}, {"name": "b", "uses": "meet"}, {"name": "j"}]
    run({"nodes": nodes, "edges": FORK}, actions={"meet": meet})


def test_branches_do_not_see_each_others_changes() -> None:
    code = "state['xs'].append(1); import time; time.sleep(0.02); return {'seen': list(state['xs'])}"
    nodes = [{"name": "s"}, {"name": "a", "run": code}, {"name": "b", "run": code},
             {"name": "j", "run": "return {'seen': [r['seen'] for r in parallel_results]}"}]  # fmt: skip
    assert run({"nodes": nodes, "edges": FORK}, {"xs": []}) == {"xs": [], "seen": [[1], [1]]}


def test_what_can_not_be_copied_is_shared_by_the_branches() -> None:
    lock = threading.Lock()
    nodes = [{"name": "s", "uses": "lock"}, {"name": "a", "run": "return {'same': state['lock']}"}, {"name": "b"},
             {"name": "j", "run": "return {'same': parallel_results[0]['same'] is state['lock']}"}]  # fmt: skip
    assert run({"nodes": nodes, "edges": FORK}, actions={"lock": lambda state: {"lock": lock}})["same"] is True


def test_a_branch_may_have_several_nodes_and_forks_of_its_own() -> None:
    edges = [
        {"from": "__start__", "to": "a", "type": "parallel", "fan_in": "j"},
        {"from": "__start__", "to": "b", "type": "parallel", "fan_in": "j"},
        {"from": "a", "to": "x", "type": "parallel", "fan_in": "k"},
        {"from": "a", "to": "y", "type": "parallel", "fan_in": "k"},
        {"from": "x", "to": "k"}, {"from": "y", "to": "k"}, {"from": "k", "to": "j"},
        {"from": "b", "to": "c"}, {"from": "c", "to": "j"}, {"from": "j", "to": "__end__"},
    ]  # fmt: skip
    nodes = _named("a", "x", "y", "b", "c")
    nodes.append({"name": "k", "run": "return {'path': [''.join(r['path']) for r in parallel_results]}"})
    nodes.append({"name": "j", "run": "return {'path': [r['path'] for r in parallel_results]}"})
    assert run({"nodes": nodes, "edges": edges})["path"] == [["ax", "ay"], ["b", "c"]]


def test_a_parallel_edge_may_have_a_condition() -> None:
    edges = [{**FORK[0], "when": "state.both"}, *FORK[1:]]
    nodes = [*_named("s", "a", "b"), {"name": "j", "run": "return {'n': len(parallel_results)}"}]
    assert run({"nodes": nodes, "edges": edges}, {"both": False})["n"] == 1
    assert run({"nodes": nodes, "edges": edges}, {"both": True})["n"] == 2


def test_a_failing_branch_fails_the_run_with_its_nodes_name() -> None:
    nodes = [{"name": "s"}, {"name": "a", "run": "1 / 0"}, {"name": "b"}, {"name": "j"}]
    with pytest.raises(WorkflowError, match=r"Node 'a'.*division by zero") as caught:
        run({"nodes": nodes, "edges": FORK})
    assert caught.value.node == "a"


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"run": "raise KeyError('x')"}, "KeyError: 'x'"),
        ({"run": "return [1]"}, "return a dict"),
        ({"run": "raise SystemExit(3)"}, "SystemExit: 3"),
        ({"uses": "llm.call"}, "Missing required parameter: prompt or messages"),
        ({"uses": "llm.call", "with": {"prompt": "{{ 1 / 0 }}"}}, "ZeroDivisionError"),
        ({"uses": "fail"}, "as it said"),
        ({"goto": [{"if": "state.x > 1", "to": "end"}]}, "where to go"),
    ],
)
def test_a_failing_node_raises_with_its_name(node: dict[str, Any], words: str) -> None:
    failing = {"fail": lambda state: {"error": "as it said", "success": False}}
    with pytest.raises(WorkflowError) as caught:
        run({"nodes": [{"name": "first"}, {"name": "bad one", **node}, {"name": "end"}]}, actions=failing)
    assert caught.value.node == "bad one"
    assert "'bad one'" in str(caught.value)
    assert words in str(caught.value)


def test_a_fault_in_run_points_to_its_line_in_the_file(write: Write) -> None:
    path = write("nodes:\n  - name: a\n    run: |\n      x = {}\n\n      return x['q']\n")
    with pytest.raises(WorkflowError, match=r"flow\.yaml:6\) failed: KeyError: 'q'"):
        run(path)


def test_events_tell_of_each_node() -> None:
    events: list[Any] = []
    with pytest.raises(WorkflowError):
        run({"nodes": [{"name": "a"}, {"name": "b", "run": "1 / 0"}]}, on_event=events.append)
    assert [(e["event"], e["node"]) for e in events] == [("start", "a"), ("end", "a"), ("start", "b"), ("error", "b")]
    assert events[1]["duration_s"] >= 0
    assert "division" in events[3]["error"]


def test_a_backend_of_ones_own_is_not_closed() -> None:
    parrot = Parrot()
    run({"nodes": [{"name": "a", "uses": "llm.embed", "with": {"text": "abc"}}]}, backend=parrot)
    assert not parrot.closed


def test_a_backend_name_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="'cloud'"):
        run_workflow({"nodes": [{"name": "a"}]}, backend="cloud")


def test_an_input_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(WorkflowError, match="input"):
        run({"nodes": [{"name": "a"}]}, ["x"])  # type: ignore[arg-type]


# --- what is found before anything runs ------------------------------------------------------------------------------

BAD = """\
nodes:
  - name: first
    run: |
      from pathlib import Path
      Path("ran").touch()
      return {}
"""


@pytest.mark.parametrize(
    ("more", "line", "words"),
    [
        ("  - name: b\n    usess: llm.call\n", 8, "unknown key 'usess'; did you mean 'uses'?"),
        ("  - name: b\n    uses: llm.cal\n", 8, "unknown action 'llm.cal'; did you mean 'llm.call'?"),
        ("  - name: b\n    goto: frist\n", 8, "unknown node 'frist' in 'to'; did you mean 'first'?"),
        ("  - name: b\n    goto:\n      - if: x\n        to: frist\n", 10, "unknown node 'frist'"),
        ("  - name: b\n    goto:\n      - to: [first]\n", 9, "unknown node ['first']"),
        ("edges:\n  - {from: {a: b}, to: [first]}\n", 8, "unknown node {'a': 'b'} in 'from'"),
        ("settings: {a: '{{ x. }}'}\n", 7, "doesn't parse"),
        ("  - name: b\n    goto:\n      - iff: x\n        to: first\n", 9, "unknown key 'iff'"),
        ("  - name: first\n", 7, "node 'first' is there twice"),
        ("  - uses: llm.call\n", 7, "has the name None"),
        ("  - name: __end__\n", 7, "'__end__'"),
        ("  - name: b\n    uses: llm.call\n    action: llm.call\n", 9, "mean the same"),
        ("  - name: b\n    uses: llm.call\n    run: pass\n", 9, "both an action and 'run'"),
        ("  - name: b\n    uses: llm.call\n    with: {prompt: '{{ x. }}'}\n", 9, "doesn't parse"),
        ("  - name: b\n    output: {x: '{{ y'}\n", 8, "doesn't parse"),
        ("  - name: b\n    run: |\n      x = 1\n      return {\n", 8, "no valid Python in line 10"),
        ("  - name: b\n    run: |\n      x = 1\n      break\n", 8, "no valid Python in line 10"),
        ("  - name: b\n    name: c\n", 8, "key 'name' is there twice, first on line 7"),
        ("  - [b]\n", 7, "node 2 is a list"),
        ("  - name: b\n    with: 3\n", 7, "give a mapping"),
        ("edges:\n  - {from: first, to: nowhere}\n", 8, "unknown node 'nowhere'"),
        ("edges:\n  - from: frist\n    to: first\n", 8, "unknown node 'frist' in 'from'; did you mean 'first'?"),
        ("edges:\n  - {from: first}\n", 8, "'to' is missing"),
        ("edges:\n  - {from: first, to: first, wen: x}\n", 8, "unknown key 'wen'; did you mean 'when'?"),
        ("edges:\n  - {from: first, to: first, when: 'x >'}\n", 8, "doesn't parse"),
        ("edges:\n  - {from: first, to: first, type: paralel}\n", 8, "'paralel'"),
        ("edges:\n  - {from: first, to: first, type: parallel}\n", 8, "'fan_in' is missing"),
        ("edges:\n  - {from: first, to: first, type: parallel, fan_in: x}\n", 8, "unknown node 'x' in 'fan_in'"),
        ("edges:\n  - {from: first, to: first, fan_in: first}\n", 8, "is for parallel edges"),
        ("edges:\n  - {from: first, to: first}\n  - {from: first, to: __end__}\n", 9, "two edges always lead"),
        ("  - name: b\n  - name: j\nedges:\n"
         "  - {from: first, to: b, type: parallel, fan_in: j}\n  - {from: b, to: __end__}\n",
         10, "the branch 'b' never joins"),
        ("vars: {}\n", 7, "unknown key 'vars'; did you mean 'variables'?"),
        ("variables: 3\n", 7, "'variables' is 3; give a mapping"),
        ("edges: 3\n", 7, "'edges' is 3"),
        ("x: [1\n", 8, "expected"),
        ("x: !!python/object/apply:os.system ['true']\n", 7, "constructor"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_with_its_line_before_anything_runs(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, line: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkflowError) as caught:
        run(write(BAD + more))
    assert f"flow.yaml:{line}: " in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.node is None
    assert not (tmp_path / "ran").exists()


def test_every_mistake_is_reported_at_once(write: Write) -> None:
    with pytest.raises(WorkflowError) as caught:
        run(write("nodes:\n  - name: a\n    uses: nope\n    goto: nowhere\n    when: x\n"))
    assert [line.split(": ")[0].rsplit(":")[-1] for line in str(caught.value).splitlines()] == ["5", "3", "4"]


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "name: x\n", "nodes: []\n", "nodes: 3\n", "just text", "a: 1\n---\nb: 2\n", "a: &a [*a]\n"],
)
def test_a_file_that_is_no_workflow_is_refused(write: Write, text: str) -> None:
    with pytest.raises(WorkflowError, match=r"flow\.yaml"):
        run(write(text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"Can't read the workflow .*nothing\.yaml"):
        run(tmp_path / "nothing.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_bytes(b"GGUF\x00\xff\xfe\x03")
    with pytest.raises(WorkflowError, match=r"flow\.yaml"):
        run(path)


@pytest.mark.parametrize("workflow", [None, 3, b"flow.yaml", ["nodes"]])
def test_what_is_neither_a_path_nor_a_dict_is_refused(workflow: Any) -> None:
    with pytest.raises(WorkflowError, match="give the path of a workflow file, or a dict"):
        run(workflow)


def test_a_gguf_that_is_no_path_is_refused() -> None:
    with pytest.raises(SettingsError, match="give the path of a file"):
        run({"nodes": [{"name": "a"}]}, gguf=3)


def test_a_mistake_in_a_dict_says_where_it_is() -> None:
    with pytest.raises(WorkflowError, match=r"nodes\[0\]\.usess: unknown key"):
        run({"nodes": [{"name": "a", "usess": "llm.call"}]})


def test_an_unknown_settings_key_is_found_with_its_line(write: Write) -> None:
    with pytest.raises(SettingsError, match=r"flow\.yaml.*modl_path.*line 4.*'model_path'"):
        run(write("nodes:\n  - name: a\nsettings: {llm: {\n  modl_path: x}}\n"))


def test_anchors_and_merge_keys_work(write: Write) -> None:
    text = """
nodes:
  - &base
    name: a
    uses: llm.call
    with: {prompt: one}
    output: {x: content}
  - <<: *base
    name: b
    output: {y: content}
"""
    assert run(write(text)) == {"x": "ONE", "y": "ONE"}


def test_an_alias_bomb_is_no_work(write: Write) -> None:
    levels = "".join(f"  l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 30))
    started = time.monotonic()
    with pytest.raises(WorkflowError, match="spells out to"):
        run(write(f"variables:\n  l0: &l0 [a]\n{levels}nodes: [{{name: a}}]\n"))
    assert time.monotonic() - started < 5


def test_the_edge_agents_own_keys_are_a_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tea_llm"):
        run(write("imports: [{package: tea_llm}]\nconfig: {raise_exceptions: true}\nnodes:\n  - name: a\n"))
    assert "'imports'" in caplog.text
    assert "'config'" in caplog.text

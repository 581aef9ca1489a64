"""What an answer has to be: schemas, regular expressions, choices, grammars; on models whose weights mean nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import llguidance
import pydantic
import pytest

from tea_llm import (
    ApiLlmBackend,
    BadRequest,
    EngineFault,
    GrammarError,
    LlmCallParams,
    LlmError,
    LocalLlmBackend,
    register_actions,
)
from tea_llm.constraint import constraint_of

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Grammar, Model, Sampler

from .api_server import chat
from .generating import together
from .random_models import write_random

pytestmark = pytest.mark.usefixtures("bare_environment")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
TIME = r"\d\d:\d\d:[0-5]\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)"
DIGITS = frozenset("0123456789")


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random("gpt2", tmp_path_factory.mktemp("random") / "random.gguf", n_ctx=2048)


@pytest.fixture(scope="module")
def model(random_path) -> Model:
    return Model(random_path)


@pytest.fixture(scope="module")
def backend(random_path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(random_path, n_threads=1) as backend:
        yield backend


def hot(seed: int, **fields: Any) -> LlmCallParams:
    """A request at a temperature at which random weights say anything they are allowed to."""
    return LlmCallParams("x", temperature=1.5, seed=seed, max_tokens=300, **fields)


def source(**fields: Any) -> tuple[str, str]:
    constraint = constraint_of(LlmCallParams("x", **fields))
    assert constraint is not None
    return constraint.kind, constraint.source


# --- schemas ----------------------------------------------------------------------------------------------------------
def suite_groups(shared_models: Path) -> Iterator[tuple[str, Any, list[Any]]]:
    """A name, a schema, and its tests, of the official suite for draft 2020-12."""
    folder = shared_models.parent / "json-schema-test-suite" / "draft2020-12"
    if not folder.is_dir():
        pytest.skip(f"no JSON Schema Test Suite at {folder}")
    for path in sorted(folder.glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            yield f"{path.stem}: {group['description']}", group["schema"], group["tests"]


class Bytes:
    """A vocabulary of the 256 bytes and an end, as llguidance's Python side takes it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def test_the_suites_invalid_instances_can_not_be_written_and_its_schemas_are_enforced_or_refused(shared_models):
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    enforced, written, refused = 0, [], set()
    for name, schema, tests in suite_groups(shared_models):
        try:
            _, text = source(schema=schema)
        except BadRequest:  # False
            continue
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            refused.add(re.sub(r"[\"'\[/].*", "", matcher.get_error().splitlines()[0]))
            continue
        enforced += 1
        for test, ascii_only in itertools.product(tests, (True, False)):
            instance = json.dumps(test["data"], ensure_ascii=ascii_only)
            matcher.reset()
            if matcher.consume_tokens(list(instance.encode())) and matcher.is_accepting() and not test["valid"]:
                written.append((name, test["description"], instance))
            matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    assert written == []
    assert enforced > 160
    assert {words.split(":")[0].strip() for words in refused} == {
        "Unimplemented keys", "Unknown format", "Unsatisfiable schema", "Resource", "Expected positive integer for",
        "oneOf constraints are not supported. Enable", "patternProperty regexes",
    }  # fmt: skip


def test_what_a_model_writes_at_random_fulfils_the_suites_schemas(shared_models, model):
    context = Context(model, n_ctx=8192, n_seq_max=16, n_kept_max=0)
    begun = []
    for i, (name, schema, _) in enumerate(suite_groups(shared_models)):
        try:
            grammar = Grammar(model, *source(schema=schema))
        except BadRequest:
            continue
        sampler = Sampler(model, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=i, grammar=grammar)
        begun.append((name, schema, Generation(context, sampler, [1], max_tokens=80)))
    n_whole = 0
    for at in range(0, len(begun), 16):
        batch = begun[at : at + 16]
        texts = together(context, [generation for _, _, generation in batch])
        for (name, schema, generation), text in zip(batch, texts, strict=True):
            if generation.finish_reason == "stop":
                n_whole += 1
                check = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
                with contextlib.suppress(re.error):  # \\p{Letter} is none of Python's
                    assert check.is_valid(json.loads(text)), (name, schema, text)
    assert n_whole > len(begun) / 2


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_by_a_schema_is_parsed(backend, seed):
    result = backend.call(hot(seed, schema=PERSON))
    assert result.finish_reason == "stop"
    assert result.parsed == json.loads(result.content)
    assert result.parse_error is None
    jsonschema.validate(result.parsed, PERSON)


@pytest.mark.parametrize(
    ("schema", "is_right"),
    [
        ({"type": "integer", "minimum": 17, "maximum": 19}, lambda v: v in (17, 18, 19)),
        ({"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 1}, lambda v: v in (-2, -1, 0)),
        ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 30}, lambda v: v in (7, 14, 21, 28)),
        ({"type": "number", "minimum": 0.25, "maximum": 0.5}, lambda v: 0.25 <= v <= 0.5),
        ({"enum": ["red", 2, None, {"a": [True]}]}, lambda v: v in ("red", 2, None, {"a": [True]})),
        ({"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, lambda v: re.fullmatch("[A-Z]{2}[0-9]{3}", v)),
        ({"type": "string", "pattern": r"^\\\d[\w\]-]\w$"}, lambda v: re.fullmatch(r"\\\d[\w\]-]\w", v, re.ASCII)),
        ({"patternProperties": {r"^\d$": {}}, "type": "object", "additionalProperties": False}, DIGITS.issuperset),
        ({"type": "string", "format": "time"}, lambda v: re.fullmatch(TIME, v)),
        ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d{2}-\d{2}", v)),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}, lambda v: len(v) in (2, 3)),
        (True, lambda v: True),
    ],
)
def test_bounds_and_patterns_hold(backend, schema, is_right):
    results = [backend.call(hot(seed, schema=schema)) for seed in range(8)]
    whole = [result for result in results if result.finish_reason == "stop"]
    assert whole
    assert all(is_right(result.parsed) for result in whole)


def test_each_way_to_ask_for_json_gives_parsed_json(backend):
    named = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    by_server = {"type": "json_object", "schema": PERSON}
    for fields in ({"response_format": named}, {"response_format": by_server}, {"extra": {"response_format": named}}):
        result = backend.call(hot(1, **fields))
        jsonschema.validate(result.parsed, PERSON)
    anything = [backend.call(hot(seed, response_format={"type": "json_object"})) for seed in range(10)]
    assert all(isinstance(result.parsed, dict) for result in anything if result.finish_reason == "stop")
    assert any(result.finish_reason == "stop" for result in anything)
    assert backend.call(LlmCallParams("x", max_tokens=3, response_format={"type": "text"})).parsed is None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shirt(pydantic.BaseModel):
    size: Literal["S", "M", "L"]
    colour: Colour
    price: float = pydantic.Field(ge=1, le=2)
    tags: list[Colour] = pydantic.Field(max_length=2)


@dataclasses.dataclass
class Point:
    x: int
    y: int


def test_a_type_is_a_schema_and_its_instance_is_what_is_parsed(backend):
    shirts = [backend.call(hot(seed, schema=Shirt)) for seed in range(5)]
    assert any(result.finish_reason == "stop" for result in shirts)
    assert all(isinstance(result.parsed, Shirt) for result in shirts if result.finish_reason == "stop")
    points = [backend.call(hot(seed, schema=Point)) for seed in range(5)]
    assert any(isinstance(result.parsed, Point) for result in points)
    assert isinstance(backend.call(hot(1, schema=Colour)).parsed, Colour)
    flags = [backend.call(hot(seed, schema=list[bool])).parsed for seed in range(9)]
    assert any(isinstance(parsed, list) for parsed in flags)


def test_the_properties_of_a_type_are_the_only_ones():
    _, text = source(schema=Point)
    assert json.loads(text)["additionalProperties"] is False
    _, text = source(schema={"type": "object", "properties": {"x": {}}})
    assert "additionalProperties" not in json.loads(text)


@pytest.mark.parametrize("name", ["const", "default", "enum", "examples", "pattern", "format", "properties"])
def test_a_property_may_have_the_name_of_a_keyword(name):
    schema = {"type": "object", "properties": {name: {"type": "string", "pattern": r"^\d$"}}}
    _, text = source(schema=schema)
    assert json.loads(text)["properties"] == {name: {"type": "string", "pattern": "^[0-9]$"}}
    with pytest.raises(BadRequest, match="multipleOf"):
        source(schema={"type": "object", "properties": {name: {"multipleOf": 0.01}}})


def test_a_type_may_have_a_field_named_properties():
    feature = dataclasses.make_dataclass("Feature", [("kind", str), ("properties", dict[str, int])])
    _, text = source(schema=feature)
    assert json.loads(text)["properties"].keys() == {"kind", "properties"}


def test_a_cut_answer_says_so_and_is_not_parsed(backend):
    schema = {"type": "array", "items": {"const": 11}, "minItems": 50}
    result = backend.call(dataclasses.replace(hot(1, schema=schema), max_tokens=9))
    assert (result.finish_reason, result.parsed) == ("length", None)
    assert "ended with 'length'" in result.parse_error
    result = backend.call(hot(1, schema=schema, stop="1,"))
    assert (result.finish_reason, result.parsed) == ("stop", None)
    assert "stop string" in result.parse_error
    result = backend.call(hot(1, schema={"const": 1203}, stop="3"))
    assert (result.content, result.finish_reason, result.parsed) == ("120", "stop", None)
    assert "stop string" in result.parse_error


def test_an_answer_that_can_only_end_ends_without_another_token(backend):
    request = LlmCallParams("x", temperature=0, schema={"const": "ab"}, max_tokens=50)
    result = backend.call(request)
    assert (result.content, result.finish_reason) == ('"ab"', "stop")
    exactly = backend.call(dataclasses.replace(request, max_tokens=result.usage.completion_tokens))
    assert (exactly.content, exactly.finish_reason, exactly.parsed) == ('"ab"', "stop", "ab")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "format": "idn-email"}, "idn-email"),
        ({"type": "string", "pattern": "(?=a)b"}, "look"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "strnig"}, "strnig"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum|maximum"),
        ({"enum": []}, "empty"),
        (False, "False"),
        ({"const": float("nan")}, "JSON"),
        ({"const": {1, 2}}, "JSON"),
        (lambda v: v, "a function"),
        (object(), "pydantic"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf: 0.01"),
        ("text", "schema is 'text'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_can_not_be_enforced_is_refused_by_name(backend, schema, words):
    with pytest.raises(BadRequest, match=words):
        backend.call(hot(1, schema=schema))


def test_strict_false_ignores_what_can_not_be_enforced(backend):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 1, "maxItems": 2}
    assert isinstance(backend.call(hot(1, schema=schema, strict=False)).parsed, list)
    inner = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
    assert isinstance(backend.call(hot(1, response_format=inner)).parsed, list)
    with pytest.raises(GrammarError, match="strict: false"):
        backend.call(hot(1, schema=schema))


# --- the other ways ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-z]+!", r"(yes|no), (é|😀)", r"\d{1,2}:\d{2}", "", r"a/b\n"])
def test_a_regular_expression_is_the_whole_answer(backend, pattern):
    for seed in range(5):
        result = backend.call(hot(seed, regex=pattern))
        assert result.finish_reason == "length" or re.fullmatch(pattern, result.content)
        assert result.parsed is None


ODD_CHOICES = [*"( ", "no", "no!", "a/b", "a\nb", "[x]{2}", "^$", "\\", "\"'", "é😀", "#&-~", "\0", "", "\u2028"]


def test_an_answer_is_one_of_the_choices(backend):
    for choice in ODD_CHOICES:
        assert backend.call(hot(1, choices=[choice])).content == choice
    said = {backend.call(hot(seed, choices=ODD_CHOICES)).content for seed in range(40)}
    assert said <= set(ODD_CHOICES)
    assert len(said) > 3
    numbers = [f"item {i} of all" for i in range(20_000)]
    assert backend.call(hot(1, choices=numbers)).content in numbers


def test_a_model_decides_between_choices(scripted_backend):
    request = LlmCallParams("count", temperature=0, choices=[" two", " one", " cat"])
    assert scripted_backend.call(request).content == " one"


@pytest.fixture(scope="module")
def scripted_backend(shared_models) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(shared_models / "scripted-f16.gguf", n_threads=1) as backend:
        yield backend


def test_constraint_and_bias_that_leave_nothing_are_an_error(backend, model):
    forbidden: dict[int | str, float] = dict.fromkeys(range(model.n_vocab), float("-inf"))
    for temperature in (0, 1):
        for fields in ({"schema": PERSON}, {"regex": "a"}, {"grammar": 'root ::= "a"'}):
            with pytest.raises(BadRequest, match="leave no token"):
                backend.call(LlmCallParams("x", temperature=temperature, logit_bias=forbidden, **fields))


def test_two_ways_at_once_are_refused():
    with pytest.raises(BadRequest, match="schema and regex"):
        LlmCallParams("x", schema=PERSON, regex="a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?<=a)b"}, "look"),
        ({"regex": r"(a)\1"}, "backreference"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"regex": 3}, "regex is 3"),
        ({"choices": []}, "choices"),
        ({"choices": "yes"}, "choices"),
        ({"response_format": {"type": "yaml"}}, "yaml"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": "json_object"}, "response_format"),
        ({"strict": "no"}, "strict"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_constraint_is_refused(backend, fields, words):
    with pytest.raises(BadRequest, match=words):
        backend.call(hot(1, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(" * 100_000},
        {"regex": "(" * 2000 + ")" * 2000},
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "(a|b)*a(a|b){100000}"},
        {"regex": "a" * 3_000_000},
        {"schema": {"type": "string", "minLength": 10**9}},
        {"schema": {"type": "string", "maxLength": 10**18}},
        {"schema": {"type": "integer", "minimum": -(10**400), "maximum": 10**400}},
        {"schema": {"type": "number", "multipleOf": 1e-300}},
        {"schema": {"type": "number", "multipleOf": 0}},
        {"schema": {"type": "array", "minItems": 10**7}},
        {"schema": {"type": "array", "items": {"$ref": "#"}}},
        {"schema": {"$ref": "#"}},
        {"schema": {"allOf": [{"$ref": "#"}]}},
        {"schema": {"properties": {"a" * 100_000: {"const": "b" * 100_000}}}},
        {"schema": {"x-guidance": {"whitespace_pattern": "("}}},
        {"schema": {"x-guidance": 3}},
        {"schema": {"enum": list(range(50_000))}},
        {"schema": {"pattern": "(" * 100_000}},
        {"schema": {"type": "string", "pattern": "\ud800"}},
        {"schema": {"patternProperties": {"(": {}}}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_constraint_ends_in_an_answer_or_an_error(backend, fields):
    with contextlib.suppress(LlmError):
        result = backend.call(LlmCallParams("x", temperature=1.5, seed=1, max_tokens=8, timeout_s=60, **fields))
        assert result.finish_reason in ("stop", "length")
    assert backend.call(LlmCallParams("x", choices=["a"])).content == "a"


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('root ::= "x"{19,5}', "at least more than at most"),
        ("root ::= a0\n" + "\n".join(f'a{i} ::= a{i + 1} a{i + 1} | "x"' for i in range(30)) + '\na30 ::= ""', "ways"),
        ("root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1} | a{i + 1}" for i in range(40)) + '\na40 ::= "y"', "ways"),
        ("root ::= " + " | ".join(f'"w{i}"' for i in range(50_000)), "ways"),
    ],
    ids=["reversed", "exponential", "diamonds", "alternatives"],
)
def test_a_grammar_that_llama_cpp_would_not_come_back_from_is_refused(backend, grammar, words):
    with pytest.raises(GrammarError, match=words):
        backend.call(hot(1, grammar=grammar))


def test_a_grammar_that_becomes_too_ambiguous_ends_its_text(backend):
    grammar = "root ::= x\nx ::= " + " | ".join(f'"a" x y{i}' for i in range(5)) + ' | "b"\n'
    grammar += "\n".join(f'y{i} ::= "{i}"' for i in range(5))
    with pytest.raises(EngineFault, match="too many ways"):
        backend.call(LlmCallParams("x", temperature=0, grammar=grammar, logit_bias={b"a"[0] + 3: 50.0}, max_tokens=50))
    assert backend.call(LlmCallParams("x", choices=["a"])).content == "a"


def test_a_schema_nested_too_deep_is_refused(backend):
    schema: Any = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(BadRequest, match="nested"):
        backend.call(hot(1, schema=schema))
    itself: dict[str, Any] = {}
    itself["items"] = itself
    with pytest.raises(BadRequest, match="nested"):
        backend.call(hot(1, schema=itself))


# --- many at once -----------------------------------------------------------------------------------------------------
def test_texts_side_by_side_each_follow_their_own(backend):
    forms: list[dict[str, Any]] = [
        {"schema": PERSON}, {"regex": "[0-9]+x"}, {"choices": ["a", "b"]}, {"grammar": 'root ::= "q" [0-9]'}
    ]  # fmt: skip
    requests = [hot(seed, **forms[seed % 4]) for seed in range(24)]
    alone = [backend.call(request).content for request in requests]

    async def together_() -> list[str]:
        return [r.content for r in await asyncio.gather(*(backend.acall(request) for request in requests))]

    assert asyncio.run(together_()) == alone


def test_the_same_text_comes_with_and_without_guesses(shared_models):
    path = shared_models / "stories260K-f32.gguf"
    request = LlmCallParams("Once upon a time", temperature=0, max_tokens=60, schema=PERSON)
    with LocalLlmBackend(path, n_threads=1) as plain:
        expected = plain.call(request).content
    with LocalLlmBackend(path, n_threads=1, draft_model_path=path) as drafted:
        guessed = drafted.call(request)
        assert guessed.content == expected
        assert guessed.timings.draft_tokens > 0


def test_a_grammar_is_read_by_many_threads_at_once(random_path):
    model, made, failed = Model(random_path), [], []

    def make(i: int) -> None:
        try:
            made.append(Grammar(model, "json_schema", json.dumps({"const": i})))
        except Exception as exc:  # noqa: BLE001
            failed.append(exc)

    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), failed) == (8, [])


def test_a_grammar_of_another_model_is_refused(model, random_path):
    with pytest.raises(BadRequest, match="another Model"):
        Sampler(Model(random_path), grammar=Grammar(model, "regex", "a"))


def test_a_sampler_that_is_reset_begins_its_grammar_again(model):
    sampler = Sampler(model, temperature=0, grammar=Grammar(model, "regex", "ab"))
    context = Context(model)
    for _ in range(2):
        assert Generation(context, sampler, [1]).run() == "ab"
        sampler.reset()


def test_a_lazy_grammar_binds_from_its_trigger_on(model):
    grammar = Grammar(model, "gbnf", 'root ::= "<call>" [0-9] "</call>"', triggers=[("word", "<call>")])
    bound = Sampler(model, temperature=0, grammar=grammar, logit_bias={byte + 3: 50.0 for byte in b"<"})
    text = Generation(Context(model), bound, [1], max_tokens=12).run()
    assert text == "<" * 12  # nothing has begun
    free = Grammar(model, "gbnf", 'root ::= "<" [0-9] ">"', triggers=[("pattern", r"[\s\S]*?(<)")])
    bound = Sampler(model, temperature=0, grammar=free, logit_bias={byte + 3: 50.0 for byte in b"<"})
    text = Generation(Context(model), bound, [1], max_tokens=12).run()
    assert re.match(r"<[0-9]>", text)
    by_token = Grammar(model, "gbnf", 'root ::= "<" [0-9] ">"', triggers=[("token", b"<"[0] + 3)])
    bound = Sampler(model, temperature=0, grammar=by_token, logit_bias={byte + 3: 50.0 for byte in b"<"})
    assert re.match(r"<[0-9]>", Generation(Context(model), bound, [1], max_tokens=12).run())


def test_a_grammar_is_read_beside_the_event_loop(random_path, model):
    grammar = "\n".join(f"r{i} ::= [a-z]? r{i + 1}" for i in range(900)) + '\nr900 ::= "a"\nroot ::= r0'
    begin = time.perf_counter()
    Grammar(model, "gbnf", grammar)
    whole_s = time.perf_counter() - begin

    async def longest_block_s() -> float:
        longest, last = 0.0, time.perf_counter()
        call = asyncio.ensure_future(backend.acall(LlmCallParams("x", grammar=grammar, max_tokens=0)))
        while not call.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        await call
        return longest

    with LocalLlmBackend(random_path, n_threads=1) as backend:
        assert asyncio.run(longest_block_s()) < 0.5 * whole_s


def test_a_form_that_nothing_has_is_refused_when_it_is_read(model):
    for kind, text in [("json_schema", '{"$ref": "#"}'), ("regex", r"[^\x00-\x{10FFFF}]")]:
        with pytest.raises(GrammarError, match="nothing fulfils it"):
            Grammar(model, kind, text)


# --- workflows and APIs -----------------------------------------------------------------------------------------------
def test_an_action_gives_what_was_parsed(random_path):
    actions: dict[str, Any] = {}
    register_actions(actions)
    said = {"prompt": "x", "backend": "local", "model_path": str(random_path), "temperature": 0}
    result = actions["llm.call"](state={}, **said, schema=PERSON, max_tokens=300)
    assert result["parsed"] == json.loads(result["content"])
    assert actions["llm.call"](state={}, **said, choices=["a", "b"])["content"] in ("a", "b")
    cut = actions["llm.call"](state={}, **said, schema=PERSON, max_tokens=2)
    assert cut["parsed"] is None
    assert "length" in cut["parse_error"]


def test_a_schema_goes_to_an_api_in_its_own_terms(server):
    server.replies = [chat('{"name": "Ann", "age": 7}'), chat("no JSON"), chat('{"name": "Ann"}')]
    forms: list[dict[str, Any]] = [{"schema": PERSON}, {"response_format": {"type": "json_object"}}, {"schema": Point}]
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        person, no_json, no_point = [backend.call(LlmCallParams("x", **form)) for form in forms]
    sent = [seen.body["response_format"] for seen in server.seen]
    assert sent[0] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": PERSON, "strict": True},
    }
    assert sent[1] == {"type": "json_object"}
    assert sent[2]["json_schema"]["schema"]["properties"].keys() == {"x", "y"}
    assert (person.parsed, person.parse_error) == ({"name": "Ann", "age": 7}, None)
    assert (no_json.parsed, no_json.content) == (None, "no JSON")
    assert "not what was asked for" in no_json.parse_error
    assert "Point" in no_point.parse_error


def test_json_too_deep_to_be_read_says_so(server):
    server.replies = [chat("[" * 100_000 + "]" * 100_000)]
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        result = backend.call(LlmCallParams("x", schema={"type": "array"}))
    assert result.parsed is None
    assert "not what was asked for" in result.parse_error


@pytest.mark.parametrize("fields", [{"regex": "a"}, {"choices": ["a"]}])
def test_what_no_api_knows_is_refused_by_name(server, fields):
    with (
        ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend,
        pytest.raises(BadRequest, match=next(iter(fields))),
    ):
        backend.call(LlmCallParams("x", **fields))
    assert server.seen == []

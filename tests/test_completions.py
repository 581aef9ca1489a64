"""Several texts of one prompt, how likely their tokens were, and texts between two others."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tea_llm import (
    ApiLlmBackend,
    BadRequest,
    ContextOverflow,
    LlmCallParams,
    TokenLogprob,
    TopLogprob,
    register_actions,
)

from .api_server import ApiServer, delta, json_reply, sse, stream
from .conftest import serving
from .random_models import write_random

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm import LocalLlmBackend
from tea_llm._llama import Context, Generation, Model, Sampler
from tea_llm.engine import Infill, _infill_tokens

HELLO = [{"role": "user", "content": "Hello!"}]
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with Tom."
MARKS = ("pre", "suf", "mid", "rep", "sep")


@pytest.fixture(scope="module")
def chat_model(shared_models: Path) -> Path:
    return shared_models / "stories260K-chat-q8_0.gguf"


@pytest.fixture(scope="module")
def local(chat_model: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(chat_model, n_threads=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def scripted_backend(shared_models: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(shared_models / "scripted-f16.gguf", n_threads=1) as backend:
        yield backend


@pytest.fixture
def over_api(llama_server: str) -> Iterator[ApiLlmBackend]:
    with ApiLlmBackend({"llm": {"api_base": llama_server, "timeout": 60}}) as backend:
        yield backend


def text_of(logprobs: Any) -> bytes:
    return b"".join(token.bytes for token in logprobs)


# --- logprobs ---------------------------------------------------------------------------------------------------------
def test_logprobs_are_those_of_a_hand_calculation(scripted_backend, scripted):
    # RMSNorm makes a one-hot vector of length 448 into sqrt(448); the output matrix doubles it; all others are 0
    likely = -math.log(1 + (scripted.n_vocab - 1) * math.exp(-2 * math.sqrt(448)))
    result = scripted_backend.call(LlmCallParams("count", 3, 0.0, logprobs=True, top_logprobs=2))
    assert result.logprobs is not None
    assert [token.token for token in result.logprobs] == [" one", " two", " three"]
    for token in result.logprobs:
        assert token.logprob == pytest.approx(likely, abs=1e-6)
        assert token.top_logprobs[0] == TopLogprob(token.token, token.bytes, token.logprob)
        assert token.top_logprobs[1].logprob == pytest.approx(likely - 2 * math.sqrt(448), abs=0.1)  # F16


def test_logprobs_are_of_the_model_and_not_of_the_samplers(scripted_backend, scripted):
    two = scripted.tokenize(" two", add_special=False)[-1]
    forced = scripted_backend.call(LlmCallParams("count", 1, 0.0, logprobs=True, logit_bias={two: 100.0}))
    (token,) = forced.logprobs
    assert (token.token, token.top_logprobs) == (" two", ())
    assert token.logprob == pytest.approx(-2 * math.sqrt(448), abs=0.1)  # F16
    held = scripted_backend.call(LlmCallParams("count", 9, 0.0, logprobs=True, grammar='root ::= " two"'))
    assert held.content == " two"
    assert [t.logprob for t in held.logprobs] == pytest.approx([-2 * math.sqrt(448)] * len(held.logprobs), abs=0.1)


def test_without_logprobs_there_are_none(local):
    assert local.call(LlmCallParams("Once", 3, 0.0)).logprobs is None


def test_logprobs_are_those_of_llama_server(local, over_api):
    said = {"max_tokens": 30, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
    ours, theirs = (backend.chat(HELLO, **said) for backend in (local, over_api))
    assert ours.content == theirs.content
    n = len(ours.logprobs)
    assert n == ours.usage.completion_tokens
    assert [t.bytes for t in ours.logprobs] == [t.bytes for t in theirs.logprobs][:n]
    for token, other in zip(ours.logprobs, theirs.logprobs, strict=False):
        assert isinstance(other, TokenLogprob)
        assert token.logprob == pytest.approx(other.logprob, abs=0.05)  # the attention's last bits, rounded to 8 bits
        assert token.top_logprobs[0].bytes == other.top_logprobs[0].bytes
        assert token.top_logprobs[0].logprob == pytest.approx(other.top_logprobs[0].logprob, abs=0.05)


@pytest.mark.parametrize("stop", ["park", "a big", "little girl", "ily"])
def test_logprobs_are_as_long_as_the_text(local, stop):
    whole = local.call(LlmCallParams(STORY[:40], 60, 0.0, logprobs=True))
    assert text_of(whole.logprobs).decode() == whole.content
    cut = local.call(LlmCallParams(STORY[:40], 60, 0.0, stop, logprobs=True))
    n = len(cut.logprobs)
    assert cut.logprobs == whole.logprobs[:n]
    told = text_of(cut.logprobs).decode()
    assert told.startswith(cut.content)
    assert n == 0 or len(text_of(cut.logprobs[:-1]).decode("utf-8", "ignore")) < len(cut.content) or told == cut.content


def test_a_stop_string_takes_its_tokens_logprobs_with_it(scripted_backend):
    result = scripted_backend.call(LlmCallParams("count", 9, 0.0, [" three four"], logprobs=True))
    assert result.content == " one two"
    assert [token.token for token in result.logprobs] == [" one", " two"]
    result = scripted_backend.call(LlmCallParams("count", 9, 0.0, ["wo three"], logprobs=True))
    assert result.content == " one t"  # the token that is in the text by half stays
    assert [token.token for token in result.logprobs] == [" one", " two"]


def test_the_bytes_of_a_token_say_what_is_no_whole_character(tmp_path):
    model = write_random("gpt2", tmp_path / "bytes.gguf")
    euro = [3 + byte for byte in "€".encode()]  # tokens of single bytes
    with LocalLlmBackend(model, n_threads=1) as backend:
        forced = dict.fromkeys(euro, 1e9)
        result = backend.call(LlmCallParams("ab", 6, 1.0, seed=3, logit_bias=forced, logprobs=True, top_logprobs=1))
    assert {token.bytes for token in result.logprobs} <= {bytes([byte]) for byte in "€".encode()}
    assert {token.token for token in result.logprobs} == {"\ufffd"}
    assert all(len(token.top_logprobs) == 1 for token in result.logprobs)


def test_logprobs_are_the_same_alone_beside_others_and_in_a_stream(local):
    params = [LlmCallParams(STORY[:n], 20, 0.8, seed=n, logprobs=True, top_logprobs=3) for n in (20, 40, 60, 80)]
    alone = [local.call(p) for p in params]

    async def together():
        return await asyncio.gather(*(local.acall(p) for p in params))

    assert [r.logprobs for r in asyncio.run(together())] == [r.logprobs for r in alone]
    with local.stream(params[0]) as chunks:
        assert "".join(chunks) == alone[0].content
    assert chunks.result.logprobs == alone[0].logprobs


def test_guesses_change_no_logprob(shared_models):
    model = Model(shared_models / "stories260K-q8_0.gguf")
    told = []
    for draft in (None, model):
        context = Context(model, draft=draft)
        text = Generation(context, Sampler(model, seed=5), model.tokenize(STORY), max_tokens=40, logprobs=4)
        content = text.run()
        told.append((content, text.take_logprobs()))
    assert text.n_accepted > 5
    assert told[0] == told[1]
    assert len(told[0][1]) == 40 * 5 * 8


def test_a_text_that_was_cancelled_has_the_logprobs_of_what_it_says(local):
    stream = local.stream(LlmCallParams("Once", None, 0.8, logprobs=True, ignore_eos=True))
    for i, _ in enumerate(stream):
        if i == 5:
            stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert text_of(stream.result.logprobs).decode().startswith(stream.result.content)


def test_logprobs_of_a_stream_over_an_api_are_joined(server: ApiServer):
    def event(text: str, logprob: float) -> dict[str, Any]:
        told = {"token": text, "bytes": None, "logprob": logprob, "top_logprobs": [
            {"token": "é", "bytes": [195, 169], "logprob": -0.5}]}  # fmt: skip
        event = delta(text)
        event["choices"][0]["logprobs"] = {"content": [told]}
        return event

    server.replies[:] = [stream(sse(event("a", -1.0), event("b", -2.0), delta(None, "stop")))]
    with ApiLlmBackend({"llm": {"api_base": server.base, "api_key": "k"}}) as backend:
        result = backend.stream(LlmCallParams("x", model="m", logprobs=True, top_logprobs=1), lambda _: None)
    top = (TopLogprob("é", "é".encode(), -0.5),)
    assert result.logprobs == (TokenLogprob("a", b"a", -1.0, top), TokenLogprob("b", b"b", -2.0, top))
    assert (server.seen[0].body["logprobs"], server.seen[0].body["top_logprobs"]) == (True, 1)


# --- several texts ----------------------------------------------------------------------------------------------------
def test_several_texts_count_their_prompt_once_and_say_their_seeds(local):
    result = local.call(LlmCallParams(STORY, 12, 2.0, seed=2**32 - 4, n=5, top_k=0))
    seeds = [text.seed for text in result.completions]
    assert seeds == [2**32 - 4, 2**32 - 3, 2**32 - 2, 0, 1]
    assert len({text.content for text in result.completions}) == 5
    assert (result.content, result.timings.seed) == (result.completions[0].content, seeds[0])
    alone = [local.call(LlmCallParams(STORY, 12, 2.0, seed=seed, top_k=0)) for seed in seeds]
    assert [text.content for text in result.completions] == [text.content for text in alone]
    assert result.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert result.usage.completion_tokens == sum(text.usage.completion_tokens for text in alone)
    assert result.tokens_used == result.usage.total_tokens


def test_several_texts_compute_their_prompt_once(shared_models):
    with LocalLlmBackend(shared_models / "stories260K-f32.gguf", n_threads=1, cache_ram_mib=0) as backend:
        engine = backend._open_engine()
        found = []
        generated = type(engine).generate

        def watched(self, request, **how):
            ticket = generated(self, request, **how)
            found.append(ticket)
            return ticket

        type(engine).generate = watched
        try:
            result = backend.call(LlmCallParams(STORY * 2, 4, 1.0, n=6))
        finally:
            type(engine).generate = generated
    cached = [ticket.outcome.timings.cached_tokens for ticket in found]
    n_prompt = result.usage.prompt_tokens
    assert cached[0] == 0
    assert all(n >= n_prompt - 1 for n in cached[1:])


def test_several_texts_without_a_seed_differ_and_at_temperature_0_do_not(local):
    result = local.call(LlmCallParams("Once upon a time", 20, 3.0, n=3, samplers="t"))
    assert len({text.seed for text in result.completions}) == 3
    assert len({text.content for text in result.completions}) == 3
    same = local.chat(HELLO, max_tokens=20, temperature=0.0, n=3, logprobs=True)
    assert [text.content for text in same.completions] == [same.content] * 3
    assert [text.logprobs for text in same.completions] == [same.logprobs] * 3


def test_one_text_has_no_completions(local):
    assert local.call(LlmCallParams("Once", 3)).completions == ()


def test_more_texts_than_places_wait_for_their_turn(chat_model):
    with LocalLlmBackend(chat_model, n_threads=1, n_parallel=2) as backend:
        result = asyncio.run(backend.acall(LlmCallParams("Once upon a time", 5, 1.0, n=20, ignore_eos=True)))
    assert [text.finish_reason for text in result.completions] == ["length"] * 20
    assert result.usage.completion_tokens == 100


def test_an_error_of_several_texts_is_raised_once_and_leaves_none_behind(local):
    nothing = dict.fromkeys(range(local._open_engine().model.n_vocab), float("-inf"))
    with pytest.raises(BadRequest, match="no token"):
        local.call(LlmCallParams("Once", 30, 1.0, n=4, logit_bias=nothing))
    with pytest.raises(ContextOverflow):
        local.call(LlmCallParams("Once " * 5000, 30, 1.0, n=4))
    assert not local._open_engine()._live
    assert local.call(LlmCallParams("Once", 3, 0.0)).content


def test_a_task_that_is_cancelled_ends_all_its_texts(local):
    async def left() -> None:
        asked = asyncio.create_task(local.acall(LlmCallParams("Once", None, 1.0, n=6, ignore_eos=True)))
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(left())
    answered = threading.Event()
    threading.Thread(target=lambda: (local.call(LlmCallParams("Once", 1)), answered.set())).start()
    assert answered.wait(20)
    assert not local._open_engine()._live


def test_a_stream_is_one_text(local, over_api):
    for backend in (local, over_api):
        with pytest.raises(BadRequest, match="n is 2"):
            backend.stream(LlmCallParams("Once", n=2))
        with pytest.raises(BadRequest, match="n is 2"):
            backend.stream(LlmCallParams("Once", n=2), lambda _: None)


def test_a_server_gives_several_texts_too(chat_model):
    with serving(chat_model, 2048, 512, 4) as address, ApiLlmBackend({"llm": {"api_base": f"{address}/v1"}}) as backend:
        result = backend.chat(HELLO, max_tokens=8, temperature=1.5, n=3, seed=1, logprobs=True)
    assert len(result.completions) == 3
    assert result.completions[0].content == result.content
    for text in result.completions:
        assert text.finish_reason
        assert text_of(text.logprobs).decode("utf-8", "replace").startswith(text.content)


def test_a_server_that_gives_fewer_texts_is_told_of(server, caplog):
    with ApiLlmBackend({"llm": {"api_base": server.base, "api_key": "k"}}) as backend:
        result = backend.call(LlmCallParams("x", model="m", n=2))
    assert server.seen[0].body["n"] == 2
    assert result.completions == ()
    assert "n is 2" in caplog.text


def test_ignore_eos_keeps_a_text_from_ending(local):
    ends, goes_on = (local.chat(HELLO, max_tokens=100, temperature=0.0, ignore_eos=said) for said in (None, True))
    assert (ends.finish_reason, goes_on.finish_reason) == ("stop", "length")
    assert goes_on.usage.completion_tokens == 100
    assert goes_on.content.startswith(ends.content)


# --- infill -----------------------------------------------------------------------------------------------------------
FILES = [{"filename": "a.py", "text": "bad acid"}, {"text": "efface <s> €"}]


@pytest.mark.parametrize("parts", [MARKS[:3], MARKS[:4], MARKS], ids="+".join)
def test_an_infill_prompt_is_laid_out_as_llama_server_does(tmp_path, parts):
    path = write_random("gpt2", tmp_path / "infill.gguf", n_ctx=4096, infill=parts)
    model = Model(path)
    with serving(path, 4096, 512) as address:
        for files in ((), FILES):
            asked = {"input_prefix": "abacus <s> ", "input_suffix": " end of it", "input_extra": list(files),
                     "n_predict": 1, "cache_prompt": False}  # fmt: skip
            reply = httpx.post(f"{address}/infill", json=asked, timeout=60).json()
            tokens = _infill_tokens(model, "abacus <s> ", Infill(" end of it", files), None)
            assert reply["tokens_evaluated"] == len(tokens), reply["prompt"]
            assert reply["prompt"] == model.detokenize(tokens, unparse_special=True)


def test_an_infill_of_a_local_model_is_generated(tmp_path):
    path = write_random("gpt2", tmp_path / "infill.gguf", infill=MARKS)
    model = Model(path)
    with LocalLlmBackend(path, n_threads=1) as backend:
        params = LlmCallParams("abacus", 8, 0.0, suffix="end", input_extra=FILES)
        result = backend.call(params)
    tokens = _infill_tokens(model, "abacus", Infill("end", FILES), None)
    assert result.usage.prompt_tokens == len(tokens)
    assert result.content == Generation(Context(model), Sampler(model, temperature=0), tokens, max_tokens=8).run()


def test_a_model_without_the_tokens_refuses_an_infill(local):
    with pytest.raises(BadRequest, match="no tokens for infill"):
        local.call(LlmCallParams("a", suffix="b"))


def test_an_infill_that_is_too_long_is_an_error_or_cut(tmp_path):
    path = write_random("gpt2", tmp_path / "infill.gguf", n_ctx=128, infill=MARKS)
    long = {"suffix": "bad " * 200, "input_extra": [{"text": "fed " * 200}]}
    with LocalLlmBackend(path, n_threads=1) as backend:
        with pytest.raises(ContextOverflow):
            backend.call(LlmCallParams("ace " * 300, 8, **long))
        result = backend.call(LlmCallParams("ace " * 300, 8, truncate=True, **long))
        assert result.usage.prompt_tokens == 120
        short = backend.call(LlmCallParams("ab", 8, truncate=True, suffix="ac", input_extra=long["input_extra"]))
        assert short.usage.prompt_tokens == 120  # the files are what is cut first


def test_of_an_infill_that_is_cut_the_suffix_keeps_a_quarter_and_its_begin(tmp_path):
    model = Model(write_random("gpt2", tmp_path / "infill.gguf", infill=MARKS[:3]))
    marks = [model.fim_token(part) for part in MARKS[:3]]
    before, after = (model.tokenize(text, add_special=False) for text in ("ace " * 300, "bad " * 300))
    tokens = _infill_tokens(model, "ace " * 300, Infill("bad " * 300), 104)
    assert tokens == [model.bos, marks[0], *before[-75:], marks[1], *after[:25], marks[2]]


def test_an_api_is_asked_for_a_completion_with_the_suffix(server):
    server.replies[:] = [json_reply({"model": "m", "choices": [{"index": 0, "text": "xyz", "finish_reason": "stop"}]})]
    with ApiLlmBackend({"llm": {"api_base": server.base, "api_key": "k"}}) as backend:
        result = backend.call(LlmCallParams("a", 9, model="m", suffix="b"))
        assert result.content == "xyz"
        for more in ({"input_extra": FILES}, {"logprobs": True}):
            with pytest.raises(BadRequest, match=next(iter(more))):
                backend.call(LlmCallParams("a", suffix="b", model="m", **more))
    (seen,) = server.seen
    assert seen.path == "/v1/completions"
    assert seen.body == {"model": "m", "prompt": "a", "suffix": "b", "temperature": 0.7, "max_tokens": 9}


# --- actions ----------------------------------------------------------------------------------------------------------
def test_actions_pass_all_of_it_on_and_give_it_back(chat_model, bare_environment):
    actions: dict[str, Any] = {}
    register_actions(actions)
    said = {"backend": "local", "model": str(chat_model), "max_tokens": 5}
    result = actions["llm.call"](
        state={}, prompt="Once upon a time", n=2, seed=7, logprobs=True, top_logprobs=2, samplers="kt",
        dynatemp_range=0.2, min_keep=1, ignore_eos=True, **said,
    )  # fmt: skip
    assert [text["seed"] for text in result["completions"]] == [7, 8]
    first = result["completions"][0]
    assert (first["content"], first["logprobs"]) == (result["content"], result["logprobs"])
    told = json.loads(json.dumps(result["logprobs"]))["content"]
    assert [set(token) for token in told] == [{"token", "bytes", "logprob", "top_logprobs"}] * 5
    assert bytes(byte for token in told for byte in token["bytes"]).decode() == result["content"]
    for bad in ({"samplers": ["top_q"]}, {"n": 10**9}, {"suffix": "b"}, {"top_logprobs": 99, "logprobs": True}):
        assert actions["llm.call"](state={}, prompt="Once", **said, **bad)["success"] is False

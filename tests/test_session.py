"""Session files: a conversation goes on in another process, and only an intact file of the same model is used."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tea_llm import (
    ApiLlmBackend,
    BadRequest,
    ContextOverflow,
    DeadlineExceeded,
    GrammarError,
    LlmCallParams,
    LocalLlmBackend,
    SessionError,
    run_workflow,
)
from tea_llm.models import model_digest
from tea_llm.session import Origin, Session, SessionFile

from .api_server import ApiServer
from .random_models import N_VOCAB, write_random

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

HELLO = {"role": "user", "content": "Hello!"}
THANKS = {"role": "user", "content": "Thank you!"}
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."

HEAD = struct.Struct("<8sIIQQ32s")
"""The head of a session file, written down once more: magic, version, three sizes, checksum (session.py)."""


@pytest.fixture(scope="module")
def chat_path(shared_models: Path) -> Path:
    return shared_models / "stories260K-chat-q8_0.gguf"


@pytest.fixture(scope="module")
def story_path(shared_models: Path) -> Path:
    return shared_models / "stories260K-f32.gguf"


@pytest.fixture
def chatty(chat_path: Path) -> Iterator[LocalLlmBackend]:
    """A backend that knows no text yet."""
    with LocalLlmBackend(chat_path) as backend:
        yield backend


@pytest.fixture
def stories(story_path: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(story_path) as backend:
        yield backend


@pytest.fixture(scope="module")
def saved(chat_path: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A session of one turn, as it lies in its file."""
    path = tmp_path_factory.mktemp("saved") / "one.session"
    with LocalLlmBackend(chat_path) as backend:
        backend.chat([HELLO], temperature=0, session=path)
    return path.read_bytes()


@pytest.fixture
def session(saved: bytes, tmp_path: Path) -> Path:
    """A file that holds it."""
    path = tmp_path / "talk.session"
    path.write_bytes(saved)
    return path


def in_another_process(model: Path, turns: list[list[dict[str, str]]], session: Path | None) -> list[dict[str, Any]]:
    """What a process that begins with nothing answers to each of `turns`, and how much of each it did not compute."""
    program = """
import json, sys
from tea_llm import LocalLlmBackend
model, turns, session = json.loads(sys.argv[1])
with LocalLlmBackend(model) as backend:
    results = [backend.chat(messages, temperature=0, session=session) for messages in turns]
print(json.dumps([
    {"content": r.content, "cached": r.timings.cached_tokens, "prompt": r.usage.prompt_tokens} for r in results]))
"""
    given = json.dumps([str(model), turns, None if session is None else str(session)])
    answer = subprocess.run([sys.executable, "-c", program, given], capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return found


def with_origin(data: bytes, **changes: str) -> bytes:
    """A session file with another origin, and a checksum that says that it is right."""
    magic, version, n_origin, n_tokens, n_state, _ = HEAD.unpack_from(data)
    body = data[HEAD.size :]
    origin = json.dumps({**json.loads(body[:n_origin]), **changes}).encode()
    return signed((magic, version, len(origin), n_tokens, n_state), origin + body[n_origin:])


def with_state(data: bytes, state: bytes, tokens: list[int] | None = None) -> bytes:
    """A session file with another state, and tokens, and a checksum that says that it is right."""
    magic, version, n_origin, n_tokens, _, _ = HEAD.unpack_from(data)
    tokens_end = n_origin + 4 * n_tokens
    body = data[HEAD.size :]
    told = body[n_origin:tokens_end] if tokens is None else struct.pack(f"<{len(tokens)}i", *tokens)
    return signed((magic, version, n_origin, len(told) // 4, len(state)), body[:n_origin] + told + state)


def signed(head: tuple[Any, ...], body: bytes) -> bytes:
    checksum = hashlib.sha256(HEAD.pack(*head, bytes(32)) + body).digest()
    return HEAD.pack(*head, checksum) + body


# --- goes on ----------------------------------------------------------------------------------------------------------
def test_a_conversation_goes_on_in_another_process(chat_path, tmp_path):
    """Its prompt is not computed again, and it says what one process would have said."""
    session = tmp_path / "talk.session"
    (first,) = in_another_process(chat_path, [[HELLO]], session)
    turns = [[HELLO], [HELLO, {"role": "assistant", "content": first["content"]}, THANKS]]
    (second,) = in_another_process(chat_path, turns[1:], session)
    at_once = in_another_process(chat_path, turns, None)
    assert [first, second] == at_once
    assert first["cached"] == 0
    assert second["cached"] > first["prompt"]
    (without,) = in_another_process(chat_path, turns[1:], None)
    assert without == {**second, "cached": 0}


def test_a_long_text_goes_on_where_it_ended(stories, story_path, tmp_path):
    session = tmp_path / "story.session"
    told = stories.call(LlmCallParams(STORY, 150, 0, session=session))
    on = LlmCallParams(STORY + told.content, 100, 0)
    expected = stories.call(on)
    stories.close()
    with LocalLlmBackend(story_path) as fresh:
        again = fresh.call(dataclasses.replace(on, session=session))
    assert again.content == expected.content
    assert again.timings.cached_tokens == again.usage.prompt_tokens - 1


@pytest.fixture(scope="module", params=["stories", "windowed", "recurrent"])
def any_model(request: pytest.FixtureRequest, story_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A plain transformer, and two whose state is found whole or not at all."""
    folder = tmp_path_factory.mktemp("models")
    if request.param == "stories":
        return Model(story_path)
    if request.param == "windowed":
        return Model(write_random("gemma2", folder / "windowed.gguf", n_window=16))
    return Model(write_random("mamba", folder / "recurrent.gguf"))


def generation(context: Context, tokens: list[int], n: int = 12, **options: Any) -> Generation:
    greedy = Sampler(context.model, temperature=0, logit_bias={1: -1e9, 2: -1e9})  # no end before n tokens
    return Generation(context, greedy, tokens, max_tokens=n, **options)


def some_tokens(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(260, N_VOCAB), k=n)


def test_a_state_goes_on_in_another_context_token_by_token(any_model):
    begin = some_tokens(0, 100)
    context = Context(any_model, n_ctx=512, n_seq_max=4)
    first = generation(context, begin, save=True)
    first.run()
    tokens, state = first.take_state()
    assert tokens[:100] == begin
    assert len(tokens) == 100 + 12 - 1  # the last one was never computed
    on = [*tokens, *some_tokens(1, 20)]
    expected = generation(context, on, 40)
    text = expected.run()
    assert expected.n_cached == len(tokens)
    other = generation(Context(any_model, n_ctx=768, n_seq_max=2), on, 40, known=(tokens, state))
    assert other.run() == text
    assert other.n_cached == len(tokens)


def test_of_a_state_only_the_beginning_that_fits_is_used(any_model):
    context = Context(any_model, n_ctx=512)
    first = generation(context, some_tokens(0, 100), save=True)
    first.run()
    prompt = [*some_tokens(0, 100)[:60], *some_tokens(2, 30)]
    other = generation(Context(any_model, n_ctx=512), prompt, known=first.take_state())
    assert other.run() == generation(Context(any_model, n_ctx=512), prompt).run()
    assert other.n_cached == (60 if any_model.shares_prefixes else 0)


def test_what_one_text_read_is_shared_by_others(story_path):
    model = Model(story_path)
    first = generation(Context(model), some_tokens(0, 100), save=True)
    first.run()
    tokens, state = first.take_state()
    context = Context(model, n_ctx=512, n_seq_max=8)
    generations = [generation(context, [*tokens, 300 + i], known=(tokens, state)) for i in range(6)]
    while running := [g for g in generations if not g.ended]:
        context.run(running)
    assert [g.n_cached for g in generations] == [len(tokens)] * 6
    assert context.n_ctx < 6 * len(tokens)  # it could not have been there six times


def test_a_state_without_room_beside_other_texts_is_computed(story_path):
    model = Model(story_path)
    first = generation(Context(model), some_tokens(0, 200), save=True)
    first.run()
    context = Context(model, n_ctx=256, n_seq_max=2)
    busy = generation(context, some_tokens(1, 100), 20, stream=True)
    assert busy.run(stream=True)
    prompt = [*some_tokens(0, 200), 300]
    second = generation(context, prompt, known=first.take_state())
    texts = {busy: "", second: ""}
    while running := [g for g in texts if not g.ended]:
        for g, text in context.run(running):
            texts[g] += text
    assert second.error is None
    assert texts[second] == generation(Context(model), prompt).run()


def test_a_state_larger_than_the_context_is_not_used(story_path):
    model = Model(story_path)
    first = generation(Context(model), some_tokens(0, 300), save=True)
    first.run()
    small = generation(Context(model, n_ctx=256), some_tokens(0, 200), known=first.take_state())
    assert small.run()
    assert small.n_cached == 0


def test_a_session_is_used_without_host_memory_for_prompts(chat_path, session):
    with LocalLlmBackend(chat_path, cache_ram_mib=0, n_parallel=1) as backend:
        result = backend.chat([HELLO], temperature=0, session=session)
    assert result.timings.cached_tokens == result.usage.prompt_tokens - 1


def test_a_session_of_another_text_is_not_used_but_replaced(chatty, chat_path, session, saved):
    other = {"role": "user", "content": "Goodbye!"}
    expected = "Goodbye! Have a wonderful day!"
    assert chatty.chat([other], temperature=0, session=session).content == expected
    assert session.read_bytes() != saved
    assert in_another_process(chat_path, [[other]], session)[0]["cached"] > 10


# --- refused ----------------------------------------------------------------------------------------------------------
def refused(backend: LocalLlmBackend, path: Path, match: str) -> None:
    """The call fails for its session alone; the file stays as it is, and the model answers others."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SessionError, match=match) as caught:
        backend.chat([HELLO], temperature=0, session=path)
    assert isinstance(caught.value, BadRequest)  # no reason to ask an API instead
    assert str(path) in str(caught.value)
    assert "delete it or name another file" in str(caught.value)
    assert before is None or path.read_bytes() == before
    assert backend.chat([HELLO], temperature=0).content == "Hi there! How can I help you today?"


@pytest.mark.parametrize(
    ("name", "at", "found"),
    [
        ("magic", 0, "no session file"),
        ("magic", 7, "no session file"),
        ("version", 8, "of version 0, and version 1 is known"),
        ("version", 11, "of version"),
        ("bytes of origin", 12, "it has .* bytes and says"),
        ("tokens", 16, "it has .* bytes and says"),
        ("tokens", 23, "it has .* bytes and says"),
        ("bytes of state", 24, "it has .* bytes and says"),
        ("bytes of state", 31, "it has .* bytes and says"),
        ("checksum", 32, "damaged"),
        ("checksum", 63, "damaged"),
    ],
)
def test_a_changed_head_is_refused(chatty, session, saved, name, at, found):
    session.write_bytes(saved[:at] + bytes([saved[at] ^ 1]) + saved[at + 1 :])
    refused(chatty, session, found)


def test_sizes_that_add_up_by_chance_are_refused(chatty, session, saved):
    """Four bytes less of state, one token more."""
    magic, version, n_origin, n_tokens, n_state, checksum = HEAD.unpack_from(saved)
    session.write_bytes(HEAD.pack(magic, version, n_origin, n_tokens + 1, n_state - 4, checksum) + saved[HEAD.size :])
    refused(chatty, session, "damaged")


def test_a_file_cut_anywhere_is_refused(session, saved, chatty):
    file = SessionFile(str(session), chatty._open_engine().origin)
    assert file.read() is not None
    draw = random.Random(0)
    for n in [*range(HEAD.size + 2), *draw.sample(range(len(saved)), 100), len(saved) - 1]:
        session.write_bytes(saved[:n])
        with pytest.raises(SessionError, match=r"no session file|it ends after|bytes and says"):
            file.read()
    session.write_bytes(saved + b"\0")
    refused(chatty, session, "bytes and says")


def test_a_file_with_a_flipped_bit_anywhere_is_refused(session, saved, chatty):
    file = SessionFile(str(session), chatty._open_engine().origin)
    draw = random.Random(1)
    for at in [*range(HEAD.size + 300), *draw.sample(range(len(saved)), 200)]:
        session.write_bytes(saved[:at] + bytes([saved[at] ^ 1 << draw.randrange(8)]) + saved[at + 1 :])
        with pytest.raises(SessionError):
            file.read()


def test_random_bytes_are_refused(chatty, session):
    draw = random.Random(2)
    for n in (0, 1, 63, 64, 5000):
        session.write_bytes(draw.randbytes(n))
        refused(chatty, session, "no session file")


def test_the_session_of_another_model_is_refused(shared_models, session):
    with (
        LocalLlmBackend(shared_models / "scripted-f16.gguf") as other,
        pytest.raises(SessionError, match=r"saved with stories260K-chat-q8_0, another model than scripted-f16"),
    ):
        other.chat([HELLO], session=session)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": "0" * 64}, "another model"),
        ({"llama_cpp": "9.9"}, r"saved by llama.cpp 9\.9, and this is"),
        ({"layout": "upside down"}, r"its layout is \(upside down\), and here it is"),
    ],
)
def test_a_session_of_another_origin_is_refused(chatty, session, saved, changes, found):
    session.write_bytes(with_origin(saved, **changes))
    refused(chatty, session, found)


def test_the_name_of_the_model_file_does_not_matter(chat_path, session, tmp_path):
    renamed = shutil.copy(chat_path, tmp_path / "renamed.gguf")
    with LocalLlmBackend(renamed) as backend:
        assert backend.chat([HELLO], temperature=0, session=session).timings.cached_tokens > 0


@pytest.mark.parametrize("origin", [b"", b"[]", b'{"model": 3}', b"{}", b"\xff", b'{"model": null, "more": 1}'])
def test_an_origin_in_bad_faith_is_refused(chatty, session, saved, origin):
    magic, version, n_origin, n_tokens, n_state, _ = HEAD.unpack_from(saved)
    rest = saved[HEAD.size + n_origin :]
    session.write_bytes(signed((magic, version, len(origin), n_tokens, n_state), origin + rest))
    refused(chatty, session, "can't be read")


@pytest.mark.parametrize(
    "broken",
    [
        lambda state: b"",
        lambda state: b"\0",
        lambda state: state[:-1],
        lambda state: state[:200],
        lambda state: bytes(len(state)),
        lambda state: random.Random(3).randbytes(len(state)),
        lambda state: state[:8] + random.Random(4).randbytes(len(state) - 8),
        lambda state: state[:12] + b"\xff\xff\xff\x7f" + state[16:],
        lambda state: state + state,
    ],
    ids=["empty", "one byte", "cut", "cut early", "zeros", "random", "random behind its head", "huge", "twice"],
)
def test_a_state_in_bad_faith_is_refused_by_llama_cpp_and_hurts_nobody(chatty, session, saved, broken):
    """The checksum is right, since whoever wrote it wanted it to be."""
    *_, n_state, _ = HEAD.unpack_from(saved)
    session.write_bytes(with_state(saved, broken(saved[-n_state:])))
    refused(chatty, session, "state does not fit this context: ")


def test_a_state_of_other_positions_than_its_tokens_have_is_refused(chatty, session, saved):
    _, _, n_origin, n_tokens, n_state, _ = HEAD.unpack_from(saved)
    tokens = struct.unpack_from(f"<{n_tokens}i", saved, HEAD.size + n_origin)
    session.write_bytes(with_state(saved, saved[-n_state:], [*tokens, 5, 6]))
    refused(chatty, session, "does not hold the tokens that it says")


def test_tokens_outside_the_vocabulary_are_refused(chatty, session, saved):
    *_, n_state, _ = HEAD.unpack_from(saved)
    session.write_bytes(with_state(saved, saved[-n_state:], [10**9, -1]))
    refused(chatty, session, "not in the vocabulary")


def test_a_state_of_another_layout_is_refused_by_llama_cpp(story_path):
    """Without flash attention values lie the other way round."""
    model = Model(story_path)
    first = generation(Context(model, flash_attn=False), some_tokens(0, 100), save=True)
    first.run()
    context = Context(model, flash_attn=True)
    second = generation(context, some_tokens(0, 120), known=first.take_state())
    with pytest.raises(SessionError, match="incompatible V transposition"):
        second.run()
    assert not context.poisoned
    assert generation(context, some_tokens(0, 120)).run()


def test_what_is_no_regular_file_is_refused(chatty, tmp_path):
    refused(chatty, tmp_path, "not a regular file|Is a directory")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(chatty, pipe, "not a regular file")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(chatty, loop, "symbolic links")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(chatty, session):
    session.chmod(0)
    with pytest.raises(SessionError, match="Permission denied"):
        chatty.chat([HELLO], session=session)


@pytest.mark.parametrize("path", ["", "a\0b", 3, b"bytes", ["a"]])
def test_what_is_no_path_is_refused_by_name(path):
    with pytest.raises(BadRequest, match=r"^session is"):
        LlmCallParams("Once", session=path)


def test_a_model_file_that_was_replaced_after_it_was_loaded_keeps_no_session(chat_path, tmp_path):
    model = shutil.copy(chat_path, tmp_path / "model.gguf")
    with LocalLlmBackend(model) as backend:
        shutil.copy(chat_path, tmp_path / "other.gguf")
        (tmp_path / "other.gguf").rename(model)
        with pytest.raises(SessionError, match="was changed after it was loaded"):
            backend.chat([HELLO], session=tmp_path / "talk.session")


# --- what a model is --------------------------------------------------------------------------------------------------
def test_the_digest_of_a_model_tells_weights_metadata_and_size_apart(story_path, tmp_path):
    data = story_path.read_bytes()

    def digest_of(changed: bytes) -> str:
        path = tmp_path / "changed.gguf"
        path.write_bytes(changed)
        return model_digest(path)

    context_length = data.index(b"llama.context_length") + len("llama.context_length") + 4
    tensor_name = data.index(b"blk.0.attn_k.weight")
    digests = {
        digest_of(data),
        digest_of(data[:context_length] + b"\x01" + data[context_length + 1 :]),
        digest_of(data[:tensor_name] + b"x" + data[tensor_name + 1 :]),
        digest_of(data[: -len(data) // 2] + bytes(len(data) // 2)),
        digest_of(data + b"\0"),
    }
    assert len(digests) == 5
    assert model_digest(story_path) == digest_of(data)


def test_the_digest_of_a_model_in_parts_covers_them_all(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf writes a model in parts")
    np = pytest.importorskip("numpy")

    def digest_of(value: float) -> str:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=1)
        for name, values in (("a", 1.0), ("b", value)):
            writer.add_tensor(name, np.full((64, 64), values, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model_digest(tmp_path / "model-00001-of-00002.gguf")

    assert digest_of(1.0) == digest_of(1.0) != digest_of(2.0)


# --- saved ------------------------------------------------------------------------------------------------------------
def test_a_session_is_its_owners_alone_and_its_folders_are_made(chatty, tmp_path, monkeypatch):
    monkeypatch.setenv("TALKS", str(tmp_path / "a" / "b"))
    result = chatty.chat([HELLO], session="$TALKS/talk.session")
    assert result.session_error is None
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert file.name == "talk.session"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_to_a_session_stays_one(chatty, session, saved, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(session)
    chatty.chat([HELLO], temperature=0, max_tokens=3, session=link)
    assert link.is_symlink()
    assert session.read_bytes() != saved


def test_a_cancelled_text_leaves_the_file_as_it_was(chatty, session, saved):
    result = chatty.stream_chat([HELLO], lambda chunk: False, temperature=0, session=session)
    assert result.finish_reason == "cancelled"
    assert session.read_bytes() == saved


def test_a_text_stopped_at_its_last_chunk_leaves_the_file_as_it_was(chatty, session, saved):
    """The engine had ended by itself, but the caller has said no."""
    result = chatty.stream_chat([HELLO], lambda chunk: False, temperature=0, max_tokens=1, session=session)
    assert (result.finish_reason, result.usage.completion_tokens) == ("cancelled", 1)
    assert session.read_bytes() == saved


def test_a_failed_text_leaves_the_file_as_it_was(chatty, session, saved):
    with pytest.raises(GrammarError):
        chatty.chat([HELLO], grammar="root ::= (", session=session)
    with pytest.raises(ContextOverflow):
        chatty.call(LlmCallParams(STORY * 100, session=session))
    with pytest.raises(DeadlineExceeded):
        chatty.chat([HELLO], timeout_s=0, session=session)
    with pytest.raises(ValueError, match="mine"):
        chatty.stream_chat([HELLO], lambda chunk: int("mine"), session=session)
    assert session.read_bytes() == saved


def test_a_text_of_no_tokens_saves_nothing(chatty, tmp_path):
    result = chatty.chat([HELLO], max_tokens=0, session=tmp_path / "talk.session")
    assert (result.content, result.session_error) == ("", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
def test_an_answer_whose_session_can_not_be_saved_is_not_lost(chatty, caplog):
    with caplog.at_level(logging.WARNING, "tea_llm"):
        result = chatty.chat([HELLO], temperature=0, session="/proc/self/talk.session")
    assert result.content == "Hi there! How can I help you today?"
    assert result.session_error.startswith("the session could not be saved to /proc/self/talk.session: ")
    assert result.session_error.endswith("; make room there or name another file")
    assert [record.getMessage() for record in caplog.records] == [result.session_error]


@pytest.mark.parametrize("name", ["x" * 255, "漢" * 85], ids=["ASCII", "UTF-8"])
def test_a_file_may_have_the_longest_name_there_is(chatty, tmp_path, name):
    path = tmp_path / name
    assert chatty.chat([HELLO], session=path).session_error is None
    assert path.exists()


def test_a_full_disk_keeps_the_old_file_and_the_answer(chat_path, session, saved):
    """The system lets this process write files of 10 kB at most, which is what a full disk looks like from here."""
    program = """
import json, logging, resource, sys
from tea_llm import LocalLlmBackend
logging.basicConfig(level=logging.WARNING)
with LocalLlmBackend(sys.argv[1]) as backend:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    result = backend.chat([{"role": "user", "content": "Hello!"}], temperature=0, session=sys.argv[2])
print(json.dumps([result.content, result.session_error]))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program, str(chat_path), str(session)], capture_output=True, text=True, check=True
    )
    content, error = json.loads(answer.stdout.splitlines()[-1])
    assert content == "Hi there! How can I help you today?"
    assert error.startswith(f"the session could not be saved to {session}: File too large;")
    assert error in answer.stderr
    assert session.read_bytes() == saved
    assert list(session.parent.iterdir()) == [session]


# --- at once ----------------------------------------------------------------------------------------------------------
def test_calls_that_share_a_session_all_answer_and_never_tear_it(chatty, session):
    file = SessionFile(str(session), chatty._open_engine().origin)
    texts = ("Hello!", "Thank you!", "Goodbye!", "What color is the sky?")
    expected = {text: chatty.chat([{"role": "user", "content": text}], temperature=0).content for text in texts}
    done = threading.Event()

    def watch() -> int:
        n_read = 0
        while not done.is_set():
            assert file.read() is not None
            n_read += 1
        return n_read

    def ask(text: str) -> None:
        for _ in range(5):
            result = chatty.chat([{"role": "user", "content": text}], temperature=0, session=session)
            assert (result.content, result.session_error) == (expected[text], None)

    with ThreadPoolExecutor(9) as threads:
        watching = threads.submit(watch)
        try:
            for asked in [threads.submit(ask, text) for text in texts * 2]:
                asked.result()
        finally:
            done.set()
        assert watching.result() > 0
    assert list(session.parent.iterdir()) == [session]


def test_tasks_keep_a_session_each(chat_path, tmp_path):
    async def talk(backend: LocalLlmBackend, name: str) -> int:
        session = tmp_path / name
        first = await backend.achat([HELLO], temperature=0, session=session)
        chunks: list[str] = []
        messages = [HELLO, {"role": "assistant", "content": first.content}, THANKS]
        second = await backend.astream_chat(messages, chunks.append, temperature=0, session=session)
        assert (first.session_error, second.session_error) == (None, None)
        assert "".join(chunks) == second.content
        return second.timings.cached_tokens

    async def all_of_them() -> list[int]:
        with LocalLlmBackend(chat_path) as backend:
            return await asyncio.gather(*(talk(backend, f"{i}.session") for i in range(6)))

    assert min(asyncio.run(all_of_them())) > 20
    with LocalLlmBackend(chat_path) as backend:
        result = asyncio.run(backend.achat([HELLO], temperature=0, session=tmp_path / "0.session"))
        assert result.timings.cached_tokens == result.usage.prompt_tokens - 1
        (tmp_path / "0.session").write_bytes(b"nothing")
        with pytest.raises(SessionError, match="no session file"):
            asyncio.run(backend.achat([HELLO], session=tmp_path / "0.session"))


# --- in a workflow, and not for an API --------------------------------------------------------------------------------
WORKFLOW = """
settings: {llm: {backend: local, fallback: error}}
nodes:
  - name: greet
    uses: llm.chat
    with:
      messages: [{role: user, content: Hello!}]
      temperature: 0
      session: "{{ state.folder }}/talk.session"
    output: {greeting: content}
  - name: thank
    uses: llm.chat
    with:
      messages:
        - {role: user, content: Hello!}
        - {role: assistant, content: "{{ state.greeting }}"}
        - {role: user, content: Thank you!}
      temperature: 0
      session: "{{ state.folder }}/talk.session"
    output: {answer: content, timings: timings}
"""


def test_a_workflow_keeps_a_session_from_node_to_node_and_run_to_run(chat_path, tmp_path, bare_environment):
    file = tmp_path / "talk.yaml"
    file.write_text(WORKFLOW)
    runs = [run_workflow(file, {"folder": str(tmp_path)}, gguf=chat_path) for _ in range(2)]
    assert [run["answer"] for run in runs] == ["You're welcome! Happy to help."] * 2
    assert [run["timings"]["cached_tokens"] > 20 for run in runs] == [True, True]
    (tmp_path / "talk.session").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"Node 'greet' .* the session .* can't be used"):
        run_workflow(file, {"folder": str(tmp_path)}, gguf=chat_path)


def test_an_api_never_hears_of_a_session(server: ApiServer, bare_environment, tmp_path, caplog):
    settings = {"llm": {"api_base": server.base, "model": "m"}}
    with ApiLlmBackend(settings) as backend, caplog.at_level("DEBUG", "tea_llm"):
        backend.chat([HELLO], session=tmp_path / "talk.session")
    assert "session" not in json.dumps(server.seen[-1].body)
    assert len([record for record in caplog.records if "talk.session" in record.getMessage()]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_session_goes_through_its_file_unchanged(tmp_path):
    origin = Origin("0" * 64, "a model", "1.0", "flat")
    file = SessionFile(str(tmp_path / "talk.session"), origin)
    assert file.read() is None
    session = Session((1, 2, 2**31 - 1), random.Random(0).randbytes(1000))
    file.write(session)
    assert file.read() == session

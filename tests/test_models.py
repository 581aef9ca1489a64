"""Which model file is taken (CONTRACT section 3), what it says (section 5), and headers that lie."""

from __future__ import annotations

import logging
import os
import struct
import time
from pathlib import Path

import pytest

from tea_llm.errors import ModelLoadError, ModelNotFound, SettingsError
from tea_llm.models import LongArray, get_model_info, read_metadata, resolve_model_path
from tea_llm.settings import LlmSettings

GEMMA_1B, PHI, GEMMA_N = (
    "gemma-3-1b-it-Q8_0.gguf",
    "microsoft_Phi-4-mini-instruct-Q3_K_S.gguf",
    "gemma-3n-E4B-it-Q4_K_M.gguf",
)
NOTHING = "No local model found. Set TEA_MODEL_PATH or configure llm.model_path."


class Place:
    """A home, an AppDir and loose files below tmp_path, and a search that sees nothing else."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.cache = self.home / ".cache" / "tea" / "models"
        self.bundle = root / "app" / "usr" / "share" / "models"
        self.root = root
        for directory in (self.cache, self.bundle):
            directory.mkdir(parents=True)

    def file(self, name: str, directory: Path | None = None) -> str:
        path = (directory or self.root) / name
        path.write_bytes(b"GGUF")
        return str(path)

    def search(self, settings=None, cli=None, *, node=None, env=None):
        return resolve_model_path(settings, cli, node_model_path=node, env=env or {}, home=self.home)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="tea_llm")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "tea_llm" and r.levelname == "WARNING"]


def test_the_search_takes_its_places_in_the_order_of_the_contract(place, warnings):
    cli, env, node, yaml = (place.file(f"{n}.gguf") for n in ("cli", "env", "node", "yaml"))
    bundled, cached = place.file(GEMMA_N, place.bundle), place.file(GEMMA_1B, place.cache)
    variables = {"TEA_MODEL_PATH": env, "APPDIR": str(place.root / "app")}
    settings = {"llm": {"model_path": yaml}}
    for expected in (cli, env, node, yaml, bundled, cached):
        assert place.search(settings, cli, node=node, env=variables) == expected
        Path(expected).unlink()
    missing = [
        f"--gguf set but file not found: {cli}",
        f"TEA_MODEL_PATH set but file not found: {env}",
        f"model_path set but file not found: {node}",
        f"llm.model_path set but file not found: {yaml}",
    ]
    assert warnings() == [text for n in (0, 1, 2, 3, 4, 4) for text in missing[:n]]


def test_nothing_found_is_one_warning_and_none(place, warnings):
    assert place.search() is None
    assert warnings() == [NOTHING]


@pytest.mark.parametrize("settings", [None, {}, {"llm": None}, {"llm": {}}, {"llm": {"model_path": ""}}, LlmSettings()])
def test_settings_that_say_nothing_are_no_reason_to_complain(place, warnings, settings):
    cached = place.file("only.gguf", place.cache)
    assert place.search(settings, "", node=None, env={"TEA_MODEL_PATH": "", "APPDIR": ""}) == cached
    assert warnings() == []


def test_settings_may_be_read_already(place):
    path = place.file("yaml.gguf")
    assert place.search(LlmSettings(model_path=path)) == path


@pytest.mark.parametrize("settings", [{"llm": {"model_path": 3}}, {"llm": ["model_path"]}])
def test_settings_of_the_wrong_kind_are_an_error(place, settings):
    with pytest.raises(SettingsError, match=r"settings\.llm"):
        place.search(settings)


@pytest.mark.parametrize("written", ["~/m.gguf", "$MODELS/m.gguf", "${MODELS}/m.gguf"])
@pytest.mark.parametrize("where", ["cli", "env", "node", "yaml"])
def test_home_and_variables_expand_in_every_path(place, written, where):
    path = place.file("m.gguf", place.home)
    env = {"MODELS": str(place.home)}
    given = {
        "cli": lambda: place.search(None, written, env=env),
        "env": lambda: place.search(None, env={**env, "TEA_MODEL_PATH": written}),
        "node": lambda: place.search(None, node=written, env=env),
        "yaml": lambda: place.search({"llm": {"model_path": written}}, env=env),
    }
    assert given[where]() == path


def test_an_unset_variable_stays_in_the_warning(place, warnings):
    assert place.search({"llm": {"model_path": "$NO_SUCH/m.gguf"}}) is None
    assert warnings() == ["llm.model_path set but file not found: $NO_SUCH/m.gguf", NOTHING]


def test_a_directory_is_no_model_file(place, warnings):
    assert place.search({"llm": {"model_path": str(place.cache)}}) is None
    assert warnings()[0] == f"llm.model_path set but file not found: {place.cache}"


@pytest.mark.parametrize("directory", ["bundle", "cache"])
@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ([GEMMA_N, PHI, GEMMA_1B, "a.gguf"], GEMMA_1B),
        ([GEMMA_N, PHI, "a.gguf"], PHI),
        ([GEMMA_N, "a.gguf"], GEMMA_N),
        (["a.gguf"], "a.gguf"),
        (["a.gguf", "b.bin", ".c.gguf", "d.gguf.part"], "a.gguf"),
        (["b.bin"], None),
        ([], None),
    ],
)
def test_a_model_directory_gives_its_preferred_or_its_only_model(place, warnings, directory, files, taken):
    folder = getattr(place, directory)
    for name in files:
        place.file(name, folder)
    found = place.search(env={"APPDIR": str(place.root / "app")})
    assert found == (str(folder / taken) if taken else None)
    assert warnings() == ([] if taken else [NOTHING])


def test_several_models_and_none_preferred_are_listed_and_none_is_taken(place, warnings):
    for name in ("b.gguf", "a.gguf"):
        place.file(name, place.bundle)
    env = {"APPDIR": str(place.root / "app")}
    assert place.search(env=env) is None
    listed, nothing = warnings()
    assert "a.gguf, b.gguf" in listed
    assert str(place.bundle) in listed
    assert nothing == NOTHING
    cached = place.file("c.gguf", place.cache)
    assert place.search(env=env) == cached


def test_a_link_to_nowhere_and_a_folder_are_not_counted(place):
    (place.cache / "gone.gguf").symlink_to(place.root / "missing")
    (place.cache / "folder.gguf").mkdir()
    assert place.search() is None
    only = place.file("only.gguf", place.cache)
    assert place.search() == only


def test_the_environment_is_read_when_asked(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place.home))
    monkeypatch.delenv("APPDIR", raising=False)
    monkeypatch.setenv("TEA_MODEL_PATH", place.file("one.gguf"))
    assert resolve_model_path({}) == str(place.root / "one.gguf")
    monkeypatch.setenv("TEA_MODEL_PATH", place.file("two.gguf"))
    assert resolve_model_path({}) == str(place.root / "two.gguf")
    monkeypatch.delenv("TEA_MODEL_PATH")
    assert resolve_model_path({}) is None
    cached = place.file("three.gguf", place.cache)
    assert resolve_model_path({}) == cached


# Names

SMALL_GEMMA = {"n_ctx": 8192, "chat_format": "gemma", "family": "gemma"}
GEMMA = {"n_ctx": 32768, "chat_format": "gemma", "family": "gemma"}
PHI_INFO = {"n_ctx": 128000, "chat_format": "chatml", "family": "phi"}
TINY = {"n_ctx": 2048, "chat_format": None, "family": "tinyllama"}
UNKNOWN = {"n_ctx": 4096, "chat_format": None, "family": "unknown"}


@pytest.mark.parametrize(
    ("name", "info"),
    [
        (GEMMA_1B, SMALL_GEMMA),
        ("gemma3-1b.gguf", SMALL_GEMMA),
        ("GEMMA_3_1B-it.gguf", SMALL_GEMMA),
        ("gemma3_1b.gguf", SMALL_GEMMA),
        (GEMMA_N, GEMMA),
        ("gemma-3-12b-it.gguf", GEMMA),
        ("codegemma.gguf", GEMMA),
        (PHI, PHI_INFO),
        ("phi3.gguf", PHI_INFO),
        ("Phi-3.5-mini.gguf", PHI_INFO),
        ("my_phi.gguf", PHI_INFO),
        ("dolphin-2.9-llama3.gguf", UNKNOWN),
        ("philosopher.gguf", UNKNOWN),
        ("delphi.gguf", UNKNOWN),
        ("TinyLlama-1.1B.gguf", TINY),
        ("stories15M.gguf", TINY),
        ("Qwen2.5-0.5B.gguf", UNKNOWN),
        ("phi/gemma/model.gguf", UNKNOWN),
    ],
)
@pytest.mark.parametrize("contents", [None, b"", b"not a model at all"])
def test_a_file_that_says_nothing_is_known_by_its_name(tmp_path, name, info, contents):
    path = tmp_path / name
    if contents is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    assert get_model_info(path) == info
    assert get_model_info(str(path)) == info


# Metadata, from files written by the official `gguf` package


def written(path: Path, architecture: str, **keys) -> Path:
    gguf = pytest.importorskip("gguf", reason="writes the GGUF files")
    writer = gguf.GGUFWriter(path, architecture)
    if "context_length" in keys:
        writer.add_context_length(keys["context_length"])
    if "template" in keys:
        writer.add_chat_template(keys["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("name", "architecture", "keys", "info"),
    [
        (PHI, "qwen2", {"context_length": 777, "template": CHATML}, (777, "chatml", "qwen2")),
        ("x.gguf", "gemma3", {"context_length": 131072, "template": "<start_of_turn>"}, (131072, "gemma", "gemma")),
        ("x.gguf", "gemma-embedding", {"context_length": 2048}, (2048, None, "gemma")),
        ("gemma.gguf", "phi3", {"context_length": 4096, "template": "<|user|>…<|end|>"}, (4096, None, "phi")),
        ("x.gguf", "phi3", {"template": "<|im_start|>user<|im_sep|>"}, (4096, None, "phi")),
        ("stories.gguf", "llama", {"context_length": 512}, (512, None, "llama")),
        (PHI, "phi3", {}, (128000, "chatml", "phi")),
        ("gemma-3-1b.gguf", "gemma3", {"context_length": 0}, (8192, "gemma", "gemma")),
    ],
)
def test_what_a_file_says_beats_what_it_is_called(tmp_path, name, architecture, keys, info):
    path = written(tmp_path / name, architecture, **keys)
    assert get_model_info(path) == dict(zip(("n_ctx", "chat_format", "family"), info, strict=True))


def test_a_damaged_file_is_known_by_its_name_and_warned_of(tmp_path, warnings):
    path = tmp_path / "phi-4.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert get_model_info(path) == PHI_INFO
    assert str(path) in warnings()[0]


def test_every_kind_of_value_reads_as_the_official_package_wrote_it(tmp_path):
    gguf = pytest.importorskip("gguf", reason="writes the GGUF file")
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    values = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "float32": 0.5, "bool": True, "uint64": 2**64 - 1, "int64": -(2**63), "float64": 1e300,
        "string": "Grüße \U0001f600", "array": [1, 2, 3],
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_bool("test.off", False)
    writer.add_array("test.words", ["", "a", "bc"])
    writer.add_array("test.flags", [True, False])
    writer.add_array("test.halves", [0.5, 1.5])
    writer.add_array("test.edge", list(range(64)))
    writer.add_array("test.long", list(range(65)))
    writer.add_array("test.edge_words", ["w"] * 64)
    writer.add_array("test.long_words", ["w"] * 65)
    writer.add_token_list([f"t{'x' * (i % 300)}" for i in range(20_000)])  # larger than what is read at first
    writer.add_string("test.last", "still here")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_metadata(tmp_path / "all.gguf") == {
        "general.architecture": "llama",
        **{f"test.{kind}": value for kind, value in values.items()},
        "test.off": False,
        "test.words": ["", "a", "bc"],
        "test.flags": [True, False],
        "test.halves": [0.5, 1.5],
        "test.edge": list(range(64)),
        "test.long": LongArray("int32", 65),
        "test.edge_words": ["w"] * 64,
        "test.long_words": LongArray("string", 65),
        "tokenizer.ggml.tokens": LongArray("string", 20_000),
        "test.last": "still here",
    }


def shared_models():
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    found = sorted(Path(os.environ.get("TEA_LLM_SHARED", beside), "models").glob("*.gguf"))
    missing = pytest.mark.skip(reason="needs the shared models: set TEA_LLM_SHARED, or put them in ../shared")
    return found or [pytest.param(Path("none.gguf"), marks=missing)]


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.name)
def test_real_files_read_as_the_official_package_reads_them(path):
    gguf = pytest.importorskip("gguf", reason="is what we compare with")
    ours, theirs = read_metadata(path), gguf.GGUFReader(path).fields
    assert list(ours) == [key for key in theirs if not key.startswith("GGUF.")]
    for key, value in ours.items():
        if isinstance(value, LongArray):
            assert value.count == len(theirs[key].data)
        elif isinstance(value, float):
            assert value == pytest.approx(theirs[key].contents(), rel=1e-7)
        else:
            assert value == theirs[key].contents()


# Headers that lie


def s(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def header(*pairs: bytes, version: int = 3, n_keys: int | None = None) -> bytes:
    count = len(pairs) if n_keys is None else n_keys
    return b"GGUF" + struct.pack("<IQQ", version, 0, count) + b"".join(pairs)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return s("a") + struct.pack("<IIQ", 9, kind, count) + data


WHOLE = header(
    s("general.architecture") + struct.pack("<I", 8) + s("llama"),
    s("llama.context_length") + struct.pack("<II", 4, 512),
    array(8, 65, s("t") * 65),
    s("flags") + struct.pack("<IIQ", 9, 7, 65) + bytes(65),
)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(tmp_path, version):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(s("k") + struct.pack("<II", 4, 7), version=version))
    assert read_metadata(path) == {"k": 7}


def test_a_header_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(WHOLE)
    assert read_metadata(path)["llama.context_length"] == 512
    for length in reversed(range(len(WHOLE))):
        os.truncate(path, length)
        if length < 4:
            assert read_metadata(path) is None
        else:
            with pytest.raises(ModelLoadError, match="GGUF header of"):
                read_metadata(path)


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (header(n_keys=HUGE), "claims 18446744073709551615 keys"),
        (header(n_keys=1000), "needs"),
        (header(struct.pack("<Q", HUGE)), "needs"),
        (header(s("k") + struct.pack("<IQ", 8, 2**63)), "needs"),
        (header(array(8, HUGE)), "needs"),
        (header(array(8, 100, struct.pack("<Q", HUGE))), "needs"),
        (header(array(8, 100, struct.pack("<Q", 2**62) * 99)), "needs"),
        (header(array(8, 3, struct.pack("<Q", HUGE))), "needs"),
        (header(array(8, 65, s("t") * 64 + struct.pack("<Q", 5) + b"abc")), "needs"),
        (header(array(6, HUGE)), "needs"),
        (header(array(0, 2**40)), "needs"),
        (header(array(9, 1, struct.pack("<IQ", 9, 1) * 10_000)), "begins an array of type 9"),
        (header(array(77, 1)), "begins an array of type 77"),
        (header(s("k") + struct.pack("<I", 13)), "type 13"),
        (header(*[s("k") + struct.pack("<II", 4, 7)] * 2), "'k' is there twice"),
        (header(version=1), "version 1;"),
        (header(version=99), "version 99;"),
        (header(version=0), "version 0;"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_a_header_that_lies_is_refused_at_once_and_says_where(tmp_path, contents, says):
    path = tmp_path / "m.gguf"
    path.write_bytes(contents)
    begin = time.monotonic()
    with pytest.raises(ModelLoadError, match=says) as caught:
        read_metadata(path)
    assert time.monotonic() - begin < 1
    assert str(path) in str(caught.value)


def test_a_header_longer_than_any_is_refused_before_it_fills_memory(tmp_path):
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(header(s("k") + struct.pack("<IQ", 8, 2**35)))
        file.truncate(2**36)
    with pytest.raises(ModelLoadError, match="longer than"):
        read_metadata(path)


@pytest.mark.parametrize("contents", [b"", b"G", b"GGU", b"ggml", b"root:x:0:0", b"\x7fELF" + bytes(100)])
def test_a_file_that_is_no_gguf_is_none(tmp_path, contents):
    path = tmp_path / "m.gguf"
    path.write_bytes(contents)
    assert read_metadata(path) is None


def test_broken_utf8_does_not_stop_the_reader(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(s("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"))
    assert read_metadata(path) == {"k": "\ufffd\ufffd"}


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="Model file not found") as caught:
        read_metadata(tmp_path / "none.gguf")
    assert isinstance(caught.value, ModelNotFound)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        read_metadata(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_directory_or_an_impossible_path_is_refused(tmp_path, name):
    with pytest.raises(ModelLoadError, match="can't be read"):
        read_metadata(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to count open files in")
def test_a_refused_file_is_closed_again(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(WHOLE[:50])
    begin = len(list(Path("/proc/self/fd").iterdir()))
    for refused in (path, tmp_path):
        for _ in range(5):
            with pytest.raises(ModelLoadError):
                read_metadata(refused)
    assert len(list(Path("/proc/self/fd").iterdir())) == begin


@pytest.mark.parametrize("path", [None, 3, b"gemma.gguf", ["gemma.gguf"]])
def test_what_is_no_path_is_refused(path):
    for ask in (lambda: get_model_info(path), lambda: read_metadata(path), lambda: resolve_model_path({}, path or 3)):
        with pytest.raises(SettingsError, match="give the path of a file"):
            ask()

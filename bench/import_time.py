"""What `import tea_llm` costs over the bare interpreter, and that it loads neither numpy, httpx nor the extension.

python bench/import_time.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import race

HEAVY = ("numpy", "httpx", "tea_llm._llama")
BAR_MS = 60.0


def start_ms(python: str, code: str) -> float:
    """Milliseconds from the start of an interpreter that runs `code` to its end."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", code], check=True)
    return (time.perf_counter() - begin) * 1000


def loaded_modules(python: str) -> list[str]:
    """Which of the heavy modules `import tea_llm` loads; [] if none."""
    code = f"import sys, json, tea_llm; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    loaded: list[str] = json.loads(race.run([python, "-c", code]))
    return loaded


def main() -> int:
    """Measure and report; the exit status is 1 when the bar was missed or a heavy module was loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the Python that has tea_llm (default: this one)")
    parser.add_argument("--rounds", type=int, default=20, help="starts of each (default: %(default)s)")
    args = parser.parse_args()
    loaded = loaded_modules(args.python)  # also writes the .pyc files, as an installed package has them
    pairs = [(start_ms(args.python, "pass"), start_ms(args.python, "import tea_llm")) for _ in range(args.rounds)]
    extra_ms = median(with_it - bare for bare, with_it in pairs)
    bare_ms = median(bare for bare, _ in pairs)
    met = extra_ms < BAR_MS and not loaded
    print(
        f"import tea_llm: {extra_ms:.1f} ms more than the bare {bare_ms:.1f} ms (bar: {BAR_MS:g} ms)", file=sys.stderr
    )
    print(f"heavy modules loaded: {', '.join(loaded) or 'none'}", file=sys.stderr)
    facts = {"machine": race.machine(), "rounds": args.rounds, "bare_ms": bare_ms, "extra_ms": extra_ms}
    print(json.dumps({"bench": "import_time", **facts, "bar_ms": BAR_MS, "loaded": loaded, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

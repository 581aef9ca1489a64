"""Make the model from nothing: `python make.py OUT` trains, exports and measures; OUT gets tea-tiny.pt and .gguf."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["make"]

_HERE = Path(__file__).parent


def make(out: Path) -> None:
    """Run the three programs of this folder one after the other."""
    checkpoint, model = str(out / "tea-tiny.pt"), str(out / "tea-tiny.gguf")
    for command in (
        ["train.py", str(out)],
        ["export.py", checkpoint, model],
        ["evaluate.py", model, "--checkpoint", checkpoint],
    ):
        subprocess.run([sys.executable, str(_HERE / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))

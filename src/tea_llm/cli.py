"""The `tea-llm` command: results on stdout, everything else on stderr, and an exit code that a script can trust."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .actions import ActionFunction, __tea_actions__, register_actions
from .backend import BackendPool
from .errors import LlmError, SettingsError, WorkflowError
from .models import get_model_info, resolve_model_path
from .settings import LlmSettings, expand_path, missing_credentials, resolve_api

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["main"]

_OK, _FAILED, _USAGE, _INTERRUPTED, _NO_READER = 0, 1, 2, 130, 141

_EPILOG = """\
exit codes:
  0    done
  1    the work failed: a node, the model or the API; stderr says why
  2    wrong usage, or a file or an input that can't be used; nothing was run
  130  interrupted (Ctrl-C)
  141  whoever read stdout went away

environment:
  TEA_MODEL_PATH                     the GGUF file to load
  OPENAI_API_KEY, OPENAI_BASE_URL    the API to ask, or to fall back to
  OLLAMA_API_BASE                    Ollama, which needs no key
  AZURE_OPENAI_API_KEY, AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_DEPLOYMENT

examples:
  tea-llm run story.yaml --input '{"question": "Why is the sky blue?"}'
  tea-llm call "Once upon a time" --gguf model.gguf --max-tokens 50
  tea-llm chat --gguf model.gguf
  tea-llm embed --file sentences.txt --gguf embedder.gguf > vectors.json
  tea-llm info
"""

_EMBED_BATCH = 32
_BAR_AFTER_S = 0.5  # a load that is done sooner needs no bar


class _UsageError(Exception):
    """What was asked can't be tried."""


class _FailedError(Exception):
    """What was tried didn't work."""


@dataclass(frozen=True)
class _Engine:
    """What the actions ask an engine for."""

    cli_overrides: Mapping[str, Any]
    llm_backend_pool: BackendPool


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `tea-llm` with these arguments, those of the process unless given."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return _USAGE
    _log_to_stderr(args.verbose)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        return _NO_READER
    except (_UsageError, SettingsError) as exc:
        return _complain(exc, _USAGE)
    except WorkflowError as exc:
        return _complain(exc, _USAGE if exc.node is None else _FAILED)
    except (_FailedError, LlmError) as exc:
        return _complain(exc, _FAILED)
    return code


def _complain(exc: Exception, code: int) -> int:
    print(f"tea-llm: {exc}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tea-llm",
        description="Run language-model workflows, or ask a model, on this machine or over an OpenAI-compatible API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tea-llm {__tea_actions__['version']}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--gguf", metavar="PATH", help="the model file to load; before any other, and implies local")
    shared.add_argument("--backend", choices=("local", "api", "auto"), help="who answers (a --gguf alone means local)")
    shared.add_argument("-v", "--verbose", action="count", default=0, help="log what happens; twice for everything")

    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--system", metavar="TEXT", help="a system message")
    asking.add_argument("--model", metavar="NAME", help="the model that an API is asked for")
    asking.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default 0.7)")
    asking.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    asking.add_argument("--seed", type=int, metavar="N", help="the same answer for the same seed")
    asking.add_argument("--json", action="store_true", help="print the whole result as JSON, not only the text")

    run = _add(commands, "run", _run, [shared], "Run a workflow file and print its final state as JSON.")
    run.add_argument("file", metavar="FILE", help="the workflow, YAML")
    run.add_argument("--input", metavar="JSON|@FILE", help="a JSON object put over the initial state; @- reads stdin")

    call = _add(commands, "call", _call, [shared, asking], "Continue a prompt and print the text.")
    call.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    call.add_argument("--max-tokens", type=int, default=100, metavar="N", help="default %(default)s")

    chat = _add(commands, "chat", _chat, [shared, asking], "Answer a message; without one, talk until end of input.")
    chat.add_argument("message", metavar="MESSAGE", nargs="?", help="the message; - reads stdin")
    chat.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="per answer, default %(default)s")

    embed = _add(commands, "embed", _embed, [shared], "Print the vector of a text, or of many, as JSON.")
    embed.add_argument("text", metavar="TEXT", nargs="*", help="the texts")
    embed.add_argument("--file", metavar="PATH", help="a file with one text a line; - reads stdin")
    embed.add_argument("--model", metavar="NAME", help="the embedding model that an API is asked for")
    embed.add_argument("--dimensions", type=int, metavar="N", help="cut each vector to its first N numbers")
    embed.add_argument("--no-normalize", action="store_true", help="leave the vectors at their own length")

    _add(commands, "info", _info, [shared], "Print versions, and the model and the API that would be used.")
    return parser


def _add(
    commands: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    parents: list[argparse.ArgumentParser],
    description: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=parents,
        help=description[0].lower() + description[1:].rstrip("."),
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


# --- the commands ----------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from .workflow import run_workflow  # here, since no other command needs YAML and Jinja2

    given = _input(args.input)
    with _loading() as progress, redirect_stdout(sys.stderr):  # stdout is for the state, whatever a node prints
        state = run_workflow(args.file, given, gguf=args.gguf, backend=args.backend, progress=progress)
    _print_json(state)
    return _OK


def _call(args: argparse.Namespace) -> int:
    with _actions(args) as actions:
        _ask(actions["llm.stream"], args, prompt=_text(args.prompt), system=args.system)
    return _OK


def _chat(args: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with _actions(args) as actions:
        for message in [_text(args.message)] if args.message is not None else _typed():
            messages.append({"role": "user", "content": message})
            answer = _ask(actions["llm.stream"], args, messages=messages)
            messages.append({"role": "assistant", "content": answer})
    return _OK


def _embed(args: argparse.Namespace) -> int:
    texts = [*args.text, *(_text_of(args.file).splitlines() if args.file else ())]
    if not texts:
        raise _UsageError("nothing to embed; give TEXT, or --file with one text a line")
    options = {"model": args.model, "dimensions": args.dimensions, "normalize": not args.no_normalize}
    answer: dict[str, Any] = {}
    with _actions(args) as actions:
        for batch in _with_bar(_batches(texts)):
            part = _checked(actions["llm.embed"](state={}, text=batch, **options))
            answer = _joined(answer, part) if answer else part
    if len(texts) == 1:
        del answer["embeddings"]
    _print_json(answer)
    return _OK


def _info(args: argparse.Namespace) -> int:
    path = resolve_model_path(LlmSettings(), args.gguf)
    endpoint = resolve_api(LlmSettings())
    address = urlsplit(endpoint.base_url)
    backend = args.backend or ("local" if args.gguf else "auto")
    found = {"path": path, "found_by": _found_by(path, args.gguf), **get_model_info(path)} if path else None
    _print_json({
        "tea_llm": __tea_actions__["version"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": _extension(),
        "backend": ("local" if path else "api") if backend == "auto" else backend,
        "model": found,
        "api": {
            "provider": endpoint.provider,
            "address": address._replace(netloc=address.netloc.rpartition("@")[2]).geturl(),
            "missing": missing_credentials(endpoint),
        },
    })
    return _OK


def _found_by(path: str, gguf: str | None) -> str:
    """Which step of the search gave a model."""
    for name, value in (("--gguf", gguf), ("TEA_MODEL_PATH", os.environ.get("TEA_MODEL_PATH"))):
        if value and expand_path(value) == path:
            return name
    return f"the search in {Path(path).parent}"


def _extension() -> dict[str, Any]:
    """Whether llama.cpp is in this installation, and if not, in whose words."""
    try:
        importlib.import_module("tea_llm._llama")
    except ImportError as exc:
        return {"built": False, "reason": str(exc)}
    return {"built": True}


# --- asking ----------------------------------------------------------------------------------------------------------


@contextmanager
def _actions(args: argparse.Namespace) -> Iterator[dict[str, ActionFunction]]:
    """The actions, with the command line's choice of a model; what they loaded is closed at the end."""
    overrides = {"model_path": args.gguf, "backend": args.backend or (None if args.gguf else "auto")}
    with _loading() as progress:
        pool = BackendPool(progress=progress)
        registry: dict[str, ActionFunction] = {}
        register_actions(registry, _Engine({k: v for k, v in overrides.items() if v is not None}, pool))
        try:
            yield registry
        finally:
            pool.close()


def _ask(action: ActionFunction, args: argparse.Namespace, **request: Any) -> str:
    """The answer, printed: as it comes on a terminal, whole elsewhere, all of the result as JSON where asked."""
    streaming = sys.stdout.isatty() and not args.json
    reader_gone = False

    def show(chunk: str) -> bool:
        nonlocal reader_gone
        try:
            print(chunk, end="", flush=True)
        except BrokenPipeError:
            reader_gone = True
        return not reader_gone

    names = ("model", "max_tokens", "temperature", "stop", "seed")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    result = action(state={}, callback=show if streaming else None, **request, **options)
    if reader_gone:
        raise BrokenPipeError
    _checked(result)
    if args.json:
        _print_json({key: value for key, value in result.items() if key not in ("streamed", "chunk_count")})
    else:
        print("" if streaming else result["content"], flush=True)
    return str(result["content"])


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """An action's result. Raises _FailedError where it is a failure."""
    if result.get("success") is False:
        raise _FailedError(result["error"])
    return result


def _typed() -> Iterator[str]:
    """The lines of stdin that say something; on a terminal, each after a prompt."""
    talking = sys.stdin.isatty()
    if talking:
        print("Say something; end with Ctrl-D.", file=sys.stderr)
        with suppress(ImportError):
            importlib.import_module("readline")  # line editing and history for input()
    while True:
        if talking:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if line.strip():
            yield line


def _batches(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + _EMBED_BATCH] for i in range(0, len(texts), _EMBED_BATCH)]


def _with_bar(batches: list[list[str]]) -> Iterable[list[str]]:
    """The batches; on a terminal, with a bar that says how many are done."""
    if len(batches) == 1 or not sys.stderr.isatty():
        return batches
    from tqdm import tqdm

    return tqdm(batches, unit="batch")


def _joined(answer: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Two batches as one answer. Raises _FailedError where two models gave them: such vectors don't compare."""
    if (part["model"], part["dimensions"]) != (answer["model"], answer["dimensions"]):
        raise _FailedError(f"the texts were embedded by {answer['model']!r}, then by {part['model']!r}; start again")
    usage = {key: answer["usage"].get(key, 0) + value for key, value in part["usage"].items()}
    embeddings = [*answer["embeddings"], *part["embeddings"]]
    return {**answer, "embeddings": embeddings, "usage": usage, "tokens_used": usage.get("total_tokens")}


# --- in and out ------------------------------------------------------------------------------------------------------


def _input(text: str | None) -> dict[str, Any]:
    """The object that `--input` gives, {} without one."""
    if text is None:
        return {}
    source = _text_of(text[1:]) if text.startswith("@") else text
    try:
        value = json.loads(source)
    except ValueError as exc:
        raise _UsageError(f"--input is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise _UsageError(f"--input is {source.strip()!r:.60}; give a JSON object")
    return value


def _text(argument: str) -> str:
    return _text_of("-") if argument == "-" else argument


def _text_of(path: str) -> str:
    """What a file holds, or stdin for `-`."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise _UsageError(f"can't read {path}: {exc}") from exc


def _print_json(value: Any) -> None:
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    try:
        text = json.dumps(value, ensure_ascii=plain, indent=2, default=str, allow_nan=False)
        text.encode(errors="strict")
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can carry
        text = json.dumps(value, indent=2, default=str)
    except (TypeError, ValueError) as exc:
        raise _FailedError(f"the result can't be written as JSON: {exc}") from exc
    print(text)


def _log_to_stderr(verbosity: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("tea_llm")
    log.handlers = [handler]
    log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    log.propagate = False


@contextmanager
def _loading() -> Iterator[Callable[[float], object] | None]:
    """What to tell of a model's loading, 0 to 1: a bar on a terminal once it takes a while; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    started = time.monotonic()
    bar: tqdm[Any] | None = None

    def show(fraction: float) -> None:
        nonlocal bar
        from tqdm import tqdm

        if bar is None and fraction < 1 and time.monotonic() - started > _BAR_AFTER_S:
            bar = tqdm(total=100, desc="loading", unit="%", leave=False, bar_format="{desc} {percentage:3.0f}% |{bar}|")
        if bar is not None:
            bar.update(round(fraction * 100) - bar.n)
            if fraction >= 1:
                bar.close()
                bar = None

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()

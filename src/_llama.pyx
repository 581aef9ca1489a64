# cython: language_level=3, freethreading_compatible=True, binding=True
"""llama.cpp in this process: Model, Context, Grammar, Sampler, Generation.

The call shape is always the same: check the arguments, one C call without the GIL, check its result, copy out.
A Context and what works on it belong to one thread at a time; a second one gets EngineError, not a crash.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_DecodeUTF8, PyUnicode_DecodeUTF8Stateful
from libc.limits cimport INT_MIN
from libc.math cimport isfinite, sqrt
from libc.stdint cimport INT32_MIN, int8_t, int32_t, int64_t, uint8_t, uint32_t
from libcpp cimport bool
from libcpp.atomic cimport atomic
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector
from posix.unistd cimport getpid

from llama cimport *

import logging
import os
import re
import stat

from tea_llm import errors

__all__ = [
    "ChatParser", "ChatPrompt", "Context", "Generation", "Grammar", "Loading", "Model", "Sampler", "devices",
    "llama_version", "state_layout", "supports_gpu_offload", "system_info",
]

cdef extern from *:
    """
    static int64_t tea_now_us() { return ggml_time_us(); }
    """
    int64_t now_us "tea_now_us"() noexcept nogil

cdef extern from "guard.hpp" namespace "tea" nogil:
    PyObject* engine_fault

engine_fault = <PyObject*>errors.EngineFault  # the imported module keeps it alive
install()
common_log_set_verbosity_thold(INT_MIN)  # the logger of llama.cpp's common library writes to stderr, from a thread of its own
llama_backend_init()

_logger = logging.getLogger("tea_llm.llama")

# llama.cpp's warnings are hints for its developers, and its errors are told by the exception that follows them: neither
# may reach a user's stderr by itself, where logging was never set up.
_PYTHON_LEVEL = {2: logging.DEBUG, 3: logging.INFO, 4: logging.INFO}


cdef void _listen():
    """Before a call: forget the last call's words, and keep the log lines that logging wants."""
    take_last_words()
    set_log_level(2 if _logger.isEnabledFor(logging.DEBUG) else 3 if _logger.isEnabledFor(logging.INFO) else 5)


cdef str _last_words():
    """After a call: hand the log lines to logging, and give the error lines of this call."""
    cdef LogLine line
    while take_log_line(line):
        text = line.text.decode("utf-8", "replace").rstrip()
        if text:
            _logger.log(_PYTHON_LEVEL.get(line.level, logging.DEBUG), "%s", text)
    return take_last_words().decode("utf-8", "replace") or "llama.cpp gave no reason"


def llama_version() -> str:
    """Version of the llama.cpp that is linked in."""
    return llama_version_bytes().decode()


def state_layout() -> str:
    """How a Context lays out what it has computed, as far as that is chosen; a state of another layout doesn't fit."""
    cdef llama_context_params params = llama_context_default_params()
    return (f"state format {LLAMA_STATE_SEQ_VERSION}, key type {params.type_k}, value type {params.type_v}, "
            f"flash attention {<int>params.flash_attn_type}, whole windows {<int>params.swa_full}")


def system_info() -> str:
    """CPU features and build options in use, in llama.cpp's words."""
    return llama_print_system_info().decode()


def supports_gpu_offload() -> bool:
    """Whether this build has a GPU backend and a device to use with it."""
    return llama_supports_gpu_offload()


def devices() -> list:
    """The devices llama.cpp can compute on: a list of {name, description, memory_free, memory_total} (bytes)."""
    cdef size_t free = 0, total = 0
    found = []
    for i in range(ggml_backend_dev_count()):
        device = ggml_backend_dev_get(i)
        ggml_backend_dev_memory(device, &free, &total)
        found.append({
            "name": ggml_backend_dev_name(device).decode(),
            "description": ggml_backend_dev_description(device).decode(),
            "memory_free": free,
            "memory_total": total,
        })
    return found


_LARGE_FILE_BYTES = 32 << 20  # below it a second thread costs more than it brings


cdef class Loading:
    """Watches and cancels a load from another thread."""

    cdef atomic[float] _fraction
    cdef atomic[bool] _cancelled
    cdef LoadMemory* _memory
    cdef int64_t _looked_us      # when signals were last looked for
    cdef object _interrupt       # what a signal handler raised

    @property
    def fraction(self) -> float:
        """How much has been loaded, from 0 to 1."""
        return self._fraction.load()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.load()

    def cancel(self) -> None:
        """End the load at the next tensor; it raises Cancelled."""
        self._cancelled.store(True)

    cdef bint _goes_on(self, float fraction) noexcept nogil:
        self._fraction.store(fraction)
        self._memory.progress(fraction)
        if now_us() - self._looked_us > 20_000:
            self._looked_us = now_us()
            with gil:
                self._look_for_signals()
        return not self._cancelled.load()

    cdef void _look_for_signals(self) noexcept:
        """On the main thread, run the handlers of signals that came; what one raises ends the load."""
        try:
            PyErr_CheckSignals()
        except BaseException as exc:
            self._interrupt = exc
            self._cancelled.store(True)


cdef bool _on_progress(float fraction, void* loading) noexcept nogil:
    return (<Loading>loading)._goes_on(fraction)


cdef class Model:
    """A loaded GGUF file: weights and vocabulary. Freed with its last reference; its contexts keep it alive.

    Loading releases the GIL, and on the main thread Ctrl-C ends it. `split_load` reads the weights on a second thread,
    beside the vocabulary; None does so for large files. `load_mtp` also loads the layers that predict tokens after the
    next one (multi-token prediction), for a Context's `draft`. Reading a model is safe from any thread.

    Raises ModelNotFound, ModelLoadError with llama.cpp's own words, MemoryError, or Cancelled through `loading`.
    """

    cdef llama_model* _model         # the weights
    cdef llama_model* _words         # vocabulary and templates: the same, or one loaded beside it (split_load.hpp)
    cdef const llama_vocab* _vocab   # of _words
    cdef ControlTexts* _controls     # of _vocab
    cdef dict _templates             # compiled chat templates by their source, the last used last
    cdef GuidedVocab* _guided        # made for the first grammar of llguidance's
    cdef int _pid
    cdef bint _with_mtp
    cdef list _ends                  # the tokens that end a text, once somebody asked
    cdef readonly str path
    cdef readonly int n_vocab

    def __init__(self, path, *, int n_gpu_layers=-1, bint use_mmap=True, bint use_mlock=False, bint vocab_only=False,
                 bint check_tensors=False, bint load_mtp=False, Loading loading=None, split_load=None):
        if self._model != NULL:
            raise errors.EngineError("this Model is loaded already; make a new one")
        self.path = str(path)
        cdef bytes encoded = _path_bytes(self.path)
        if loading is None:
            loading = Loading()
        cdef llama_model_params params = llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if use_mmap:
            params.load_mode = LLAMA_LOAD_MODE_MMAP_MLOCK if use_mlock else LLAMA_LOAD_MODE_MMAP
        else:
            params.load_mode = LLAMA_LOAD_MODE_MLOCK if use_mlock else LLAMA_LOAD_MODE_NONE
        params.vocab_only = vocab_only
        params.check_tensors = check_tensors
        params.load_mtp = self._with_mtp = load_mtp
        params.progress_callback = _on_progress
        params.progress_callback_user_data = <void*>loading
        self._templates = {}
        self._pid = getpid()
        cdef const char* c_path = encoded
        cdef bytes real_path = os.fsencode(os.path.realpath(self.path))
        _listen()
        loading._memory = new LoadMemory(real_path)
        try:
            if split_load is None:
                split_load = os.stat(self.path).st_size >= _LARGE_FILE_BYTES and (os.cpu_count() or 1) > 1
            if split_load and not vocab_only:
                self._load_split(c_path, params, loading)
            if self._model == NULL and not loading._cancelled.load():
                take_last_words()
                with nogil:
                    self._model = self._words = load_model(c_path, params)
        finally:
            del loading._memory
        words = _last_words()
        if self._model == NULL:
            if loading._interrupt is not None:
                raise loading._interrupt
            if loading.cancelled:
                raise errors.Cancelled(f"loading {self.path} was cancelled")
            raise errors.ModelLoadError(f"{self.path} could not be loaded: {words}")
        self._vocab = llama_model_get_vocab(self._words)
        self.n_vocab = llama_vocab_n_tokens(self._vocab)
        self._controls = new ControlTexts(self._vocab)

    cdef int _load_split(self, const char* path, const llama_model_params& params, Loading loading) except -1:
        """Weights and vocabulary side by side; neither where that fails, and the plain way says why."""
        cdef llama_model_params words_only = params
        cdef bint done = False
        words_only.vocab_only = True
        words_only.progress_callback = NULL
        cdef SplitLoad* split = NULL
        try:
            split = new SplitLoad(path, params)  # RuntimeError: no thread to be had
            with nogil:
                self._words = load_model(path, words_only)
            while not done:
                with nogil:
                    done = split.wait_ms(20)
                loading._look_for_signals()
        except (errors.EngineFault, RuntimeError, MemoryError):
            pass
        finally:
            if self._words != NULL and done:
                self._model = split.take()
            with nogil:
                del split
            if self._model == NULL and self._words != NULL:
                llama_model_free(self._words)
                self._words = NULL
        return 0

    def __dealloc__(self):
        if self._model != NULL and self._pid == getpid():
            del self._guided
            del self._controls
            with nogil:
                if self._words != self._model:
                    llama_model_free(self._words)
                llama_model_free(self._model)

    cdef int _check(self) except -1:
        """Every method calls it first: __init__ may have failed, and a child process has no threads of its parent."""
        if self._model == NULL:
            raise errors.EngineClosed("this Model was never loaded")
        if self._pid != getpid():
            raise errors.EngineClosed(
                "this Model was loaded before fork(); load it again in this process, or start processes with 'spawn'")
        return 0

    # --- what the file says -------------------------------------------------------------------------------------------
    @property
    def metadata(self) -> dict:
        """The file's scalar metadata, each value as text; arrays are left out (llama.h, llama_model_meta_*)."""
        self._check()
        found = {}
        for i in range(llama_model_meta_count(self._model)):
            found[_text_of(self._model, i, False)] = _text_of(self._model, i, True)
        return found

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in a few words."""
        self._check()
        cdef char buffer[256]
        llama_model_desc(self._model, buffer, sizeof(buffer))
        return (<bytes>buffer).decode("utf-8", "replace")

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained for, in tokens."""
        self._check()
        return llama_model_n_ctx_train(self._model)

    @property
    def n_embd(self) -> int:
        """Length of an embedding vector."""
        self._check()
        return llama_model_n_embd_out(self._model)

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        self._check()
        return llama_model_n_layer(self._model)

    @property
    def n_head_kv(self) -> int:
        """Number of key/value heads of the first layer."""
        self._check()
        if llama_model_n_layer(self._model) == 0:  # llama.cpp aborts
            return 0
        return llama_model_n_head_kv(self._model)

    @property
    def n_params(self) -> int:
        """Number of weights."""
        self._check()
        return llama_model_n_params(self._model)

    @property
    def size_bytes(self) -> int:
        """Size of all weights."""
        self._check()
        return llama_model_size(self._model)

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder (BERT, T5)."""
        self._check()
        return llama_model_has_encoder(self._model)

    @property
    def has_decoder(self) -> bool:
        """Whether the model can generate text."""
        self._check()
        return llama_model_has_decoder(self._model)

    @property
    def shares_prefixes(self) -> bool:
        """Whether texts that begin alike can share what was computed: not with a sliding window or a recurrent state."""
        self._check()
        return not (llama_model_n_swa(self._model) > 0 or self.is_recurrent)

    @property
    def is_recurrent(self) -> bool:
        """Whether some of its layers, or all, keep a state in place of each token's keys and values."""
        self._check()
        return llama_model_is_recurrent(self._model) or llama_model_is_hybrid(self._model)

    @property
    def n_mtp_layer(self) -> int:
        """Layers in the file that predict tokens after the next one (multi-token prediction)."""
        metadata = self.metadata
        text = metadata.get(f"{metadata.get('general.architecture')}.nextn_predict_layers", "")
        return int(text) if text.isdecimal() else 0

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja chat template, or None."""
        self._check()
        cdef const char* template = llama_model_chat_template(self._words, NULL)
        return None if template == NULL else template.decode("utf-8", "replace")

    def apply_chat_template(self, messages, *, tools=None, tool_choice="auto", parallel_tool_calls=None,
                            template_kwargs=None, enable_thinking=None, json_schema=None, add_generation_prompt=True,
                            reasoning_format="auto", template=None, variant=None) -> ChatPrompt:
        """The prompt for `messages` and `tools`, rendered by llama.cpp's chat code, with how its answer is to be read.

        The template is `template` (Jinja), or the file's: its `variant` ("tool_use" and the like), or what llama.cpp
        takes. `tool_choice` is "auto", "none", "required", or the name of the one tool to call, which is then the only
        one that is shown. What is None is as in llama.cpp's server: calls in parallel and thinking where the template
        knows them. A last message of the assistant is gone on from, unless `add_generation_prompt` is False.

        Raises BadRequest when there is no such template or tool, or the template refuses what it gets.
        """
        import json

        if template is None:
            template = self._file_template(variant)
        request = {"messages": list(messages), "tool_choice": tool_choice, "reasoning_format": reasoning_format,
                   "add_generation_prompt": add_generation_prompt}
        if tools:
            request["tools"] = list(tools)
        if tool_choice not in ("auto", "none", "required"):
            request["tools"] = _named_tool(tools or (), tool_choice)
            request["tool_choice"] = "required"
        kwargs = dict(template_kwargs or {})
        if enable_thinking is not None:
            kwargs["enable_thinking"] = enable_thinking
        if "enable_thinking" in kwargs:
            if type(kwargs["enable_thinking"]) is not type(True):
                raise errors.BadRequest(f"enable_thinking is {kwargs['enable_thinking']!r}; give True or False")
            request["enable_thinking"] = kwargs["enable_thinking"]
        if kwargs:
            request["chat_template_kwargs"] = kwargs
        if json_schema is not None:
            request["json_schema"] = json_schema
        if parallel_tool_calls is not None:
            request["parallel_tool_calls"] = parallel_tool_calls
        cdef string encoded
        try:
            encoded = json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise errors.BadRequest(
                f"messages and tools can't be written as JSON: {exc}; keep them to texts, numbers and mappings") from exc
        cdef ChatPrompt prompt = ChatPrompt.__new__(ChatPrompt)
        cdef _Template compiled
        try:
            compiled = self._compiled(template)
            with nogil:
                prompt._params = compiled._template.apply(encoded, prompt._rendered)
        except errors.EngineFault as exc:
            raise errors.BadRequest(f"the chat template of {self.path} can't render these messages: {exc}") from exc
        prompt.model = self
        prompt.reasoning_format = reasoning_format
        return prompt

    cdef str _file_template(self, variant):
        """The source of the file's template of that name, "" for the one that llama.cpp takes."""
        self._check()
        cdef bytes name = b"" if variant is None else _utf8(variant, "the template's name")
        cdef const char* c_name = name
        if variant is None:
            c_name = NULL
        cdef const char* source = llama_model_chat_template(self._words, c_name)
        if source == NULL and variant is not None:
            raise errors.BadRequest(f"{self.path} has no chat template named {variant!r}; leave the name out")
        if source == NULL:
            raise errors.BadRequest(f"{self.path} has no chat template; name a chat_format or give a prompt")
        return "" if variant is None else source.decode("utf-8", "replace")

    cdef _Template _compiled(self, str source):
        """`source` as llama.cpp runs it, compiled once; "" is the file's own."""
        cdef string encoded = _utf8(source, "the chat template")
        cdef _Template compiled = self._templates.pop(source, None)
        if compiled is None:
            compiled = _Template()
            with nogil:
                compiled._template = new ChatTemplate(self._words, encoded, self._controls)
            while len(self._templates) >= _MAX_TEMPLATES:
                self._templates.pop(next(iter(self._templates)), None)
        self._templates[source] = compiled
        return compiled

    # --- vocabulary ---------------------------------------------------------------------------------------------------
    @property
    def bos(self) -> int:
        """Token that begins a text, or -1."""
        self._check()
        return llama_vocab_bos(self._vocab)

    @property
    def eos(self) -> int:
        """Token that ends a text, or -1."""
        self._check()
        return llama_vocab_eos(self._vocab)

    @property
    def eot(self) -> int:
        """Token that ends a turn, or -1."""
        self._check()
        return llama_vocab_eot(self._vocab)

    @property
    def add_bos(self) -> bool:
        """Whether tokenize begins a text with `bos`."""
        self._check()
        return llama_vocab_get_add_bos(self._vocab)

    def is_eog(self, token) -> bool:
        """Whether `token` ends a generation. So does BOS: it begins another document."""
        return ends_text(self._vocab, self._check_tokens([token])[0])

    cdef list _end_tokens(self):
        """The tokens that end a text. They are looked for in the whole vocabulary, once."""
        cdef llama_token token
        if self._ends is None:
            self._ends = [token for token in range(self.n_vocab) if ends_text(self._vocab, token)]
        return self._ends

    def fim_token(self, str part not None) -> int | None:
        """The token that marks a part of an infill prompt: "pre", "suf", "mid", "rep" or "sep"; None: there is none."""
        cdef llama_token token
        if part == "pre":
            token = llama_vocab_fim_pre(self._vocab)
        elif part == "suf":
            token = llama_vocab_fim_suf(self._vocab)
        elif part == "mid":
            token = llama_vocab_fim_mid(self._vocab)
        elif part == "rep":
            token = llama_vocab_fim_rep(self._vocab)
        elif part == "sep":
            token = llama_vocab_fim_sep(self._vocab)
        else:
            raise errors.BadRequest(f"{part!r} is no part of an infill prompt; give pre, suf, mid, rep or sep")
        return None if token < 0 else token

    def is_control(self, token) -> bool:
        """Whether `token` is a control token, which has no text of its own."""
        return llama_vocab_is_control(self._vocab, self._check_tokens([token])[0])

    def tokenize(self, str text, *, bint add_special=True, bint parse_special=False) -> list:
        """The tokens of `text`. `add_special` adds BOS/EOS as the model wants; `parse_special` reads control tokens.

        Raises BadRequest for text that is no Unicode (lone surrogates).
        """
        self._check()
        cdef vector[llama_token] tokens
        self._tokenize(text, add_special, parse_special, tokens)
        return [tokens[i] for i in range(tokens.size())]

    cdef int _tokenize(self, str text, bint add_special, bint parse_special, vector[llama_token]& out) except -1:
        cdef bytes encoded = _utf8(text, "the text")
        if len(encoded) > 2**31 - 64:
            raise errors.BadRequest(f"the text has {len(encoded)} bytes; llama.cpp takes less than 2 GiB at once")
        cdef const char* c_text = encoded
        cdef int32_t n_text = len(encoded), n
        _listen()
        with nogil:
            out.resize(n_text // 2 + 8)
            n = tokenize(self._vocab, c_text, n_text, out.data(), out.size(), add_special, parse_special)
            if n < 0 and n != INT32_MIN:
                out.resize(-n)
                n = tokenize(self._vocab, c_text, n_text, out.data(), out.size(), add_special, parse_special)
        if n < 0:
            raise errors.EngineError(f"a text of {n_text} bytes could not be tokenized: {_last_words()}")
        out.resize(n)
        return 0

    def tokenize_parts(self, parts) -> list:
        """The tokens of a text given as (text, read): control tokens are read in those parts only where `read` is true.

        What stands between two control tokens is tokenized in one piece.
        """
        self._check()
        cdef Rendered rendered
        cdef bytes encoded
        cdef size_t begin
        for text, read in parts:
            encoded = _utf8(text, "the text")
            begin = rendered.text.size()
            rendered.text.append(<string>encoded)
            if not read and encoded:
                rendered.literal.push_back(pair[size_t, size_t](begin, rendered.text.size()))
        return self._tokens(rendered)

    cdef list _tokens(self, const Rendered& rendered):
        cdef vector[llama_token] tokens
        if rendered.text.size() > 2**31 - 64:
            raise errors.BadRequest(f"the text has {rendered.text.size()} bytes; llama.cpp takes less than 2 GiB at once")
        with nogil:
            tokens = self._controls.tokenize(rendered.text, rendered.literal)
        return [tokens[i] for i in range(tokens.size())]

    def detokenize(self, tokens, *, bint remove_special=False, bint unparse_special=False) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD. `unparse_special` writes control tokens out."""
        cdef vector[llama_token] ids = self._check_tokens(tokens)
        cdef vector[char] text
        cdef int32_t n
        with nogil:
            text.resize(ids.size() * 8 + 16)
            n = detokenize(self._vocab, ids.data(), ids.size(), text.data(), text.size(), remove_special, unparse_special)
            if n < 0:
                text.resize(-n)
                n = detokenize(self._vocab, ids.data(), ids.size(), text.data(), text.size(), remove_special,
                               unparse_special)
        return PyUnicode_DecodeUTF8(text.data(), n, "replace")

    def piece(self, token, *, bint special=False) -> bytes:
        """The bytes of one token, which need not be whole characters. `special` writes control tokens out."""
        cdef llama_token checked = self._check_tokens([token])[0]
        cdef string piece
        read_piece(self._vocab, checked, special, piece)
        return piece

    cdef vector[llama_token] _check_tokens(self, tokens) except *:
        """`tokens` as C integers. llama.cpp reads past its tables for an id that is out of range."""
        self._check()
        cdef vector[llama_token] ids
        cdef int64_t token
        ids.reserve(len(tokens))
        for value in tokens:
            try:
                token = value
            except OverflowError:
                token = -1
            if not 0 <= token < self.n_vocab:
                raise errors.BadRequest(f"token {value} is not in the vocabulary; ids go from 0 to {self.n_vocab - 1}")
            ids.push_back(<llama_token>token)
        return ids

    def __repr__(self):
        return f"Model({self.path!r})"


_MAX_TEMPLATES = 8  # compiled for one model


cdef class _Template:
    """A compiled chat template."""

    cdef ChatTemplate* _template

    def __dealloc__(self):
        with nogil:
            del self._template


cdef list _named_tool(tools, name):
    """The one of `tools` that is named so."""
    try:
        named = [tool for tool in tools if tool["function"]["name"] == name]
    except (KeyError, TypeError) as exc:
        raise errors.BadRequest(f"a tool has no name: {exc}; give {{'type': 'function', 'function': {{'name': …}}}}") from exc
    if not named:
        raise errors.BadRequest(
            f"tool_choice is {name!r}, which none of the tools is named; choose 'auto', 'none', 'required' or a tool")
    return named[:1]


_TRIGGER_KINDS = {
    COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN: "token",
    COMMON_GRAMMAR_TRIGGER_TYPE_WORD: "word",
    COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: "pattern",
    COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: "pattern_full",
}


cdef class ChatPrompt:
    """A rendered prompt, and what the template's family says about its answer (common/chat.h, common_chat_params)."""

    cdef common_chat_params _params
    cdef Rendered _rendered
    # the vocabulary of its tokens
    cdef readonly Model model
    cdef readonly str reasoning_format

    @property
    def text(self) -> str:
        """The prompt."""
        return _decoded(self._rendered.text)

    def tokenize(self) -> list:
        """The prompt's tokens: the template's control tokens, and none that a message or a tool spells out."""
        self.model._check()
        return self.model._tokens(self._rendered)

    def parser(self) -> ChatParser:
        """What takes an answer to it apart; a new one for each answer."""
        return ChatParser(self)

    @property
    def generation_prompt(self) -> str:
        """What the prompt ends with that already belongs to the answer."""
        return _decoded(self._params.generation_prompt)

    @property
    def grammar(self) -> str:
        """GBNF that the answer must match, or ""."""
        return _decoded(self._params.grammar)

    @property
    def grammar_lazy(self) -> bool:
        """Whether the grammar begins where one of `grammar_triggers` is found, and not with the answer."""
        return self._params.grammar_lazy

    @property
    def grammar_triggers(self) -> list:
        """What begins a lazy grammar: (kind, value, token), kind `token`, `word`, `pattern` or `pattern_full`."""
        found = []
        cdef common_grammar_trigger trigger
        for trigger in self._params.grammar_triggers:
            found.append((_TRIGGER_KINDS[trigger.type], _decoded(trigger.value), trigger.token))
        return found

    @property
    def preserved_tokens(self) -> list:
        """Texts of tokens that are part of the answer's markup, so that the reader must see them."""
        return [_decoded(text) for text in self._params.preserved_tokens]

    @property
    def stops(self) -> list:
        """Texts that end the answer."""
        return [_decoded(text) for text in self._params.additional_stops]

    @property
    def supports_thinking(self) -> bool:
        """Whether the model can think before it answers."""
        return self._params.supports_thinking

    @property
    def thinking_start_tag(self) -> str:
        """What begins its thinking, or ""."""
        return _decoded(self._params.thinking_start_tag)

    @property
    def thinking_end_tags(self) -> list:
        """What can end its thinking."""
        return [_decoded(tag) for tag in self._params.thinking_end_tags]

    def __repr__(self):
        return f"ChatPrompt({self.text!r:.80})"


cdef str _decoded(const string& text):
    return PyUnicode_DecodeUTF8(text.data(), text.size(), "replace")


cdef bytes _utf8(str text, str what):
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise errors.BadRequest(f"{what} is not valid Unicode: {exc}") from exc


cdef bytes _path_bytes(str path):
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise errors.ModelNotFound(f"no model file at {path} ({exc.strerror}); check the path") from exc
    except ValueError as exc:
        raise errors.ModelNotFound(f"{path!r} is no path: {exc}") from exc
    if not stat.S_ISREG(mode):
        raise errors.ModelLoadError(f"{path} is not a regular file; give the path of a GGUF file")
    return os.fsencode(path)


cdef str _text_of(const llama_model* model, int32_t i, bint value):
    """Key or value of the i-th metadata entry, whatever its length."""
    cdef vector[char] buffer
    cdef int32_t n
    buffer.resize(256)
    while True:
        if value:
            n = llama_model_meta_val_str_by_index(model, i, buffer.data(), buffer.size())
        else:
            n = llama_model_meta_key_by_index(model, i, buffer.data(), buffer.size())
        if n < 0:
            return ""
        if <size_t>n < buffer.size():
            return PyUnicode_DecodeUTF8(buffer.data(), n, "replace")
        buffer.resize(n + 1)


_POOLING = {
    None: LLAMA_POOLING_TYPE_UNSPECIFIED,
    "none": LLAMA_POOLING_TYPE_NONE,
    "mean": LLAMA_POOLING_TYPE_MEAN,
    "cls": LLAMA_POOLING_TYPE_CLS,
    "last": LLAMA_POOLING_TYPE_LAST,
    "rank": LLAMA_POOLING_TYPE_RANK,
}


_POOLS_TO_ONE_VECTOR = (LLAMA_POOLING_TYPE_MEAN, LLAMA_POOLING_TYPE_CLS, LLAMA_POOLING_TYPE_LAST)


_FLASH_ATTN = {
    None: LLAMA_FLASH_ATTN_TYPE_AUTO,
    False: LLAMA_FLASH_ATTN_TYPE_DISABLED,
    True: LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


_DRAFTS = {"mtp": COMMON_SPECULATIVE_TYPE_DRAFT_MTP, "ngram": COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE}


cdef int _check_draft(Model model, draft) except -1:
    """Refuse what can't guess for `model`."""
    cdef Model other
    if isinstance(draft, Model):
        other = draft
        other._check()
        if other.is_recurrent:
            raise errors.BadRequest(
                f"{other.path} can't guess: it has a recurrent state ({other.description}), and wrong guesses can't be "
                "taken back from it; choose another draft model")
        if other._words != other._model or model._words != model._model:
            raise errors.BadRequest("a model and its draft compare vocabularies; load both with split_load=False")
    elif draft not in _DRAFTS:
        raise errors.BadRequest(f"draft is {draft!r}; give a Model, 'mtp' or 'ngram'")
    elif draft == "mtp" and model.n_mtp_layer == 0:
        raise errors.BadRequest(f"{model.path} has no MTP layers; guess by another model or by 'ngram'")
    elif draft == "mtp" and (not model._with_mtp or model._words != model._model):
        raise errors.BadRequest("guesses by MTP layers need a model loaded with load_mtp=True and split_load=False")
    return 0


cdef bool _is_cancelled(void* flag) noexcept nogil:
    return (<atomic[bool]*>flag).load()


@cython.no_gc_clear
cdef class Context:
    """Memory to compute in: the KV cache and the compute buffers of one model, and the threads that work on them.

    With `embeddings` it computes vectors (pooling None: as the file says), otherwise text. `flash_attn` None leaves the
    choice to llama.cpp. One thread at a time.

    `n_seq_max` texts share the `n_ctx` cells of the KV cache. With `reuse`, texts that ended are kept there while there
    is room, in `n_kept_max` cells at most, so that another text which begins alike need not compute them again; what
    has to leave goes into `n_host_max` bytes of host memory. A recurrent model or one with a sliding window can't share
    a beginning: there a kept text is found by one that continues it. `fill_fours` fills batches up to multiples of four
    rows where that is faster (batch.hpp says when).

    `draft` is what guesses the next `n_draft` tokens of a text for the model to check at once: another Model, "mtp" (the
    model's own MTP layers) or "ngram" (what followed the last tokens where they stood before). It never changes a text.
    The next tokens of all texts and the guesses take `n_draft_rows` of a batch at most (0: `n_draft` and one more), so
    that fewer are guessed for each of several texts.

    Raises BadRequest for sizes llama.cpp can't take and for a `draft` that can't guess for this model, MemoryError or
    EngineError when the context can't be made.
    """

    # keeps the weights alive; no_gc_clear because __dealloc__ needs it
    cdef readonly Model model
    cdef readonly Model draft_model  # None unless another model guesses
    cdef llama_context* _ctx
    cdef llama_context* _draft       # NULL unless a model or layers of it guess
    cdef ggml_threadpool* _threads
    cdef atomic[bool] _busy
    cdef atomic[bool] _cancel
    cdef bint _poisoned
    cdef readonly int n_ctx
    cdef readonly int n_batch
    cdef readonly int n_seq_max
    cdef readonly int n_threads
    cdef Batch* _batch               # the texts being generated; NULL with embeddings
    cdef readonly bint embeddings

    def __init__(self, Model model not None, *, int n_ctx=0, int n_batch=512, int n_ubatch=0, int n_seq_max=1,
                 int n_threads=1, bint embeddings=False, pooling=None, flash_attn=None,
                 bint reuse=True, size_t n_kept_max=2**31, size_t n_host_max=0, bint fill_fours=False,
                 draft=None, int n_draft=3, int n_draft_rows=0):
        if self._ctx != NULL:
            raise errors.EngineError("this Context is made already; make a new one")
        model._check()
        if llama_model_n_layer(model._model) == 0:
            raise errors.BadRequest(f"{model.path} was loaded with vocab_only; load it whole to compute with it")
        for name, value, low, high in (
            ("n_ctx", n_ctx, 0, 2**30), ("n_batch", n_batch, 1, 2**20), ("n_ubatch", n_ubatch, 0, n_batch),
            ("n_seq_max", n_seq_max, 1, 256 - fill_fours), ("n_threads", n_threads, 1, 512),
            ("n_draft", n_draft, 1, 1024), ("n_draft_rows", n_draft_rows, 0, n_batch),
        ):
            if not low <= value <= high:
                raise errors.BadRequest(f"{name} is {value}; give a number from {low} to {high}")
        if pooling not in _POOLING:
            raise errors.BadRequest(
                f"pooling is {pooling!r}; choose one of {', '.join(repr(p) for p in _POOLING if p)}, or None")
        cdef SpeculatorOptions speculation
        if draft is not None:
            _check_draft(model, draft)
            speculation.type = _DRAFTS.get(draft, COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE)
            speculation.n_draft = n_draft
            speculation.n_rows = min(n_draft_rows or n_draft + 1, n_batch)
        self.model = model
        self.embeddings = embeddings
        self.n_seq_max = n_seq_max
        self.n_threads = n_threads
        cdef llama_context_params params = llama_context_default_params()
        params.n_ctx = n_ctx or max(model.n_ctx_train, 8)
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch or n_batch
        params.n_seq_max = n_seq_max + fill_fours
        params.n_threads = n_threads
        params.n_threads_batch = n_threads
        params.embeddings = embeddings
        params.pooling_type = _POOLING[pooling]
        params.flash_attn_type = _FLASH_ATTN[flash_attn]
        params.kv_unified = True
        params.no_perf = True
        # Logits of last tokens only: no buffer for the whole batch.
        params.n_outputs_max = 0 if embeddings else params.n_seq_max + 2 * fill_fours + speculation.n_rows
        params.n_rs_seq = speculation.n_draft  # tokens to take back, where the state is recurrent
        cdef ggml_threadpool_params thread_params
        cdef llama_context* ctx
        _listen()
        with nogil:
            ctx = new_context(model._model, params)
        words = _last_words()
        if ctx == NULL:
            raise errors.EngineError(
                f"no context of {params.n_ctx} tokens for {model.path} could be made: {words}; try a smaller n_ctx")
        self._ctx = ctx
        if not embeddings and (llama_get_memory(ctx) == NULL or model.has_encoder):
            raise errors.ModelError(f"{model.path} is an encoder ({model.description}): it embeds, and can't write text")
        if speculation.n_draft and model.is_recurrent:
            if llama_n_rs_seq(ctx) == 0:
                raise errors.BadRequest(f"no guesses for {model.path}: llama.cpp can't take tokens back from its state")
            # With more, micro-batches move each other's snapshots of the state, and another text's is gone back to.
            if n_seq_max > 1:
                raise errors.BadRequest(
                    f"no guesses for {model.path} with n_seq_max {n_seq_max}: llama.cpp takes tokens back from the "
                    "state of one text only")
        if embeddings and llama_get_pooling_type(ctx) not in _POOLS_TO_ONE_VECTOR:
            raise errors.BadRequest(
                f"pooling {self.pooling!r} does not make one vector of a text; choose 'mean', 'cls' or 'last'")
        self.n_ctx = min(llama_n_ctx(ctx), params.n_ctx)  # it rounds up to 256
        self.n_batch = llama_n_batch(ctx)
        thread_params = ggml_threadpool_params_default(n_threads)
        self._threads = ggml_threadpool_new(&thread_params)
        if self._threads == NULL:
            raise errors.EngineError(f"{n_threads} threads could not be started; try a smaller n_threads")
        ggml_threadpool_pause(self._threads)
        llama_attach_threadpool(ctx, self._threads, self._threads)
        if embeddings:
            llama_set_abort_callback(ctx, _is_cancelled, &self._cancel)
            return
        cdef PrefixCacheOptions options
        options.n_seq = n_seq_max
        options.reuse = reuse
        options.whole = not model.shares_prefixes
        options.n_kept_max = n_kept_max
        options.n_host_max = n_host_max
        if speculation.n_draft and speculation.type != COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE:
            self._make_draft(draft if isinstance(draft, Model) else None, params)
            options.draft = self._draft
        try:
            self._batch = new Batch(ctx, model._vocab, options, fill_fours, speculation)
        except errors.EngineFault as exc:
            if self.draft_model is None:
                raise
            raise errors.BadRequest(
                f"{self.draft_model.path} can't guess for {model.path}: {exc}; choose a draft model with the same "
                "vocabulary, of the same family") from exc

    cdef int _make_draft(self, Model draft_model, llama_context_params params) except -1:
        """A context for guesses, with the same cells and sequences, on the same threads."""
        params.n_ctx = llama_n_ctx(self._ctx)
        params.n_seq_max = params.n_outputs_max = self.n_seq_max
        params.n_rs_seq = 0
        params.ctx_other = self._ctx
        if draft_model is None:
            params.ctx_type = LLAMA_CONTEXT_TYPE_MTP
        cdef llama_model* model = (self.model if draft_model is None else draft_model)._model
        _listen()
        with nogil:
            self._draft = new_context(model, params)
        words = _last_words()
        if self._draft == NULL:
            raise errors.EngineError(f"no context for guesses could be made beside {self!r}: {words}; try a smaller n_ctx")
        if llama_get_memory(self._draft) == NULL:
            raise errors.BadRequest(f"{draft_model.path} can't guess: it is an encoder ({draft_model.description})")
        llama_attach_threadpool(self._draft, self._threads, self._threads)
        self.draft_model = draft_model

    def __dealloc__(self):
        self._free()

    cdef void _free(self) noexcept:
        # A poisoned context is leaked: llama.cpp was left in the middle of its work. So is one of another process.
        cdef Batch* batch = self._batch
        self._batch = NULL  # before the GIL is gone: `wake` may come from any thread
        if self._ctx != NULL and not self._poisoned and self.model._pid == getpid():
            with nogil:
                del batch
                if self._draft != NULL:
                    llama_detach_threadpool(self._draft)
                    llama_free(self._draft)
                llama_detach_threadpool(self._ctx)
                llama_free(self._ctx)
                if self._threads != NULL:
                    ggml_threadpool_free(self._threads)
        self._ctx = self._draft = NULL
        self._threads = NULL

    def close(self) -> None:
        """Free the memory and the threads now. Closing twice is fine.

        Raises EngineError while another thread computes on the context.
        """
        if self._busy.exchange(True):
            raise errors.EngineError("this Context is computing on another thread; cancel that first")
        self._free()
        self._busy.store(False)

    @property
    def closed(self) -> bool:
        """Whether the context was closed."""
        return self._ctx == NULL

    @property
    def poisoned(self) -> bool:
        """Whether llama.cpp failed inside it, so that it can't be used again."""
        return self._poisoned

    @property
    def pooling(self) -> str | None:
        """How the context pools embeddings."""
        self._check()
        kind = llama_get_pooling_type(self._ctx)
        return next((name for name, value in _POOLING.items() if name and value == kind), None)

    def cancel(self) -> None:
        """End the `embed` that runs now, from any thread; a CPU computation stops within one graph node."""
        self._cancel.store(True)

    cdef int _check(self) except -1:
        if self._ctx == NULL:
            raise errors.EngineClosed("this Context is closed; make a new one")
        if self._poisoned:
            raise errors.EngineClosed("llama.cpp failed inside this Context; make a new one")
        return self.model._check()

    cdef int _enter(self) except -1:
        """Take the context for this thread."""
        if self._busy.exchange(True):
            raise errors.EngineError("this Context is computing on another thread; a Context has one owner at a time")
        try:
            self._check()
        except BaseException:
            self._busy.store(False)
            raise
        _listen()
        return 0

    cdef void _rest(self) noexcept:
        # Idle workers would spin for a while, waiting for the next graph.
        if self._threads != NULL:
            ggml_threadpool_pause(self._threads)

    def run(self, generations) -> list:
        """News of `generations`: a pair (generation, text) for each that has new text or has ended.

        Computes all of them together until one has news or `wake` is called. Prompts are read in the order given. A
        text holds whole characters only, and may be "" at the end.

        Raises EngineError when others hold all n_seq_max sequences, and EngineFault, after which the context is
        `poisoned`: none of its generations can go on.
        """
        cdef vector[shared_ptr[Text]] texts
        cdef Generation generation
        cdef bint done
        running = []
        self._enter()
        try:
            if self.embeddings:
                raise errors.BadRequest("this Context computes embeddings; make one without embeddings=True")
            for generation in generations:
                if generation.context is not self:
                    raise errors.BadRequest("a Generation was made for another Context")
                generation.sampler._enter()
                running.append(generation)
                texts.push_back(generation._text)
            try:
                with nogil:
                    done = self._batch.run(texts)
            except (errors.EngineError, MemoryError):
                self._poisoned = True
                raise
            finally:
                _last_words()
            if not done:
                raise errors.EngineError(
                    f"other generations hold all {self.n_seq_max} sequences of this Context; raise n_seq_max")
            return [(g, (<Generation>g)._take_text()) for g in running if (<Generation>g)._text.get().has_news()]
        finally:
            for generation in running:
                generation.sampler._leave()
            if all(g.ended for g in running):
                self._rest()
            self._busy.store(False)

    def wake(self) -> None:
        """Have `run` return after its current step, from any thread; if none runs, the next one after its first step."""
        if self._batch != NULL:
            self._batch.wake()

    @property
    def n_kept(self) -> int:
        """Texts that are kept to be found again."""
        self._check()
        return 0 if self._batch == NULL else self._batch.cache().n_kept()

    @property
    def n_host_bytes(self) -> int:
        """Host memory taken by kept texts that had to leave the KV cache."""
        self._check()
        return 0 if self._batch == NULL else self._batch.cache().n_host_bytes()

    def embed(self, texts, *, bint normalize=True) -> memoryview:
        """One vector per text in `texts`, a list of token lists, computed in one batch.

        Returns float32 of shape (len(texts), model.n_embd), in a memoryview of its own.

        Raises BadRequest for an empty text, more texts than n_seq_max or more tokens than n_batch.
        """
        cdef vector[llama_token] tokens, ids
        cdef vector[llama_pos] positions
        cdef vector[int32_t] n_seq
        cdef vector[llama_seq_id] seq
        cdef vector[llama_seq_id*] seq_ptr
        cdef vector[int8_t] outputs
        cdef int32_t i, j, n_texts = len(texts), n_embd, rc
        self._check()
        n_embd = self.model.n_embd
        if not self.embeddings:
            raise errors.BadRequest("this Context computes text; make one with embeddings=True")
        if n_texts > self.n_seq_max:
            raise errors.BadRequest(f"{n_texts} texts do not fit into a batch of {self.n_seq_max}; raise n_seq_max")
        for i, text in enumerate(texts):
            ids = self.model._check_tokens(text)
            if ids.empty():
                raise errors.BadRequest(f"text {i} has no tokens; there is nothing to embed")
            for j in range(<int32_t>ids.size()):
                tokens.push_back(ids[j])
                positions.push_back(j)
                seq.push_back(i)
        if tokens.size() > <size_t>self.n_batch:
            raise errors.BadRequest(f"{tokens.size()} tokens do not fit into a batch of {self.n_batch}")
        if tokens.empty():
            return memoryview(b"")
        n_seq.resize(tokens.size(), 1)
        outputs.resize(tokens.size(), 1)
        for i in range(<int32_t>seq.size()):
            seq_ptr.push_back(&seq[i])
        cdef llama_batch batch
        batch.n_tokens = tokens.size()
        batch.token = tokens.data()
        batch.embd = NULL
        batch.pos = positions.data()
        batch.n_seq_id = n_seq.data()
        batch.seq_id = seq_ptr.data()
        batch.logits = outputs.data()
        cdef bytearray out = bytearray(4 * n_texts * n_embd)
        cdef char* raw = out
        cdef float* vectors = <float*>raw
        cdef bint with_memory
        self._cancel.store(False)
        self._enter()
        try:
            with nogil:
                with_memory = llama_get_memory(self._ctx) != NULL
                if with_memory:
                    llama_memory_clear(llama_get_memory(self._ctx), False)
                    rc = decode(self._ctx, batch)
                else:
                    rc = encode(self._ctx, batch)
                if rc == 0:
                    rc = _copy_vectors(self._ctx, vectors, n_texts, n_embd, normalize)
        except (errors.EngineFault, MemoryError):
            self._poisoned = True
            raise
        finally:
            self._rest()
            self._busy.store(False)
        words = _last_words()
        if rc == 2:
            raise errors.Cancelled("embedding was cancelled")
        if rc != 0:
            raise errors.EngineError(f"{n_texts} texts could not be embedded (llama.cpp returned {rc}): {words}")
        return memoryview(out).cast("f", (n_texts, n_embd)) if n_texts else memoryview(b"")

    def __repr__(self):
        state = "closed" if self._ctx == NULL else f"n_ctx={self.n_ctx}"
        return f"Context({None if self.model is None else self.model.path!r}, {state})"


cdef int _copy_vectors(llama_context* ctx, float* out, int32_t n_texts, int32_t n_embd, bint normalize) noexcept nogil:
    """Rows of `out` are the sequences' vectors, each of length 1 if `normalize`. -100 if one is missing or not finite."""
    cdef int32_t i, j
    cdef float* vector
    cdef double norm
    for i in range(n_texts):
        vector = llama_get_embeddings_seq(ctx, i)
        if vector == NULL:
            return -100
        norm = 0
        for j in range(n_embd):
            norm += <double>vector[j] * vector[j]
        if not isfinite(norm):
            return -100
        norm = 1 / sqrt(norm) if normalize and norm > 0 else 1
        for j in range(n_embd):
            out[i * n_embd + j] = <float>(vector[j] * norm)
    return 0


def _load_llguidance() -> None:
    """Find llguidance's functions: its Python package is a library that has them for other languages too."""
    import ctypes

    from llguidance import _lib

    library = ctypes.CDLL(_lib.__file__)
    cdef size_t i
    for i in range(llguidance_size):
        set_llguidance(i, ctypes.cast(library[llguidance_names[i].decode()], ctypes.c_void_p).value)


cdef class Grammar:
    """What a text has to be, ready for a Model; any number of Samplers hold texts to it.

    `kind` says what `source` is: "gbnf", which llama.cpp reads (with a rule named root), or "json_schema" (draft
    2020-12) or "regex" (in Rust's syntax, for the whole text), which llguidance reads. A "gbnf" with `triggers`
    binds from the first of them on: ("word", text), ("pattern", ECMAScript regex, whose first group it begins with) or
    ("token", id). Of a `prefix`, with which a prompt ends, the text is the continuation. Of
    control tokens only those of `markup` may be in the text, and are seen there.

    Raises GrammarError with the reader's own words. A large one takes a second; the GIL is released.
    """

    cdef readonly Model model
    cdef readonly str kind
    cdef unique_ptr[Constraint] _constraint
    cdef Binds _binds            # in a text that begins with thinking

    def __init__(self, Model model not None, str kind not None, str source not None, *, triggers=(), prefix=None,
                 markup=()):
        model._check()
        if kind not in _GRAMMARS:
            raise errors.GrammarError(f"{kind!r} is no kind of grammar; give one of {', '.join(_GRAMMARS)}")
        if "\0" in source:
            raise errors.GrammarError("the grammar holds a NUL character; write it as \\x00")
        cdef bytes encoded = _utf8(source, "the grammar"), encoded_kind = kind.encode()
        cdef string encoded_prefix = _utf8(prefix or "", "the prefix")
        self.model = model
        self.kind = kind
        self._binds = WITH_ITS_END if triggers else AFTER_THINKING if prefix is None else ALWAYS
        _listen()
        try:
            if kind == "gbnf":
                self._read_gbnf(encoded, triggers, markup, encoded_prefix)
            else:
                self._read_guided(encoded_kind, encoded)
            words = _last_words()
        except errors.EngineFault as exc:
            words = str(exc)
        if not self._constraint:
            what, remedy = _GRAMMARS[kind]
            raise errors.GrammarError(f"{what} could not be used: {' '.join(words.split())}; {remedy}")

    cdef int _read_gbnf(self, const char* source, triggers, markup, const string& prefix) except -1:
        cdef Triggers wanted
        cdef vector[llama_token] seen = self.model._check_tokens(markup)
        for kind, value in triggers:
            if kind == "token":
                wanted.tokens.push_back(self.model._check_tokens([value])[0])
            else:
                value = re.sub(r"[.^$|()*+?\[\]{}\\]", r"\\\g<0>", value) if kind == "word" else value
                wanted.patterns.push_back(_utf8(value, "a trigger"))
        with nogil:
            self._constraint = new_gbnf(self.model._vocab, source, wanted, seen, prefix)
        return 0

    cdef int _read_guided(self, const char* kind, const char* source) except -1:
        cdef GuidedVocab* guided
        if self.model._guided == NULL:
            _load_llguidance()
            with nogil:
                guided = new GuidedVocab(self.model._vocab)
            if self.model._guided == NULL:
                self.model._guided = guided
            else:  # another thread was faster
                del guided
        guided = self.model._guided
        with nogil:
            self._constraint = new_guided(self.model._vocab, guided[0], kind, source)
        return 0

    def __repr__(self):
        return f"Grammar({self.kind!r})"


_GRAMMARS = {  # what each kind is called in an error, and what to do about it
    "gbnf": ("the grammar", "it must be GBNF with a rule named root"),
    "json_schema": ("the JSON schema", "leave out what is named, or set strict: false to have it ignored"),
    "regex": ("the regular expression", "it must be in Rust's syntax, without look-around and backreferences"),
}


_SAMPLER_ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
_SAMPLERS = {*_SAMPLER_ORDER, "infill", "adaptive_p"}
_GREEDY_BELOW = 1e-6  # a temperature that logits can't be divided by as floats
_INFILL_TOP_K = 1000  # candidates that the infill sampler compares with each other, each with each
_MAX_BREAKERS = 64    # of DRY: each is compared with the whole vocabulary


cdef inline float _bounded(float x) noexcept:
    """`x`, or a number that large that it makes no difference where it is infinite as a float."""
    return min(max(x, <float>-1e30), <float>1e30)


cdef class Sampler:
    """How the next token is chosen, as a chain of llama.cpp's samplers; names and defaults are its common library's.

    bias → `samplers`, in that order → draw. Without `samplers`: penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p,
    xtc, temperature. Further there are infill (after a top_k of 1000 at most) and adaptive_p, which draws, wherever it
    stands, and also if `adaptive_target` is 0 or more. Temperature 0 takes the likeliest token after bias, penalties and
    dry; mirostat replaces all the others. Without a `seed` a random one is drawn and reported in `seed`.

    `grammar` is a Grammar of the same model, or GBNF. `thinking` is (start tag, end tags, what the prompt ends with that
    belongs to the answer, budget in tokens or None): where the text has these tags, the grammar binds what follows
    them, and when the budget is used up the first end tag is forced.
    `shortcuts` False has llama.cpp do what is otherwise done on the logits themselves, with the same tokens later.

    Raises GrammarError for what is no grammar, BadRequest for a bias on a token that isn't there and for `samplers` that
    are none.
    """

    # the samplers read the vocabulary
    cdef readonly Model model
    cdef Chain _chain
    cdef Grammar _grammar
    cdef tuple _thinking
    cdef readonly uint32_t seed
    cdef int32_t _n_lookback
    cdef bint _constrained       # by a grammar or a bias, which may leave no token
    cdef bint _shortcuts
    cdef atomic[bool] _busy

    def __init__(self, Model model not None, *, samplers=None, float temperature=0.8, float dynatemp_range=0.0,
                 float dynatemp_exponent=1.0, int top_k=40, float top_p=0.95, float min_p=0.05, int min_keep=0,
                 float typical_p=1.0, float top_n_sigma=-1.0, float xtc_probability=0.0, float xtc_threshold=0.1,
                 float dry_multiplier=0.0, float dry_base=1.75, int dry_allowed_length=2, int dry_penalty_last_n=64,
                 dry_sequence_breakers=("\n", ":", '"', "*"), float repeat_penalty=1.0, int repeat_last_n=64,
                 float frequency_penalty=0.0, float presence_penalty=0.0, float adaptive_target=-1.0,
                 float adaptive_decay=0.9, int mirostat=0, float mirostat_tau=5.0, float mirostat_eta=0.1,
                 logit_bias=None, bint ignore_eos=False, grammar=None, thinking=None, seed=None,
                 bint shortcuts=True):
        if self._chain.samplers != NULL:
            raise errors.EngineError("this Sampler is made already; make a new one")
        model._check()
        order = _SAMPLER_ORDER if samplers is None else tuple(samplers)
        self._check_order(order, top_k)
        self.model = model
        self.seed = int.from_bytes(os.urandom(4), "little") % (2**32 - 1) if seed is None else seed
        self._shortcuts = shortcuts
        self._chain.samplers = llama_sampler_chain_init(llama_sampler_chain_default_params())
        self._add_bias(logit_bias or {}, ignore_eos)
        self._constrained = not self._chain.bias.empty() or grammar is not None or thinking is not None
        if grammar is not None:
            self._grammar = grammar if isinstance(grammar, Grammar) else Grammar(model, "gbnf", grammar)
            if self._grammar.model is not model:
                raise errors.BadRequest("the Grammar was made for another Model; make one for this")
        self._thinking = thinking
        self._constrain()
        cdef int32_t n_ctx = model.n_ctx_train
        if not 0 <= repeat_last_n < n_ctx:
            repeat_last_n = n_ctx
        if not 0 <= dry_penalty_last_n < n_ctx:
            dry_penalty_last_n = n_ctx
        cdef bint greedy = temperature < _GREEDY_BELOW
        cdef bint truncates = not greedy and not mirostat
        for name in order:
            if name == "penalties":
                if repeat_last_n and (repeat_penalty != 1 or frequency_penalty or presence_penalty):
                    self._add_lookback(repeat_last_n, llama_sampler_init_penalties(
                        model.n_vocab, repeat_last_n, _bounded(repeat_penalty), _bounded(frequency_penalty),
                        _bounded(presence_penalty)))
            elif name == "dry":
                if dry_multiplier and dry_penalty_last_n:
                    self._add_lookback(dry_penalty_last_n, self._dry(
                        _bounded(dry_multiplier), _bounded(dry_base), dry_allowed_length, dry_penalty_last_n,
                        dry_sequence_breakers))
            elif not truncates:
                pass
            elif name == "top_n_sigma":
                if top_n_sigma > 0:
                    self._add(llama_sampler_init_top_n_sigma(_bounded(top_n_sigma)))
            elif name == "top_k":
                if top_k > 0:
                    if top_k < model.n_vocab and self._is_head():
                        self._chain.head = TOP_K
                        self._chain.k = top_k
                    self._add(llama_sampler_init_top_k(top_k))
            elif name == "typ_p":
                if typical_p < 1:
                    self._add(llama_sampler_init_typical(typical_p, min_keep))
            elif name == "top_p":
                if top_p < 1:
                    if min_keep < 2 and self._is_head():
                        self._chain.head = TOP_P
                        self._chain.top_p = top_p
                    self._add(llama_sampler_init_top_p(top_p, min_keep))
            elif name == "min_p":
                if min_p > 0:
                    if min_keep < 2 and self._is_head():
                        self._chain.head = MIN_P
                        self._chain.min_p = min_p
                    elif self._chain.head == TOP_P and llama_sampler_chain_n(self._chain.samplers) == self._chain.n_edits + 1:
                        self._chain.min_p = min_p
                    self._add(llama_sampler_init_min_p(min_p, min_keep))
            elif name == "xtc":
                if xtc_probability > 0:
                    self._add(llama_sampler_init_xtc(xtc_probability, xtc_threshold, min_keep, self.seed))
            elif name == "temperature":
                self._add(llama_sampler_init_temp_ext(_bounded(temperature), _bounded(dynatemp_range),
                                                      _bounded(dynatemp_exponent)))
            elif name == "infill":
                self._add(llama_sampler_init_infill(model._vocab))
        self._chain.greedy = greedy and shortcuts
        if greedy:
            self._add(llama_sampler_init_greedy())
        elif mirostat:
            self._add(llama_sampler_init_temp(_bounded(temperature)))
            if mirostat == 1:
                self._add(llama_sampler_init_mirostat(model.n_vocab, self.seed, mirostat_tau, mirostat_eta, 100))
            else:
                self._add(llama_sampler_init_mirostat_v2(self.seed, mirostat_tau, mirostat_eta))
        elif adaptive_target >= 0 or "adaptive_p" in order:
            self._add(llama_sampler_init_adaptive_p(adaptive_target, adaptive_decay, self.seed))
        else:
            self._add(llama_sampler_init_dist(self.seed))

    cdef int _check_order(self, order, int top_k) except -1:
        for i, name in enumerate(order):
            if name not in _SAMPLERS:
                raise errors.BadRequest(f"samplers has {name!r}; give {', '.join(sorted(_SAMPLERS))}")
            if name in order[:i]:
                raise errors.BadRequest(f"samplers has {name!r} twice; leave one out")
            if name == "infill" and not ("top_k" in order[:i] and 0 < top_k <= _INFILL_TOP_K):
                raise errors.BadRequest(
                    f"samplers has 'infill', which compares all candidates with each other, without a top_k before it of "
                    f"{_INFILL_TOP_K} at most; put top_k first")
        return 0

    cdef int _add_bias(self, logit_bias, bint ignore_eos) except -1:
        cdef llama_logit_bias bias
        cdef int32_t i, n_suppressed = 0
        cdef const llama_token* suppressed = llama_vocab_get_suppress_tokens(self.model._vocab, &n_suppressed)
        for token, value in logit_bias.items():
            bias.token = self.model._check_tokens([token])[0]
            bias.bias = value
            self._chain.bias.push_back(bias)
        bias.bias = float("-inf")
        for i in range(n_suppressed):
            bias.token = suppressed[i]
            self._chain.bias.push_back(bias)
        if ignore_eos:
            for i in self.model._end_tokens():
                bias.token = i
                self._chain.bias.push_back(bias)
        return 0

    cdef bint _is_head(self) noexcept:
        """Whether the next sampler is the first that looks at all candidates."""
        return self._shortcuts and llama_sampler_chain_n(self._chain.samplers) == self._chain.n_edits

    cdef int _constrain(self) except -1:
        """Hold the text to the grammar from its beginning."""
        cdef vector[string] ends
        cdef string start, begun
        self._chain.constraint.reset()
        if self._grammar is not None:
            self._chain.constraint = self._grammar._constraint.get().copy()
        if self._thinking is None:
            return 0
        tag, end_tags, prompt_end, budget = self._thinking
        start = _utf8(tag, "a tag")
        begun = _utf8(prompt_end, "the end of the prompt")
        for end in end_tags:
            ends.push_back(_utf8(end, "a tag"))
        add_thinking(self._chain.constraint, self.model._vocab, start, ends, begun, -1 if budget is None else budget,
                     self._grammar._binds if self._grammar is not None else AFTER_THINKING)
        return 0

    cdef void _add(self, llama_sampler* sampler) noexcept:
        llama_sampler_chain_add(self._chain.samplers, sampler)

    cdef void _add_lookback(self, int32_t n, llama_sampler* sampler) noexcept:
        if self._is_head():
            self._chain.n_edits += 1
        self._add(sampler)
        self._chain.lookback.push_back(sampler)
        self._n_lookback = max(self._n_lookback, n)

    cdef llama_sampler* _dry(self, float multiplier, float base, int allowed_length, int last_n, breakers) except NULL:
        encoded = [_utf8(b, "a DRY sequence breaker") for b in breakers]
        if len(encoded) > _MAX_BREAKERS:
            raise errors.BadRequest(
                f"dry_sequence_breakers has {len(encoded)} texts; give {_MAX_BREAKERS} at most")
        cdef vector[const char*] c_breakers
        cdef llama_sampler* sampler
        for b in encoded:
            c_breakers.push_back(b)
        with nogil:
            sampler = llama_sampler_init_dry(self.model._vocab, multiplier, base, allowed_length, last_n,
                                             c_breakers.data(), c_breakers.size())
        return sampler

    def reset(self) -> None:
        """Forget what was generated and start the random numbers from `seed` again."""
        self._enter()
        self._chain.reset()
        self._constrain()
        self._leave()

    cdef int _enter(self) except -1:
        if self._busy.exchange(True):
            raise errors.EngineError("this Sampler is in use on another thread; make one for each Generation")
        return 0

    cdef void _leave(self) noexcept:
        self._busy.store(False)


cdef class ChatParser:
    """Splits what a model says after `prompt` into answer, thinking and calls of tools, as its chat template means it.

    Reading takes a tenth of the time at most, whatever the length: between two looks at a long text some of it may wait.
    Use it on one thread at a time.
    """

    cdef ChatText* _text
    cdef atomic[bool] _busy

    def __init__(self, ChatPrompt prompt not None):
        if self._text != NULL:
            raise errors.EngineError("this ChatParser is made already; make a new one")
        self._text = new ChatText(prompt._params)

    def __dealloc__(self):
        del self._text

    cdef ChatText* _made(self) except NULL:
        if self._text == NULL:
            raise errors.EngineClosed("this ChatParser was never made")
        return self._text

    @property
    def is_plain(self) -> bool:
        """Whether all of a text is answer: the template knows neither thinking nor other markup, and there are no tools."""
        return self._made().is_plain()

    @property
    def reads_calls(self) -> bool:
        """Whether there may be calls of tools in a text: there are tools, and the template knows how they are called."""
        return self._made().reads_calls()

    def read(self, str piece, *, end=None) -> tuple:
        """(content, reasoning, calls): what is new with this piece of the text, at its `end` all of the rest.

        The end is "whole", or "cut" where the model would have gone on: what could be the beginning of markup is left
        out then. Each of the calls is (index, id, name, arguments); its name comes once, its arguments in pieces.
        """
        cdef string encoded = _utf8(piece, "the text")
        cdef ChatTextEnd c_end = {None: CHAT_OPEN, "whole": CHAT_WHOLE, "cut": CHAT_CUT}[end]
        cdef ChatNews news
        cdef size_t i
        self._made()
        if self._busy.exchange(True):
            raise errors.EngineError("this ChatParser is in use on another thread; make one for each answer")
        try:
            with nogil:
                news = self._text.read(encoded, c_end)
        finally:
            self._busy.store(False)
        calls = [(news.calls[i].index, _decoded(news.calls[i].id), _decoded(news.calls[i].name),
                  _decoded(news.calls[i].arguments)) for i in range(news.calls.size())]
        return _decoded(news.content), _decoded(news.reasoning), calls

    @property
    def unread(self) -> str:
        """The end of the text that is not in the template's format; after the last piece. "" for a text that is."""
        return _decoded(self._made().unread())


_FINISH_REASON = {STOP: "stop", LENGTH: "length", CANCELLED: "cancelled"}


cdef class Generation:
    """One text being generated in a Context, alone by `run` or beside others by `Context.run`.

    It ends with `length` after `max_tokens`, or when it has `n_ctx` tokens (None: as many as the context holds).
    `known` is what `take_state` gave for an earlier text, in whichever process: what the prompt begins with of it is
    not computed again. `save` asks for the state of this one. Of control tokens, those of `markup` are written out.
    `logprobs` is how many alternatives `take_logprobs` is to give with each token's own; None: it gives nothing.

    Raises ContextOverflow when the prompt alone leaves no room.
    """

    cdef readonly Context context
    # the text samples with its chain
    cdef readonly Sampler sampler
    cdef shared_ptr[Text] _text      # the batch holds it too
    cdef bytes _known_state          # what _text points into until it has begun
    cdef int64_t _made_us

    def __init__(self, Context context not None, Sampler sampler not None, prompt, *, max_tokens=None, stop=(),
                 bint stream=False, n_ctx=None, known=None, bint save=False, markup=(), logprobs=None):
        if self.context is not None:
            raise errors.EngineError("this Generation is made already; make a new one")
        if context.embeddings:
            raise errors.BadRequest("this Context computes embeddings; make one without embeddings=True")
        if sampler.model is not context.model:
            raise errors.BadRequest("the Sampler was made for another Model than the Context")
        context._check()
        cdef shared_ptr[Text] shared = make_shared[Text]()
        cdef Text* text = shared.get()
        text.tokens = context.model._check_tokens(prompt)
        text.n_prompt = text.tokens.size()
        if text.n_prompt == 0:
            raise errors.BadRequest("the prompt has no tokens; give some text to continue")
        cdef int64_t n_max = context.n_ctx if n_ctx is None else min(n_ctx, context.n_ctx)
        cdef int64_t n_free = n_max - <int64_t>text.n_prompt
        if n_free < 1:
            raise errors.ContextOverflow(
                f"the prompt has {text.n_prompt} tokens, but the context holds {n_max}; shorten the prompt, "
                "raise n_ctx or set truncate: true", n_prompt=text.n_prompt, n_ctx=n_max)
        text.n_max = n_free if max_tokens is None else min(max_tokens, n_free)
        for word in stop:
            if not word:
                raise errors.BadRequest("a stop string is empty; leave it out")
            text.filter.add_stop(_utf8(word, "a stop string"))
        text.chain = &sampler._chain
        text.n_lookback = sampler._n_lookback
        text.markup = context.model._check_tokens(markup)
        text.stream = stream
        text.save = save
        if logprobs is not None:
            if not 0 <= logprobs <= context.model.n_vocab:
                raise errors.BadRequest(f"logprobs is {logprobs}; give 0 to {context.model.n_vocab}, or None")
            text.logprobs.reset(new Logprobs(logprobs))
        if known is not None:
            known_tokens, self._known_state = known
            try:
                text.known.tokens = context.model._check_tokens(known_tokens)
            except errors.BadRequest as exc:
                raise errors.SessionError(f"the saved state is not of this model: {exc}") from exc
            text.known.state = self._known_state
            text.known.n_bytes = len(self._known_state)
        self.context = context
        self.sampler = sampler
        self._text = shared
        self._made_us = now_us()

    cdef Text* _made(self) except NULL:
        if self._text.get() == NULL:
            raise errors.EngineClosed("this Generation was never made")
        return self._text.get()

    @property
    def finish_reason(self) -> str | None:
        """`stop` (the model or a stop string ended it), `length` or `cancelled`; None while it runs or after an error."""
        return _FINISH_REASON.get(self._made().finish.load())

    @property
    def cut_by_stop(self) -> bool:
        """Whether a stop string ended it; with `finish_reason` `stop`."""
        return self._made().cut

    @property
    def ended(self) -> bool:
        """Whether nothing more will be computed: there is a `finish_reason` or an `error`."""
        return self._made().finish.load() != RUNNING

    @property
    def error(self) -> Exception | None:
        """What ended this text alone, while others in the batch went on; None if nothing did."""
        cdef Text* text = self._made()
        if text.finish.load() == FAULT:
            return errors.EngineFault(text.fault.decode("utf-8", "replace"))
        if text.finish.load() == UNFIT:
            return errors.SessionError(
                f"the saved state does not fit this context: {text.unfit.decode('utf-8', 'replace')}")
        if text.finish.load() != NO_TOKEN:
            return None
        if self.sampler._constrained:
            return errors.BadRequest("grammar and logit_bias leave no token to choose from; loosen them")
        return errors.EngineError("the model's output is not a number; its file may be damaged")

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self._made().n_prompt

    @property
    def n_generated(self) -> int:
        """Tokens generated so far."""
        return self._made().n_generated.load()

    @property
    def n_cached(self) -> int:
        """Tokens of the prompt that did not have to be computed, as the context held them already."""
        return self._made().n_cached

    @property
    def n_drafted(self) -> int:
        """Tokens that were guessed and then checked."""
        return self._made().n_drafted

    @property
    def n_accepted(self) -> int:
        """Guessed tokens that the model chose itself."""
        return self._made().n_accepted

    @property
    def queue_s(self) -> float:
        """Seconds from the making of this object to its first turn in the batch, or until now."""
        cdef Text* text = self._made()
        return ((text.begun_us or now_us()) - self._made_us) / 1e6

    @property
    def prompt_s(self) -> float:
        """Seconds from its first turn in the batch to the first token."""
        cdef Text* text = self._made()
        return max(text.first_us - text.begun_us, 0) / 1e6

    @property
    def generation_s(self) -> float:
        """Seconds from the first token to the last."""
        cdef Text* text = self._made()
        return max(text.last_us - text.first_us, 0) / 1e6

    def cancel(self) -> None:
        """End the generation, from any thread: what it has so far can still be taken."""
        self._made().cancelled.store(True)

    def take_state(self) -> tuple | None:
        """(tokens, state): what was computed of this text, to be `known` to a later one. It can be taken once.

        None unless it was made with `save` and ended with `stop` or `length`; and where memory didn't hold the state.
        """
        cdef Text* text = self._made()
        cdef size_t i
        if not self.ended or text.state.empty():
            return None
        state = PyBytes_FromStringAndSize(<char*>text.state.data(), text.state.size())
        text.state = vector[uint8_t]()
        return [text.tokens[i] for i in range(text.n_past)], state

    def take_logprobs(self) -> bytes:
        """Once it has ended: for each token of the text pairs (int32 token, float32 logprob) of its own and of the
        alternatives, likeliest first; token -1 where there are no more. b"" unless it was made with `logprobs`.

        They are of the model itself, before bias, grammar and samplers. The token that ended the text isn't there, nor
        are those that a stop string cut off wholly.
        """
        cdef Text* text = self._made()
        if not self.ended or not text.logprobs:
            return b""
        cdef const vector[Logprob]* rows = &text.logprobs.get().rows()
        return PyBytes_FromStringAndSize(<char*>rows.data(), rows.size() * sizeof(Logprob))

    cdef str _take_text(self):
        """The text that is ready and was not taken yet. Called by the one thread that has the context."""
        cdef Text* text = self._text.get()
        cdef char* ready = <char*>text.filter.ready().data()
        cdef Py_ssize_t n_ready = text.filter.ready().size(), n_decoded
        # At the end Stateful leaves out a character that is unfinished; before it, what isn't whole will never be.
        if text.finish.load() == RUNNING:
            taken = PyUnicode_DecodeUTF8(ready, n_ready, "replace")
        else:
            taken = PyUnicode_DecodeUTF8Stateful(ready, n_ready, "replace", &n_decoded)
        text.filter.clear_ready()
        return taken

    def run(self, *, bint stream=False) -> str | None:
        """The next piece of text: what came with the next token if `stream`, else all the rest. None at the end.

        Raises EngineFault, after which the context is `poisoned`, EngineError or BadRequest.
        """
        while not self.ended:
            self._text.get().stream = stream
            for _, taken in self.context.run((self,)):
                if taken:
                    return taken
        error = self.error
        if error is not None:
            raise error
        return None

    def __repr__(self):
        if self._text.get() == NULL:
            return "Generation(never made)"
        state = "running" if not self.ended else self.finish_reason or "failed"
        return f"Generation({self.n_prompt} + {self.n_generated} tokens, {state})"

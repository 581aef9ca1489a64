"""settings.llm and the API behind it: CONTRACT section 2."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tea_llm.errors import SettingsError
from tea_llm.settings import ApiEndpoint, LlmSettings, missing_credentials, resolve_api

read = LlmSettings.from_mapping
FIELDS = {f.name: f for f in dataclasses.fields(LlmSettings)}


# Keys: one good value as it is written and as it is kept, and bad values with what the message must say

GOOD = {
    "backend": ("auto", "auto"),
    "fallback": (["api", "error"], ("api", "error")),
    "model_path": ("/m/a.gguf", "/m/a.gguf"),
    "embedding_model_path": (Path("/m/e.gguf"), "/m/e.gguf"),
    "n_ctx": (4096, 4096),
    "n_batch": ("512", 512),
    "n_threads": (2, 2),
    "n_gpu_layers": (-1, -1),
    "chat_format": ("chatml", "chatml"),
    "chat_template": ("{{ messages[0].content }} ", "{{ messages[0].content }} "),
    "chat_template_file": (Path("/m/t.jinja"), "/m/t.jinja"),
    "chat_template_name": ("tool_use", "tool_use"),
    "template_kwargs": ({"enable_thinking": False}, '{"enable_thinking": false}'),
    "pooling": ("mean", "mean"),
    "n_parallel": (4, 4),
    "cache_ram_mib": (0, 0),
    "keep_alive": ("30", 30.0),
    "queue_timeout": (0, 0.0),
    "speculative": ("ngram", "ngram"),
    "draft_model_path": ("/m/d.gguf", "/m/d.gguf"),
    "n_draft": ("4", 4),
    "model": (" gpt-4o ", "gpt-4o"),
    "embedding_model": ("e5", "e5"),
    "provider": ("Azure", "azure"),
    "api_base": ("https://h:8080/v1", "https://h:8080/v1"),
    "api_key": ("sk-1", "sk-1"),
    "deployment": ("d", "d"),
    "timeout": (3, 3.0),
    "temperature": (0, 0.0),
    "max_tokens": (0, 0),
    "max_retries": (3, 3),
}

BAD = [
    ("backend", "locl", "'locl'; choose 'local', 'api' or 'auto'"),
    ("backend", "Local", "choose 'local', 'api' or 'auto'"),
    ("backend", True, "choose"),
    ("backend", ["local", "api"], "one name, no list"),
    ("chat_template", 3, "give the template's text"),
    ("chat_template_file", 3, "give the path of a file"),
    ("template_kwargs", ["enable_thinking"], "give a mapping"),
    ("template_kwargs", {"x": object()}, "can be written as JSON"),
    ("template_kwargs", "enable_thinking", "can be written as JSON"),
    ("fallback", "none", "choose 'api' or 'error', or a list"),
    ("fallback", [], "choose"),
    ("fallback", ["api", "api"], "each once"),
    ("fallback", ["api", {"model": "x"}], "choose"),
    ("model_path", 3, "give the path of a file"),
    ("model_path", b"/m", "give the path of a file"),
    ("embedding_model_path", ["a"], "give the path of a file"),
    ("speculative", "eagle", "choose 'off', 'draft', 'mtp' or 'ngram'"),
    ("n_draft", 0, "of at least 1"),
    ("timeout", 1e300, "give a number"),
    ("n_ctx", -1, "-1; give a whole number of at least 0"),
    ("n_ctx", 2**31, "give a whole number"),
    ("n_ctx", 10**400, "give a whole number"),
    ("n_ctx", 4096.0, "give a whole number"),
    ("n_ctx", "4k", "'4k'; give a whole number"),
    ("n_ctx", True, "give a whole number"),
    ("n_ctx", [1], "give a whole number"),
    ("n_batch", 0, "of at least 1"),
    ("n_threads", 0, "of at least 1"),
    ("n_gpu_layers", -2, "of at least -1"),
    ("n_parallel", 0, "of at least 1"),
    ("cache_ram_mib", -1, "of at least 0"),
    ("cache_ram_mib", 0.5, "give a whole number"),
    ("keep_alive", -1, "give a number"),
    ("keep_alive", "soon", "give a number"),
    ("queue_timeout", float("nan"), "give a number"),
    ("chat_format", 1, "give a text"),
    ("pooling", "max", "'cls'"),
    ("model", {}, "give a text"),
    ("provider", 1, "give a text"),
    ("api_base", "localhost:8080", "starts with http:// or https://"),
    ("api_base", "file:///etc/passwd", "starts with http:// or https://"),
    ("api_base", "http://", "starts with http:// or https://"),
    ("api_base", "http://[::1", "starts with http:// or https://"),
    ("timeout", 0, "above 0"),
    ("timeout", float("inf"), "above 0"),
    ("timeout", float("nan"), "above 0"),
    ("timeout", "soon", "'soon'; give a number above 0"),
    ("temperature", -0.1, "of at least 0"),
    ("temperature", 10**400, "give a number"),
    ("max_tokens", -1, "of at least 0"),
    ("max_retries", 1.5, "give a whole number"),
]


def test_there_is_a_good_value_for_every_key():
    assert list(GOOD) == list(FIELDS)


@pytest.mark.parametrize("key", FIELDS)
def test_each_key_is_read_and_kept(key):
    written, kept = GOOD[key]
    value = getattr(read({key: written}), key)
    assert value == kept
    assert type(value) is type(kept)
    assert getattr(LlmSettings().replaced(**{key: written}), key) == kept
    assert getattr(LlmSettings(**{key: kept}), key) == kept


@pytest.mark.parametrize(("key", "value", "says"), BAD)
def test_a_bad_value_is_refused_with_key_line_and_advice(key, value, says):
    with pytest.raises(SettingsError) as caught:
        read({key: value}, line_of={key: 12})
    assert str(caught.value).startswith(f"settings.llm.{key} (line 12) is ")
    assert says in str(caught.value)
    with pytest.raises(SettingsError, match=key):
        LlmSettings(**{key: value})
    with pytest.raises(SettingsError, match=rf"llm\.{key} is "):
        LlmSettings().replaced(**{key: value})


@pytest.mark.parametrize(
    ("key", "nothing"),
    [(key, empty) for key in FIELDS for empty in (None, "", "  ") if (key, empty) != ("timeout", None)],
)
def test_an_empty_key_is_as_good_as_none(key, nothing):
    assert read({key: nothing}) == LlmSettings()


def test_timeout_null_is_no_limit():
    assert LlmSettings().timeout == 300
    assert read({"timeout": None}).timeout is None
    assert read({"timeout": None}).replaced(n_ctx=1).timeout is None


@pytest.mark.parametrize("llm", [None, {}])
def test_nothing_set_means_the_api(llm):
    assert read(llm) == LlmSettings()
    assert (LlmSettings().backend, LlmSettings().fallback, LlmSettings().provider) == ("api", ("api",), "auto")


@pytest.mark.parametrize("llm", [["backend"], "local", 3])
def test_settings_that_are_no_mapping_are_refused(llm):
    with pytest.raises(SettingsError, match=r"workflow\.llm is a \w+; give a mapping"):
        read(llm, where="workflow.llm")


# Unknown keys and aliases


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model_pth", "model_path"),
        ("modelPath", "model_path"),
        ("n_ctxx", "n_ctx"),
        ("BACKEND", "backend"),
        ("api_ur", "api_url"),
        ("max-tokens", "max_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_and_its_line(key, nearest):
    with pytest.raises(SettingsError) as caught:
        read({"backend": "local", key: 1}, line_of={"backend": 3, key: 4})
    assert str(caught.value) == f"settings.llm.{key} (line 4) is not a setting; did you mean '{nearest}'?"


@pytest.mark.parametrize("key", ["zzz", 3, ("a",)])
def test_a_key_near_to_none_lists_them_all(key):
    with pytest.raises(SettingsError) as caught:
        read({key: 1})
    assert all(name in str(caught.value) for name in FIELDS)


@pytest.mark.parametrize("alias", ["api_base", "api_url", "base_url"])
def test_the_address_has_three_names(alias):
    assert read({alias: "http://h/v1"}).api_base == "http://h/v1"
    assert LlmSettings().replaced(**{alias: "http://h/v1"}).api_base == "http://h/v1"


def test_two_names_for_two_addresses_are_refused():
    with pytest.raises(SettingsError, match=r"base_url \(line 2\) and settings\.llm\.api_url say different things"):
        read({"api_url": "http://a", "base_url": "http://b"}, line_of={"base_url": 2})
    assert read({"api_url": "http://a", "base_url": "http://a"}).api_base == "http://a"


def test_provider_local_means_backend_local():
    settings = read({"provider": "local"})
    assert (settings.backend, settings.provider) == ("local", "auto")
    assert settings.replaced(backend="api").backend == "api"
    assert LlmSettings().replaced(provider="local").backend == "local"


# Values that stand for others


def test_home_and_variables_expand_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MODELS", "/big")
    for key in ("model_path", "embedding_model_path"):
        for written, path in [
            ("~/m.gguf", "/home/me/m.gguf"),
            ("~", "/home/me"),
            ("$MODELS/m.gguf", "/big/m.gguf"),
            ("${MODELS}/${MODELS}m", "/big//bigm"),
            ("$NO_SUCH/m.gguf", "$NO_SUCH/m.gguf"),
            ("a~b$", "a~b$"),
        ]:
            assert getattr(read({key: written}), key) == path
            assert getattr(LlmSettings().replaced(**{key: written}), key) == path


def test_variables_expand_in_the_key_and_an_unset_one_means_no_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", " sk-$x\n")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert read({"api_key": "${MY_KEY}"}).api_key == "sk-$x"
    assert read({"api_key": "$MY_KEY"}).replaced(n_ctx=1).api_key == "sk-$x"
    assert read({"api_key": "${NO_SUCH}"}).api_key is None
    assert read({"api_key": "Bearer $NO_SUCH"}).api_key is None
    assert read({"api_key": "$EMPTY"}).api_key is None


def test_the_key_is_in_no_repr_and_no_message():
    settings = read({"api_key": "sk-secret"})
    endpoint = resolve_api(settings, {})
    assert endpoint.api_key == "sk-secret"
    assert "sk-secret" not in f"{settings!r} {settings} {endpoint!r} {endpoint}"
    for bad in (["sk-secret"], {"sk-secret": 1}, b"sk-secret"):
        with pytest.raises(SettingsError) as caught:
            read({"api_key": bad})
        assert "sk-secret" not in str(caught.value)
        assert caught.value.__context__ is None or "sk-secret" not in str(caught.value.__context__)


def test_settings_are_values():
    settings = read({key: written for key, (written, _) in GOOD.items()})
    assert hash(settings) == hash(settings.replaced(n_ctx="4096"))
    assert settings == settings.replaced(n_ctx="4096") != settings.replaced(n_ctx=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.n_ctx = 1  # type: ignore[misc]


def test_a_changed_key_given_as_none_goes_back_to_its_default():
    settings = read({"model": "m", "backend": "local"}).replaced(model=None, backend=None)
    assert settings == LlmSettings()


# The API

OPENAI = "https://api.openai.com/v1"
AZURE = {"AZURE_OPENAI_API_KEY": "az", "AZURE_OPENAI_ENDPOINT": "https://me.openai.azure.com/"}


@pytest.mark.parametrize(
    ("llm", "env", "endpoint"),
    [
        ({}, {}, ("openai", OPENAI, None)),
        ({}, {"OPENAI_API_KEY": "k\n"}, ("openai", OPENAI, "k")),
        ({}, {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://h/v1/"}, ("openai", "http://h/v1", "k")),
        ({}, {"OPENAI_API_KEY": " ", "OPENAI_BASE_URL": ""}, ("openai", OPENAI, None)),
        ({"api_key": "mine"}, {"OPENAI_API_KEY": "k"}, ("openai", OPENAI, "mine")),
        ({"api_base": "http://a/x/"}, {"OPENAI_BASE_URL": "http://b"}, ("openai", "http://a/x", None)),
        ({"api_base": "http://a/v1"}, {"OPENAI_API_KEY": "k"}, ("openai", "http://a/v1", "k")),
        ({}, {"OLLAMA_API_BASE": "http://o:1"}, ("ollama", "http://o:1/v1", None)),
        ({}, {"OLLAMA_API_BASE": "http://o:1/v1/", **AZURE, "OPENAI_API_KEY": "k"}, ("ollama", "http://o:1/v1", None)),
        ({"provider": "ollama"}, {"OPENAI_API_KEY": "k"}, ("ollama", "http://localhost:11434/v1", None)),
        ({"provider": "ollama", "api_base": "http://a"}, {"OLLAMA_API_BASE": "x"}, ("ollama", "http://a/v1", None)),
        ({"provider": "openai"}, {"OLLAMA_API_BASE": "http://o", **AZURE}, ("openai", OPENAI, None)),
        ({"api_base": "http://a/v1"}, {"OLLAMA_API_BASE": "http://o", **AZURE}, ("openai", "http://a/v1", None)),
        ({}, {"AZURE_OPENAI_API_KEY": "az", "OPENAI_API_KEY": "k"}, ("openai", OPENAI, "k")),
        ({"provider": "azure"}, {"OPENAI_API_KEY": "k"}, ("azure", "", None)),
        ({"provider": "vllm", "api_base": "http://v/v1"}, {"OPENAI_API_KEY": "k"}, ("vllm", "http://v/v1", None)),
        ({"provider": "vllm", "api_base": "http://v/v1", "api_key": "v"}, {}, ("vllm", "http://v/v1", "v")),
        (
            {"provider": "vllm"},
            {"OPENAI_BASE_URL": "http://v/v1", "OPENAI_API_KEY": "k"},
            ("vllm", "http://v/v1", "k"),
        ),
        ({"provider": "vllm"}, {}, ("vllm", "", None)),
        ({"provider": "local"}, {"OLLAMA_API_BASE": "http://o"}, ("ollama", "http://o/v1", None)),
    ],
)
def test_the_endpoint_comes_from_settings_then_environment(llm, env, endpoint):
    found = resolve_api(read(llm), env)
    assert (found.provider, found.base_url, found.api_key) == endpoint


def test_azure_is_chosen_by_its_two_variables_and_reads_its_other_two():
    endpoint = ApiEndpoint("azure", "https://me.openai.azure.com", "az", None, "2024-10-21")
    assert resolve_api(LlmSettings(), AZURE) == endpoint
    more = {**AZURE, "AZURE_OPENAI_DEPLOYMENT": "d", "OPENAI_API_VERSION": "2025-01-01"}
    assert resolve_api(LlmSettings(), more) == dataclasses.replace(endpoint, deployment="d", api_version="2025-01-01")
    explicit = LlmSettings(provider="azure", deployment="mine", api_base="http://127.0.0.1:1", api_key="k")
    assert resolve_api(explicit, more) == ApiEndpoint("azure", "http://127.0.0.1:1", "k", "mine", "2025-01-01")


def test_an_azure_deployment_is_no_business_of_another_provider():
    endpoint = resolve_api(LlmSettings(provider="openai"), {"AZURE_OPENAI_DEPLOYMENT": "d", "OPENAI_API_VERSION": "v"})
    assert (endpoint.deployment, endpoint.api_version) == (None, None)


@pytest.mark.parametrize("name", ["OPENAI_BASE_URL", "OLLAMA_API_BASE"])
def test_a_variable_without_an_http_address_is_an_error_that_names_it(name):
    with pytest.raises(SettingsError, match=f"{name} is 'localhost:11434'; start it with http://"):
        resolve_api(LlmSettings(), {name: "localhost:11434"})


@pytest.mark.parametrize(
    ("llm", "env", "says"),
    [
        ({}, {}, ["OPENAI_API_KEY is not set", "llm.api_key", OPENAI]),
        ({}, {"OPENAI_API_KEY": ""}, ["OPENAI_API_KEY is empty"]),
        ({"api_base": "https://eu.api.openai.com/v1"}, {}, ["OPENAI_API_KEY is not set"]),
        ({"provider": "azure"}, {}, ["AZURE_OPENAI_ENDPOINT is not set", "llm.api_base"]),
        ({"provider": "azure", "api_base": "https://me.openai.azure.com"}, {}, ["AZURE_OPENAI_API_KEY is not set"]),
        ({"provider": "vllm"}, {}, ["'vllm'", "llm.api_base is empty"]),
        ({"api_key": "k"}, {}, None),
        ({}, {"OPENAI_API_KEY": "k"}, None),
        ({"api_base": "http://127.0.0.1:8080/v1"}, {}, None),
        ({"api_base": "https://llm.example.org/v1"}, {}, None),
        ({"provider": "azure", "api_base": "http://127.0.0.1:8080"}, {}, None),
        ({"provider": "azure", "api_base": "http://[::1]:8080"}, {}, None),
        ({"provider": "ollama"}, {}, None),
        ({"provider": "vllm", "api_base": "http://v"}, {}, None),
        ({}, AZURE, None),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(llm, env, says):
    sentence = missing_credentials(resolve_api(read(llm), env), env)
    if says is None:
        assert sentence is None
    else:
        assert all(part in sentence for part in says)
        assert "\n" not in sentence


def test_the_environment_is_read_when_asked(monkeypatch):
    for name in ("OLLAMA_API_BASE", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    assert resolve_api(LlmSettings()).api_key == "one"
    monkeypatch.setenv("OPENAI_API_KEY", "two")
    assert resolve_api(LlmSettings()).api_key == "two"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in missing_credentials(resolve_api(LlmSettings()))


# The page

DOCS = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


def row(f):
    default = ", ".join(f.default) if isinstance(f.default, tuple) else f.default
    shown = "" if default is None else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    return f"| `{f.name}` | {f.metadata['doc']} | {shown} | {f.metadata['env']} |"


def test_the_page_has_one_row_for_each_key_and_says_what_the_field_says():
    rows = re.findall(r"^\| `.*\|$", DOCS.read_text(encoding="utf-8").split("## Environment")[0], flags=re.MULTILINE)
    assert [" ".join(r.split()) for r in rows] == [" ".join(row(f).split()) for f in FIELDS.values()]


@pytest.mark.parametrize(
    "name",
    [
        "TEA_MODEL_PATH",
        "APPDIR",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OLLAMA_API_BASE",
        "AZURE_OPENAI_API_KEY",
        "AZURE_OPENAI_ENDPOINT",
        "AZURE_OPENAI_DEPLOYMENT",
        "OPENAI_API_VERSION",
    ],
)
def test_the_page_explains_each_variable(name):
    environment = DOCS.read_text(encoding="utf-8").split("## Environment")[1]
    assert f"| `{name}` |" in environment

// llama.cpp's own chat code (common/chat.h) behind one plain class: a Jinja template, applied to messages and tools.
#pragma once

#include "jinja_hooks.hpp"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "chat.h"
#include "control_texts.hpp"
#include "guard.hpp"
#include "jinja/lexer.h"
#include "jinja/parser.h"

namespace tea {

// A prompt, and which of it came from who asked.
struct Rendered {
    std::string text;
    Ranges literal;
};

class ChatTemplate {
  public:
    // The model's template, or `source` where it is not empty. Compiling runs it, with messages of llama.cpp's.
    // `controls` must live as long.
    ChatTemplate(const llama_model * model, const std::string & source, const ControlTexts * controls) : controls_(*controls) {
        run({N_BYTES, N_SECONDS}, [&] {
            make_tests_safe();
            if (source.empty()) {
                for (const char * name : {static_cast<const char *>(nullptr), "tool_use"}) {
                    if (const char * own = llama_model_chat_template(model, name)) check(own);
                }
            } else {
                check(source);
            }
            templates_ = common_chat_templates_init(model, source);
            can_call_in_parallel_ = common_chat_templates_get_caps(templates_.get())["supports_parallel_tool_calls"];
            can_think_ = common_chat_templates_support_enable_thinking(templates_.get());
            const llama_vocab * vocab = llama_model_get_vocab(model);
            for (llama_token token : {llama_vocab_bos(vocab), llama_vocab_eos(vocab)}) {
                ends_.push_back(token == LLAMA_TOKEN_NULL ? std::string() : common_token_to_piece(vocab, token, true));
            }
        });
    }

    ~ChatTemplate() {  // a tree as deep as its template wanted it
        try {
            run({N_BYTES, N_SECONDS}, [&] { templates_.reset(); });
        } catch (const std::exception &) {
            templates_.release();
        }
    }

    // The prompt for the fields of a chat completion request in the OpenAI API's JSON, and all that goes with it: how
    // the answer is constrained and read. What is not given is as in llama.cpp's server. A BOS that the tokenizer adds
    // is not written twice.
    common_chat_params apply(const std::string & request, Rendered & rendered) const {
        common_chat_params params;
        run({N_BYTES + N_BYTES_PER_BYTE * request.size(), N_SECONDS}, [&] {
            const common_json body = common_json::parse(request);
            check_arguments(body);
            rendered = render(body, params);
            Hidden hidden(controls_, request);
            const common_json without = hidden.hide(body);
            if (hidden.texts.empty()) return;
            // Filters (tojson, split, join …) lose what llama.cpp's Jinja knows of where a text came from.
            common_chat_params unused;
            Rendered shown = hidden.show(render(without, unused));
            if (shown.text == rendered.text) {
                rendered.literal = merged(std::move(rendered.literal), shown.literal);
            } else if (controls_.read(shown.text, shown.literal) != controls_.read(rendered.text, rendered.literal)) {
                rendered = std::move(shown);  // the template looks for such texts; this once it finds none
            }
        });
        return params;
    }

  private:
    static constexpr int N_SECONDS = 5;
    static constexpr size_t N_BYTES = 64 << 20, N_BYTES_PER_BYTE = 64;
    static constexpr int N_JSON_DEPTH = 1000;
    static constexpr size_t N_TAG_TOKENS = 4096;  // the longest chain, or the deepest nest, of one expression

    // A request in which the texts of control tokens are characters that nobody uses, and the way back.
    struct Hidden {
        Hidden(const ControlTexts & controls, const std::string & request) : controls(controls) {
            for (uint32_t c = 0xf0000; c < 0xffffd && (mark.empty() || request.find(mark) != request.npos); ++c) mark = utf8(c);
        }

        common_json hide(const common_json & value, const std::string & field = "") {
            if (value.is_array()) {
                common_json items = common_json::array();
                for (const common_json & item : value) items.push_back(hide(item, field));
                return items;
            }
            if (value.is_object()) {
                common_json fields = common_json::object();
                for (const auto & [name, inner] : value.items()) fields[is_field(name) ? name : hide(name)] = hide(inner, name);
                return fields;
            }
            if (!value.is_string() || field == "type" || field == "role" || field == "tool_choice" || field == "reasoning_format") {
                return value;
            }
            const std::string text = value;
            if (field == "arguments") {  // JSON in a text, which may spell characters otherwise
                const common_json parsed = common_json::parse_no_throw(text);
                if (!parsed.is_discarded() && !parsed.is_string()) {
                    const common_json inner = hide(parsed);
                    const std::string dumped = inner.dump();
                    return dumped == parsed.dump() ? common_json(text) : common_json(dumped);
                }
            }
            return common_json(hide(text));
        }

        std::string hide(const std::string & text) {
            std::string out;
            size_t at = 0;
            for (const auto & [begin, end] : controls.find(text)) {
                const std::string found = text.substr(begin, end - begin);
                auto known = std::find(texts.begin(), texts.end(), found);
                if (known == texts.end() && texts.size() == 0xfffd) continue;
                if (known == texts.end()) known = texts.insert(known, found);
                out += text.substr(at, begin - at) + mark + utf8(0x100000 + (known - texts.begin()));
                at = end;
            }
            return out + text.substr(at);
        }

        Rendered show(const Rendered & hidden) const {
            Rendered shown;
            Ranges marks;
            size_t at = 0;
            std::vector<std::pair<size_t, size_t>> moved{{0, 0}};  // where texts went: from, to
            for (size_t found; (found = hidden.text.find(mark, at)) != hidden.text.npos; at = found + 8) {
                shown.text += hidden.text.substr(at, found - at);
                const size_t i = texts_index(hidden.text, found);
                const size_t begin = shown.text.size();
                shown.text += i < texts.size() ? texts[i] : std::string();
                marks.emplace_back(begin, shown.text.size());
                moved.emplace_back(found + 8, shown.text.size());
            }
            if (at < hidden.text.size()) shown.text += hidden.text.substr(at);
            const auto to = [&](size_t from) {
                auto after = std::upper_bound(moved.begin(), moved.end(), from, [](size_t f, const auto & m) { return f < m.first; });
                const size_t there = (after - 1)->second + (from - (after - 1)->first);
                return after == moved.end() ? there : std::min(there, after->second);
            };
            Ranges literal;
            for (const auto & [begin, end] : hidden.literal) literal.emplace_back(to(begin), to(end));
            shown.literal = merged(std::move(literal), marks);
            return shown;
        }

        const ControlTexts & controls;
        std::string mark;
        std::vector<std::string> texts;

      private:
        static bool is_field(const std::string & name) {
            static const char * const names[] = {
                "messages", "tools", "tool_choice", "reasoning_format", "enable_thinking", "chat_template_kwargs", "json_schema",
                "parallel_tool_calls", "add_generation_prompt", "role", "content", "type", "text", "reasoning_content", "name",
                "tool_call_id", "tool_calls", "id", "function", "arguments", "description", "parameters",
            };
            return std::find(std::begin(names), std::end(names), name) != std::end(names);
        }

        static std::string utf8(uint32_t c) {  // of the planes for private use
            return {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 0x3f)), char(0x80 | (c >> 6 & 0x3f)), char(0x80 | (c & 0x3f))};
        }

        static size_t texts_index(const std::string & text, size_t mark_at) {
            if (mark_at + 8 > text.size()) return SIZE_MAX;
            const auto bits = [&](size_t i) { return size_t(static_cast<unsigned char>(text[mark_at + 4 + i]) & 0x3f); };
            return (bits(1) << 12 | bits(2) << 6 | bits(3)) & 0xffff;
        }
    };

    static Ranges merged(Ranges ranges, const Ranges & more) {
        ranges.insert(ranges.end(), more.begin(), more.end());
        std::sort(ranges.begin(), ranges.end());
        Ranges result;
        for (const auto & range : ranges) {
            if (!result.empty() && range.first <= result.back().second) {
                result.back().second = std::max(result.back().second, range.second);
            } else {
                result.push_back(range);
            }
        }
        return result;
    }

    template <class Work>
    static void run(const Bounds & bounds, Work work) {
        run_bounded(bounds, [&] {
            Guard guard;
            work();
        });
    }

    Rendered render(const common_json & body, common_chat_params & params) const {
        std::vector<RenderedParts> noted;
        renders = &noted;
        try {
            params = common_chat_templates_apply(templates_.get(), inputs(body));
        } catch (...) {
            renders = nullptr;
            throw;
        }
        renders = nullptr;
        return {params.prompt, literal(params.prompt, noted)};
    }

    common_chat_templates_inputs inputs(const common_json & body) const {
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(body.at("messages"));
        if (body.contains("tools")) inputs.tools = common_chat_tools_parse_oaicompat(body.at("tools"));
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(body.value("tool_choice", std::string("auto")));
        inputs.parallel_tool_calls = body.value("parallel_tool_calls", can_call_in_parallel_);
        inputs.reasoning_format = common_reasoning_format_from_name(body.value("reasoning_format", std::string("auto")));
        inputs.enable_thinking = body.value("enable_thinking", can_think_);
        if (body.contains("json_schema")) inputs.json_schema = body.at("json_schema").dump();
        inputs.chat_template_kwargs["preserve_reasoning"] = "true";  // of earlier answers
        if (body.contains("chat_template_kwargs")) {
            for (const auto & [name, value] : body.at("chat_template_kwargs").items()) {
                inputs.chat_template_kwargs[name] = value.dump();
            }
        }
        inputs.add_generation_prompt = body.value("add_generation_prompt", true);
        if (inputs.add_generation_prompt && !inputs.messages.empty() && inputs.messages.back().role == "assistant") {
            inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;  // the answer goes on from there
            inputs.add_generation_prompt = false;
        }
        return inputs;
    }

    // Which of `prompt` is the caller's: of the renders that llama.cpp made, one became the prompt, perhaps without BOS
    // and EOS, and with the beginning of the answer added.
    Ranges literal(const std::string & prompt, const std::vector<RenderedParts> & noted) const {
        Ranges best;
        size_t n_best = 0;
        for (const RenderedParts & parts : noted) {
            std::string text;
            Ranges ranges;
            for (const auto & [is_input, part] : parts) {
                // BOS and EOS are handed to the template as the messages are.
                if (is_input && !part.empty() && std::find(ends_.begin(), ends_.end(), part) == ends_.end()) {
                    ranges.emplace_back(text.size(), text.size() + part.size());
                }
                text += part;
            }
            size_t n_begin = 0;
            if (prompt.compare(0, text.size(), text, 0, prompt.size()) != 0 && text.rfind(ends_[0], 0) == 0) {
                n_begin = ends_[0].size();
            }
            const size_t n = std::min(prompt.size(), text.size() - n_begin);
            if (n <= n_best || prompt.compare(0, n, text, n_begin, n) != 0) continue;
            n_best = n;
            best.clear();
            for (auto [begin, end] : ranges) {
                begin = std::max(begin, n_begin) - n_begin;
                end = std::min(std::max(end, n_begin) - n_begin, prompt.size());
                if (begin >= end) continue;
                if (!best.empty() && best.back().second == begin) best.back().second = end;
                else best.emplace_back(begin, end);
            }
        }
        return best;
    }

    // Throws what is wrong with a template; common_chat_templates_init does not tell.
    static void check(const std::string & source) {
        Counting counting;
        const jinja::lexer_result read = jinja::lexer().tokenize(source);
        size_t n = 0;
        for (const jinja::token & token : read.tokens) {
            n = token.t == jinja::token::open_statement || token.t == jinja::token::open_expression ? 0 : n + 1;
            if (n > N_TAG_TOKENS) throw std::runtime_error("one of its expressions is too long");
        }
        jinja::parse_from_tokens(read);
    }

    // Arguments of earlier calls are JSON in a text; what walks them recurses.
    static void check_arguments(const common_json & body) {
        for (const common_json & message : body.at("messages")) {
            if (!message.is_object() || !message.contains("tool_calls") || !message.at("tool_calls").is_array()) continue;
            for (const common_json & call : message.at("tool_calls")) {
                if (!call.is_object() || !call.contains("function") || !call.at("function").is_object()) continue;
                const common_json arguments = call.at("function").value("arguments", common_json());
                if (!arguments.is_string()) continue;
                int depth = 0;
                bool in_text = false, escaped = false;
                for (char c : arguments.get<std::string>()) {
                    if (!escaped && c == '"') in_text = !in_text;
                    escaped = in_text && !escaped && c == '\\';
                    if (!in_text) depth += (c == '[' || c == '{') - (c == ']' || c == '}');
                    if (depth > N_JSON_DEPTH) throw std::runtime_error("the arguments of a tool call nest too deeply");
                }
            }
        }
    }

    // `divisibleby` divides by whatever it gets, and a division by 0 ends the process (jinja/value.cpp).
    static void make_tests_safe() {
        static const bool done = [] {
            auto & tests = const_cast<jinja::func_builtins &>(jinja::global_builtins());
            tests["test_is_divisibleby"] = [](const jinja::func_args & args) -> jinja::value {
                args.ensure_vals<jinja::value_int, jinja::value_int>();
                const int64_t value = args.get_pos(0)->as_int(), by = args.get_pos(1)->as_int();
                if (by == 0) throw jinja::raised_exception("divisibleby(0)");
                return jinja::mk_val<jinja::value_bool>(by == -1 || value % by == 0);
            };
            return true;
        }();
        (void) done;
    }

    const ControlTexts & controls_;
    common_chat_templates_ptr templates_;
    bool can_call_in_parallel_ = false, can_think_ = false;
    std::vector<std::string> ends_;  // the texts of BOS and EOS, "" where there is none
};

}  // namespace tea

// What a model says, read as its chat template means it: the answer, the thinking before it, calls of tools. llama.cpp's
// own parser (common/chat.h) does it, and reads the whole text anew each time; so this one says what is new.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "chat-peg-parser.h"
#include "chat.h"
#include "guard.hpp"

namespace tea {

// A call of a tool, or what there is more of it: `name` comes once, whole, and its arguments after it.
struct CallNews {
    size_t index;
    std::string id, name, arguments;
};

struct ChatNews {
    std::string content, reasoning;
    std::vector<CallNews> calls;
};

class ChatParser {
  public:
    explicit ChatParser(const common_chat_params & prompt) : params_(prompt) {
        Guard guard;
        if (!prompt.parser.empty()) params_.parser.load(prompt.parser);
        news(false);  // where the prompt ends in the midst of an answer, that part of it is not news
        for (auto & call : said_.tool_calls) call = {};
    }

    // Whether all of a text is content, with no markup to look for.
    bool is_plain() const {
        for (common_peg_parser_id id = 0; id < params_.parser.size(); ++id) {
            const auto & rule = params_.parser.get(id);
            const auto * literal = std::get_if<common_peg_literal_parser>(&rule);
            const auto * until = std::get_if<common_peg_until_parser>(&rule);
            const auto * tag = std::get_if<common_peg_tag_parser>(&rule);
            const bool is_plain = literal ? literal->literal == params_.generation_prompt
                                : until   ? until->delimiters.empty()
                                : tag     ? tag->tag == common_chat_peg_builder::CONTENT
                                          : std::holds_alternative<common_peg_epsilon_parser>(rule) ||
                                            std::holds_alternative<common_peg_sequence_parser>(rule) ||
                                            std::holds_alternative<common_peg_end_parser>(rule);
            if (!is_plain) return false;
        }
        return true;
    }

    // Whether there may be calls of tools in a text.
    bool reads_calls() const {
        for (common_peg_parser_id id = 0; id < params_.parser.size(); ++id) {
            const auto * tag = std::get_if<common_peg_tag_parser>(&params_.parser.get(id));
            if (tag && tag->tag == common_chat_peg_builder::TOOL_NAME) return true;
        }
        return false;
    }

    enum End { OPEN, WHOLE, CUT };

    // What the text says with this piece at its end. Nothing if the last look was a moment ago: looking takes a tenth
    // of the time at most, however long the text is. At the end all of it is said; what began like markup was text
    // after all, but for a text that was cut.
    ChatNews read(const std::string & piece, End end) {
        look_at_depth(piece);
        text_ += piece;
        const int64_t begin_us = ggml_time_us();
        if (end == OPEN && begin_us < next_us_) return {};
        Guard guard;
        common_chat_msg message;
        if (end == WHOLE ? parse_whole(message) : parse(text_.size(), message)) {
            now_ = std::move(message);
        } else if (end != OPEN) {
            now_ = rescued();
        }
        ChatNews found = news(end != OPEN);
        const int64_t end_us = ggml_time_us();
        next_us_ = end_us + 10 * (end_us - begin_us);
        return found;
    }

    // The end of the text that isn't in the template's format, and so was read as content. Known after the last piece.
    const std::string & unread() const { return unread_; }

  private:
    static constexpr int deepest_nesting = 200;  // the parser is recursive: 10,000 levels end the process, 3,000 do not

    static constexpr char end_mark = '\x01';  // begins no markup, and JSON doesn't hold it

    ChatNews news(bool last) {
        ChatNews news;
        news.content = more(said_.content, now_.content);
        news.reasoning = more(said_.reasoning_content, now_.reasoning_content);
        said_.tool_calls.resize(std::max(said_.tool_calls.size(), now_.tool_calls.size()));
        for (size_t i = 0; i < now_.tool_calls.size(); ++i) {
            const auto & call = now_.tool_calls[i];
            auto & said = said_.tool_calls[i];
            // Before its arguments begin, a name may still grow.
            if (call.name.empty() || (call.arguments.empty() && i + 1 == now_.tool_calls.size() && !last)) continue;
            CallNews found{i, "", "", ""};
            if (said.name.empty()) {
                found.id = said.id = call.id;
                found.name = said.name = call.name;
            }
            found.arguments = more(said.arguments, call.arguments);
            if (!found.name.empty() || !found.arguments.empty()) news.calls.push_back(std::move(found));
        }
        return news;
    }

    // What `now` has beyond `said`, which takes it. Nothing where it isn't a continuation: the parser is not sure yet.
    static std::string more(std::string & said, const std::string & now) {
        if (now.size() <= said.size() || now.compare(0, said.size(), said) != 0) return {};
        std::string tail = now.substr(said.size());
        said = now;
        return tail;
    }

    // Reads the first n bytes of the text, and then `more`. False where they are not in the format.
    bool parse(size_t n, common_chat_msg & message, const std::string & more = "") {
        if (depth_at_ < n) return false;
        try {
            message = common_chat_parse(text_.substr(0, n) + more, false, params_);
        } catch (const std::runtime_error &) {
            return false;
        }
        if (more.empty()) n_read_ = std::max(n_read_, n);
        return true;
    }

    // Reads the first n bytes where they end in the midst of content or thinking, all of which is said then: the parser
    // itself waits for what may follow, as the text may end like markup begins.
    bool parse_open(size_t n, common_chat_msg & message) {
        if (!parse(n, message, {end_mark})) return false;
        std::string & open = message.content.empty() ? message.reasoning_content : message.content;
        if (open.empty() || open.back() != end_mark) return false;
        open.pop_back();
        return true;
    }

    bool parse_whole(common_chat_msg & message) {
        return parse_open(text_.size(), message) || parse(text_.size(), message);
    }

    // As much of the text as is in the format, and the rest as content.
    common_chat_msg rescued() {
        common_chat_msg message, attempt;
        size_t good = n_read_, bad = text_.size();
        while (bad - good > 1) {
            const size_t middle = good + (bad - good) / 2;
            (parse(middle, attempt) ? good : bad) = middle;
        }
        while (good > 0 && (static_cast<unsigned char>(text_[good]) & 0xC0) == 0x80) --good;
        if (!parse(good, message)) good = 0;
        if (message.tool_calls.empty()) good = end_of_content(message, good);
        unread_ = text_.substr(good);
        message.content += unread_;
        return message;
    }

    // Where a text without calls leaves its content; what is read beyond was taken for markup, and is none.
    size_t end_of_content(const common_chat_msg & message, size_t n) {
        size_t at = 0;
        for (const auto * part : {&message.reasoning_content, &message.content}) {
            at = text_.find(*part, at);
            if (at == std::string::npos) return n;
            at += part->size();
        }
        common_chat_msg attempt;
        for (size_t i = at; i <= n; ++i) {  // past the mark that ends the thinking
            if (parse_open(i, attempt) && attempt.content == message.content) return i;
        }
        return at;
    }

    void look_at_depth(const std::string & piece) {
        for (size_t i = 0; i < piece.size(); ++i) {
            const char c = piece[i];
            depth_ += (c == '[' || c == '{') - (c == ']' || c == '}');
            depth_ = std::max(depth_, 0);
            if (depth_ > deepest_nesting) depth_at_ = std::min(depth_at_, text_.size() + i);
        }
    }

    common_chat_parser_params params_;
    std::string text_, unread_;
    common_chat_msg now_, said_;
    size_t n_read_ = 0;           // bytes that were found to be in the format
    int64_t next_us_ = 0;         // when to look again
    int depth_ = 0;
    size_t depth_at_ = std::string::npos;  // where the text was nested too deep
};

}  // namespace tea

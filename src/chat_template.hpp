// llama.cpp's own chat code (common/chat.h) behind one plain class: a model's Jinja template, applied to messages.
#pragma once

#include <string>

#include "chat.h"
#include "guard.hpp"

namespace tea {

class ChatTemplate {
  public:
    // The model's template, or `source` where it is not empty.
    ChatTemplate(const llama_model * model, const std::string & source) {
        Guard guard;
        templates_ = common_chat_templates_init(model, source);
    }

    // The prompt for messages in the OpenAI API's JSON. A BOS that the tokenizer adds is not written twice.
    std::string render(const std::string & messages, bool add_generation_prompt) const {
        Guard guard;
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages));
        inputs.add_generation_prompt = add_generation_prompt;
        return common_chat_templates_apply(templates_.get(), inputs).prompt;
    }

  private:
    common_chat_templates_ptr templates_;
};

}  // namespace tea

// llama.cpp's own chat code (common/chat.h) behind one plain class: a Jinja template, applied to messages and tools.
#pragma once

#include <stdexcept>
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
        can_call_in_parallel_ = common_chat_templates_get_caps(templates_.get())["supports_parallel_tool_calls"];
        can_think_ = common_chat_templates_support_enable_thinking(templates_.get());
    }

    // The prompt for the fields of a chat completion request in the OpenAI API's JSON, and all that goes with it: how
    // the answer is constrained and read. What is not given is as in llama.cpp's server. A BOS that the tokenizer adds
    // is not written twice.
    common_chat_params apply(const std::string & request) const {
        Guard guard;
        const common_json body = common_json::parse(request);
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(body.at("messages"));
        if (body.contains("tools")) inputs.tools = common_chat_tools_parse_oaicompat(body.at("tools"));
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(body.value("tool_choice", std::string("auto")));
        inputs.parallel_tool_calls = body.value("parallel_tool_calls", can_call_in_parallel_);
        inputs.reasoning_format = common_reasoning_format_from_name(body.value("reasoning_format", std::string("auto")));
        inputs.enable_thinking = body.value("enable_thinking", can_think_);
        if (body.contains("json_schema")) inputs.json_schema = body.at("json_schema").dump();
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
        return common_chat_templates_apply(templates_.get(), inputs);
    }

  private:
    common_chat_templates_ptr templates_;
    bool can_call_in_parallel_, can_think_;
};

}  // namespace tea

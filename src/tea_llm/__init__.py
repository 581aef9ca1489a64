"""Use a language model on this machine, and an OpenAI-compatible API when it can't answer."""

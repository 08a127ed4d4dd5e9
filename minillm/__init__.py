"""minillm: the modern LLM stack, by hand and readable."""

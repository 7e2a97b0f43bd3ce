"""Text at the edges of the engine: tokenizer, chat templates, streamed detokenisation, stop strings."""

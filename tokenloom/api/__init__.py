"""The HTTP face: OpenAI-compatible endpoints over any `EngineClient`."""

"""Training of the embedded target and draft models (see docs/embedded-models.md)."""

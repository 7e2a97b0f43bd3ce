"""Training of the embedded target (see docs/embedded-models.md)."""

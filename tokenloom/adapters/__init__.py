"""Adapters: low-rank updates of a base model, read from the PEFT format, checked and kept."""

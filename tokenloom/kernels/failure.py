"""What a backend raises when a step that it had accepted fails."""

from __future__ import annotations


class StepFailed(Exception):
    """Computing failed (the cause says how) after the batch was found legal: pages that it would have written
    are in an unknown state."""

"""The engine: requests, sequences, token batches, pages and the step. Pure Python and numpy."""

"""Model families as builders of op records, and the loading of their checkpoints."""

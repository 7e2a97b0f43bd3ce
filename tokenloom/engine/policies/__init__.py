"""Pure decisions: order, budget, chunking. No I/O, nothing beyond numpy."""

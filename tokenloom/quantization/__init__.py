"""Weight formats: what a rounded matrix is, how it is made, and how checkpoints store it."""

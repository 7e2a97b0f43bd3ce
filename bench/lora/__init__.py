"""What bench/adapters.py measures: one module for each concern. part.py runs one part in a process of its own."""

"""The program in numpy: the backend that runs wherever numpy runs."""

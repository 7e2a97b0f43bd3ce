"""An engine process on the simulated executor: `python -m tests.serving.simulated_process [step seconds]`."""

from __future__ import annotations

import sys

from tests.serving.helpers import parts_of
from tokenloom.serving.engine_process import main

if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    sys.exit(main(lambda config, listener: parts_of(config, seconds)))

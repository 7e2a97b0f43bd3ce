"""A process that reads, checks and packs adapters at low priority, as a server does beside its engine.

Started with a specification (JSON); prepares each directory that comes as a line of standard input, and answers
with a line: what `offer_adapter` needs. A first line says that it is ready.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tokenloom.models.loading import describe_model
from tokenloom.runtime.adapter_host import AdapterFormat
from tokenloom.serving.adapter_library import AdapterLibrary

NICENESS = 10


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.nice(NICENESS)
    model = Path(spec["model"])
    program = describe_model(model).program
    with tempfile.TemporaryDirectory(dir=spec["work"], prefix="preparing-") as folder:
        library = AdapterLibrary(model, program, AdapterFormat(*spec["format"]), data_dir=folder)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            prepared, _ = library.prepare(json.loads(line))
            print(json.dumps([prepared.content_id, str(prepared.image)]), flush=True)
        library.close()


if __name__ == "__main__":
    main()

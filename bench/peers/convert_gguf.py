"""llama.cpp's converter, taught the tokenizer of make_models.py.

    python convert_gguf.py LLAMA_CPP_SOURCE MODEL --outtype bf16 --outfile FILE

The converter knows tokenizers by a hash and refuses ours. Its pre-tokenizer is GPT-2's, so that is what we
answer; the benchmark sends token ids anyhow.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    source = Path(sys.argv[1]).resolve()
    # The converter's packages are beside it, not installed.
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

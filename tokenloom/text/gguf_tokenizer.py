"""The tokenizer and the chat templates that a GGUF file carries, as the `tokenizers` library runs them.

Two kinds are read: byte-level BPE ("gpt2") with its merges, and SentencePiece with scores ("llama"), whose merges
are worked out from the scores. What llama.cpp takes where a file says nothing is taken here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from tokenloom.errors import ModelError, shorten
from tokenloom.gguf.file import GgufFile
from tokenloom.text.tokenizer_files import TokenizerFiles

_PREFIX: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
_MAX_TOKENS: Final = 1 << 24
_MAX_PIECE: Final = 256
"""Characters of a piece: every place in it is tried for a merge."""

# Types of tokens, as SentencePiece numbers them.
_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """How a text is cut before BPE: by each pattern in turn, matches and what is between them. `whole_words`: a
    piece that is a token is not merged. `add_bos` where the file does not say."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_DEFAULT: Final = _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_DIGITS: Final = _Splitting((r"\p{N}", _GPT2))
_LLAMA_BPE: Final = _Splitting((_LLAMA3,), whole_words=True, add_bos=True)
_SPLITTINGS: Final[Mapping[str, _Splitting]] = {
    "default": _DEFAULT,
    "gpt-2": _Splitting((_GPT2,)),
    "olmo": _Splitting((_GPT2,)),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "dbrx": _Splitting((_LLAMA3,)),
    "smaug-bpe": _Splitting((_LLAMA3,)),
    "qwen2": _Splitting((_QWEN2,)),
    "deepseek-r1-qwen": _Splitting((_QWEN2,)),
    "stablelm2": _Splitting((_QWEN2,)),
    "deepseek-coder": _Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    "refact": _DIGITS,
    "starcoder": _DIGITS,
    "command-r": _DIGITS,
    "smollm": _DIGITS,
    "tekken": _Splitting((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": _Splitting((_GPT4O,)),
}


def read_gguf_tokenizer(path: Path) -> TokenizerFiles:
    """Read and check the tokenizer in the GGUF file `path`; raises `ModelError`."""
    with GgufFile(path) as file:
        return _Reader(file).read()


class _Reader:
    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = file.text(_PREFIX + "model")
        if self.model not in ("gpt2", "llama"):
            file.refuse(_PREFIX + "model", "gpt2 (byte-level BPE) or llama (SentencePiece)")
        # An empty token keeps its number under a name, as in llama.cpp.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(file.strings(_PREFIX + "tokens"))]
        if not 0 < len(self.tokens) <= _MAX_TOKENS:
            file.refuse(_PREFIX + "tokens", f"1 to {_MAX_TOKENS} tokens")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise ModelError(f"{file.path}: {_PREFIX}tokens with {shorten(twice)} twice", "different tokens")
        self.kinds = self._numbers("token_type", "iu", 1)

    def read(self) -> TokenizerFiles:
        is_pieces = self.model == "llama"
        try:
            backend, add_bos = self._pieces() if is_pieces else self._byte_level()
            self._add_tokens(backend)
        except ModelError:
            raise
        except Exception as error:  # the library raises plain Exception for merges that do not fit
            raise ModelError(
                f"{self.file.path}: {_PREFIX}merges or tokens: {error}", "a tokenizer"
            ) from error
        named = self._named(is_pieces)
        add_bos = self.file.flag(_PREFIX + "add_bos_token", add_bos)
        add_eos = self.file.flag(_PREFIX + "add_eos_token", False)
        around = [
            self._required(named, name) for name, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted
        ]
        if around:
            first, last = ([around[0]] if add_bos else []), ([around[-1]] if add_eos else [])
            backend.post_processor = processors.TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", "$B:1", *last],
                special_tokens=[(token, self.ids[token]) for token in dict.fromkeys(around)],
            )
        return TokenizerFiles(backend, named, self._templates())

    def _byte_level(self) -> tuple[tokenizers.Tokenizer, bool]:
        pre = self.file.text(_PREFIX + "pre", "default")
        splitting = _SPLITTINGS.get(pre)
        if splitting is None:
            self.file.refuse(_PREFIX + "pre", ", ".join(_SPLITTINGS))
        merges: list[tuple[str, str]] = []
        for merge in self.file.strings(_PREFIX + "merges"):
            # The first part may itself begin with a space.
            cut = merge.find(" ", 1)
            if cut < 0:
                raise ModelError(
                    f"{self.file.path}: the merge {shorten(merge)}", "two parts and a space between"
                )
            merges.append((merge[:cut], merge[cut + 1 :]))
        model = models.BPE(vocab=self.ids, merges=merges, ignore_merges=splitting.whole_words)
        backend = tokenizers.Tokenizer(model)
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
        backend.decoder = decoders.ByteLevel()
        return backend, splitting.add_bos

    def _pieces(self) -> tuple[tokenizers.Tokenizer, bool]:
        scores = self._numbers("scores", "iuf", 0.0)
        for token, kind in zip(self.tokens, self.kinds, strict=True):
            if kind == _NORMAL and len(token) > _MAX_PIECE:
                found = f"{self.file.path}: the piece {shorten(token)} of {len(token)} characters"
                raise ModelError(found, f"pieces of at most {_MAX_PIECE}")
        unknown = self.file.integer(_PREFIX + "unknown_token_id", 0, len(self.tokens) - 1, default=0)
        model = models.BPE(
            vocab=self.ids,
            merges=list(_merges(self.ids, scores)),
            unk_token=self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        backend = tokenizers.Tokenizer(model)
        prefix = self.file.flag(_PREFIX + "add_space_prefix", True)
        marks = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if prefix else marks
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return backend, True

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Tokens that are found in a text before it is cut. Phi 3's take the space behind them along, which its
        files do not say: llama.cpp goes by the name of the model, and so must we."""
        name = self.file.text("general.name", "").lower()
        strips = "phi-3" in name or "phi3" in name
        added = []
        for i in np.flatnonzero(np.isin(self.kinds, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist():
            token = self.tokens[i]
            rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
            special = bool(self.kinds[i] != _USER_DEFINED)
            added.append(tokenizers.AddedToken(token, special=special, normalized=False, rstrip=rstrip))
        backend.add_tokens(added)

    def _named(self, is_pieces: bool) -> dict[str, str]:
        names = {
            "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator",
            "pad_token": "padding", "cls_token": "cls", "mask_token": "mask",
        }  # fmt: skip
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_pieces else {}
        last = len(self.tokens) - 1
        found: dict[str, str] = {}
        for name, theirs in names.items():
            token = self.file.optional_integer(f"{_PREFIX}{theirs}_token_id", 0, last)
            token = defaults.get(theirs) if token is None else token
            if token is not None and token <= last:
                found[name] = self.tokens[token]
        return found

    def _required(self, named: Mapping[str, str], name: str) -> str:
        if f"{name}_token" not in named:
            self.file.refuse(f"{_PREFIX}{name}_token_id", f"the token that add_{name}_token puts there")
        return named[f"{name}_token"]

    def _numbers(self, name: str, kinds: str, default: float) -> Any:
        """An array of one number a token, of one of the numpy `kinds`."""
        key = _PREFIX + name
        if key not in self.file.metadata:
            return np.full(len(self.tokens), default)
        values = self.file.numbers(key)
        is_sound = len(values) == len(self.tokens) and values.dtype.kind in kinds
        if not is_sound or not np.isfinite(values).all():
            self.file.refuse(key, f"a number for each of the {len(self.tokens)} tokens")
        return values

    def _templates(self) -> dict[str, str]:
        found = {"default": self.file.text(_TEMPLATE)} if _TEMPLATE in self.file.metadata else {}
        for key in self.file.metadata:
            if key.startswith(_TEMPLATE + "."):
                found[key.removeprefix(_TEMPLATE + ".")] = self.file.text(key)
        return found


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """All ways to make a token of two others, the best score first: what SentencePiece merges first.

    Ways to the same token compete only by where they stand in a text; the order among them is that of the parts'
    numbers, as the converters of transformers have it.
    """
    order = sorted(ids.values(), key=lambda i: -scores[i])
    tokens = list(ids)
    for i in order:
        token = tokens[i]
        if len(token) > _MAX_PIECE:
            continue  # no normal piece: these are found whole, before anything is merged
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in parts if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))

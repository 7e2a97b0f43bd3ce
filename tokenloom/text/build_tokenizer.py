"""Builds tokenizers of the `tokenizers` library from what other formats store.

Two families: SentencePiece BPE from its pieces and scores, byte-level BPE from a vocabulary and its merges. Both
decode with the steps that `tokenloom.text.pieces` joins exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tokenloom.errors import ModelError
from tokenloom.text.pieces import SPACE_MARK, byte_of_character

Prefix = Literal["none", "first", "every"]
PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]
PreTokenizerKind = Literal["gpt2", "digits", "cl100k", "qwen2", "o200k", "deepseek-coder"]
PRE_TOKENIZER_KINDS: tuple[PreTokenizerKind, ...] = get_args(PreTokenizerKind)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# The whole split of a kind in one expression; "gpt2" and "digits" use the one inside the library.
_EXPRESSIONS: Mapping[PreTokenizerKind, str] = {
    "cl100k": f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",
    "qwen2": f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# More than any text begins with.
_ALL_SPACES = 1 << 30
_MAX_PIECE = 1024
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-퟿]+")


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[PieceKind],
    *,
    prefix: Prefix = "every",
    remove_extra_whitespaces: bool = False,
    charsmap: bytes = b"",
) -> tokenizers.Tokenizer:
    """A SentencePiece BPE tokenizer; `pieces[i]` has id i, `scores[i]` orders the merges, highest first.

    Control pieces and the one for unknown characters become special tokens; user-defined pieces are found
    before all others. `prefix` is where a space goes in front of text: nowhere, at the beginning of the text
    unless it begins with one, or always and after every special token too. `charsmap` is the compiled
    normalisation of the model; the library applies it to whole graphemes, so a few sequences of
    combining characters differ from SentencePiece's. There must be a piece for an unknown character, or one
    for each byte. Raises `ModelError` for pieces that are no such model.
    """
    if not pieces or not len(pieces) == len(scores) == len(kinds):
        found = f"{len(pieces)} pieces, {len(scores)} scores and {len(kinds)} kinds"
        raise ModelError(found, "one of each per token")
    _check_lengths(pieces)
    vocabulary = _ids(pieces)
    _check_kinds(pieces, kinds)
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == "unknown"), None)
    # A user-defined piece is cut out as a word and taken as it is: its characters need not be pieces.
    whole = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == "user_defined"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of_scores(vocabulary, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="byte" in kinds,
            ignore_merges=bool(whole),
        )
    )
    backend.normalizer = _sentencepiece_normalizer(prefix, remove_extra_whitespaces, charsmap)
    words: list[pre_tokenizers.PreTokenizer] = []
    if prefix == "first":
        words.append(pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="first", split=False))
    if whole:
        try:
            words.append(pre_tokenizers.Split(Regex(_cut_out(whole)), "isolated"))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(
                f"{len(whole)} user-defined pieces that cannot be looked for ({error})", "fewer of them"
            ) from error
    if words:
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    join: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    dropped = _ALL_SPACES if remove_extra_whitespaces else int(prefix != "none")
    backend.decoder = decoders.Sequence([*join, decoders.Strip(" ", dropped, 0)] if dropped else join)
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind in ("control", "unknown"):
            backend.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
    return backend


def _sentencepiece_normalizer(
    prefix: Prefix, remove_extra_whitespaces: bool, charsmap: bytes
) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        try:
            steps.append(normalizers.Precompiled(charsmap))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"a character map that cannot be read ({error})", "a compiled one") from error
    if remove_extra_whitespaces:
        # Only spaces, at the end also their marks: the library's own Strip takes line breaks and more.
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE_MARK}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefix == "every":
        steps.append(normalizers.Prepend(SPACE_MARK))
    if prefix != "first":
        steps.append(normalizers.Replace(" ", SPACE_MARK))
    return normalizers.Sequence(steps)


def _cut_out(whole: Sequence[str]) -> str:
    """An expression that matches the longest of the pieces `whole`.

    It also parts "<" from "0x0A>" where that spelling of a byte is a word of its own: such a word would be
    taken for the byte.
    """
    any_of = "|".join(map(_literal, sorted(whole, key=len, reverse=True)))
    return rf"{any_of}|(?:\A|(?<={any_of}))<(?=0x[0-9A-F]{{2}}>(?:\z|{any_of}))"


def _literal(text: str) -> str:
    """An expression of the library's engine that matches `text` alone."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def merges_of_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[PieceKind]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece performs, the first to be tried first.

    It joins the neighbours whose union has the highest score, of equal ones the leftmost. The library orders
    pairs instead of unions; of two pairs with the same union the one with the shorter left part comes first.
    """
    mergeable = {piece for piece, i in vocabulary.items() if kinds[i] == "normal"}
    found: list[tuple[float, int, int, str]] = []
    for piece, i in vocabulary.items():
        if piece in mergeable:
            found += [
                (-scores[i], i, cut, piece)
                for cut in range(1, len(piece))
                if piece[:cut] in mergeable and piece[cut:] in mergeable
            ]
    found.sort()
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in found]


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    kind: PreTokenizerKind,
    *,
    add_prefix_space: bool = False,
    ignore_merges: bool = False,
    normalize_nfc: bool | None = None,
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: `vocabulary` maps tokens in the alphabet of byte-level BPE to ids.

    `kind` is how text is cut into words before the merges: "gpt2" (also OPT, Phi 2), "digits" (the same with
    each digit alone: StarCoder, SmolLM, Granite), "cl100k" (Llama 3, Phi 4, OLMo 2), "qwen2" (also
    StableLM 2), "o200k" (GPT-4o's), "deepseek-coder". `ignore_merges` takes a word that is a token as that
    token (tiktoken's rule). `normalize_nfc` composes characters first, None for the habit of the kind. Raises
    `ModelError` for an unknown kind or a merge that the vocabulary lacks.
    """
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=ignore_merges)
        )
    except Exception as error:  # the library raises plain Exception for a merge without a token
        raise ModelError(
            f"merges that do not fit the vocabulary ({error})", "tokens for all merges"
        ) from error
    backend.pre_tokenizer = _pre_tokenizer(kind, add_prefix_space)
    if normalize_nfc or (normalize_nfc is None and kind == "qwen2"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(kind: PreTokenizerKind, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    own_split = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    no_split = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    if kind == "gpt2":
        return own_split
    if kind == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own_split])
    if kind == "deepseek-coder":
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _DEEPSEEK_CODER]
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([*splits, digits, no_split])
    if kind not in _EXPRESSIONS:
        raise ModelError(f"pre-tokenizer {kind!r}", ", ".join(PRE_TOKENIZER_KINDS))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_EXPRESSIONS[kind]), "isolated"), no_split])


def vocabulary_of_ranks(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges for `byte_level_bpe` from tiktoken's ranks (token bytes -> id).

    tiktoken joins the neighbours whose union has the lowest rank, so a token's rank is the rank of all its
    cuts into two tokens. Use with `ignore_merges`.
    """
    _check_lengths(ranks)
    character = {byte: mark for mark, byte in byte_of_character().items()}
    spelt = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = [
        (spelt[token[:cut]], spelt[token[cut:]])
        for token, _ in sorted(ranks.items(), key=lambda entry: entry[1])
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {spelt[token]: rank for token, rank in ranks.items()}, merges


def put_around(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put the token `bos` in front of each text and `eos` behind it, where they are not None."""
    tokens: list[tuple[str, int]] = []
    for token in (bos, eos):
        if token is not None:
            token_id = backend.token_to_id(token)
            if token_id is None:
                raise ModelError(f"no token {token!r} to put around a text", "a token of the vocabulary")
            tokens.append((token, token_id))
    if tokens:
        single = [part for part in (bos, "$A", eos) if part is not None]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def _check_lengths(pieces: Collection[str | bytes]) -> None:
    """All cuts of a piece into two are looked at, so that a long one would take for ever."""
    longest = max(map(len, pieces), default=0)
    if longest > _MAX_PIECE:
        raise ModelError(f"a piece of {longest} characters in the vocabulary", f"at most {_MAX_PIECE}")


def _ids(pieces: Sequence[str]) -> dict[str, int]:
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        twice = next(piece for i, piece in enumerate(pieces) if ids[piece] != i)
        raise ModelError(f"piece {twice!r} twice in the vocabulary", "different pieces")
    return ids


def _check_kinds(pieces: Sequence[str], kinds: Sequence[PieceKind]) -> None:
    if "unused" in kinds:
        raise ModelError("unused pieces in the vocabulary", "a vocabulary without, or a tokenizer.json")
    named = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == "byte"}
    if not named and "unknown" not in kinds:
        raise ModelError("a vocabulary without a piece for unknown characters", "one, or a piece per byte")
    if named and named != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise ModelError(f"{len(named)} byte pieces", "the 256 pieces <0x00> to <0xFF>, or none")

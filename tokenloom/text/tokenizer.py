"""The tokenizer of a model: text to token ids and back, special tokens, chat rendering."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.gguf.file import find_gguf
from tokenloom.text.chat_template import ChatTemplate
from tokenloom.text.gguf_tokenizer import read_gguf_tokenizer
from tokenloom.text.library_panics import panics_refused
from tokenloom.text.pieces import Pieces, pieces_of
from tokenloom.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

# The compute threads own the cores, so the library must not start a thread pool of its own beside them. It
# reads this variable at its first batch and offers no other switch. setdefault leaves the choice of whoever
# set it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A tokenizer loaded from local files; safe to use from several threads.

    `pieces` is what each token adds to the text, or None for decoders that do not simply join bytes.
    `special_ids` are the tokens that `skip_special_tokens` leaves out. `vocab_size` is the highest token id
    plus one; the model may have more rows. `special_tokens` maps names to texts ("eos_token" -> "</s>").
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend: tokenizers.Tokenizer = files.backend
        self._templates = {name: ChatTemplate(source) for name, source in files.chat_templates.items()}
        self.special_tokens: Mapping[str, str] = files.special_tokens
        self.pieces: Pieces | None = pieces_of(files.backend)
        self.special_ids: frozenset[int] = frozenset(
            token_id for token_id, token in files.backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = max(files.backend.get_vocab().values(), default=-1) + 1
        if not self.vocab_size:
            raise ModelError("a tokenizer with an empty vocabulary", "at least one token")

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load the tokenizer of a local Hugging Face directory, or of a GGUF file.

        Of a directory it reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json
        and the files of chat templates. Raises `ModelError` that names what is missing or malformed.
        """
        gguf = find_gguf(path)
        return cls(read_tokenizer_files(Path(path)) if gguf is None else read_gguf_tokenizer(gguf))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by their spelling, added ones included."""
        return self._backend.get_vocab()

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, None if the model has none."""
        return self.special_token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, None if the tokenizer's files name none."""
        return self.special_token_id("eos_token")

    def special_token_id(self, name: str) -> int | None:
        """Id of a named special token ("pad_token"), None if there is none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template used without tools, None for models without one."""
        template = self._templates.get("default")
        return None if template is None else template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelt out in it become their ids.

        `add_special_tokens` puts around it what the model expects around a text (often a BOS); a rendered
        chat has that already. Raises `InvalidParameter` for text that is not valid Unicode, or that the tokenizer's
        files have no tokens for.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""
        return [encoding.ids for encoding in self._encodings(texts, add_special_tokens)]

    def _encodings(self, texts: Sequence[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        try:
            with panics_refused():
                return self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            # JSON may spell half of a surrogate pair ("\\ud800"), which is no character and has no tokens.
            raise InvalidParameter("prompt", texts, "text of valid Unicode characters") from None
        except ModelError:
            raise
        except Exception as error:
            # Such as no token for what is unknown, in files that lack one.
            raise InvalidParameter(
                "prompt", texts, f"text that the tokenizer has tokens for ({error})"
            ) from error

    def encode_truncated(
        self, texts: Sequence[str], max_tokens: int, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of the beginning of each text, at most `max_tokens` with those that `add_special_tokens` puts
        around it. Raises `InvalidParameter` where these alone are too many."""
        found = []
        for encoding in self._encodings(texts, add_special_tokens):
            ids = list(encoding.ids)
            if len(ids) > max_tokens:
                mask = encoding.special_tokens_mask
                num_behind = next((i for i, special in enumerate(reversed(mask)) if not special), len(mask))
                if max_tokens <= sum(mask):
                    limit = f"at least {sum(mask) + 1}: a text has {sum(mask)} special tokens around it"
                    raise InvalidParameter("truncate_prompt_tokens", max_tokens, limit)
                ids = ids[: max_tokens - num_behind] + ids[len(ids) - num_behind :]
            found.append(ids)
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, equal to what `IncrementalDetokenizer` streams; unknown ids add nothing.

        Equals transformers, except that wrong bytes among SentencePiece byte tokens do not take their valid
        neighbours with them (see `tokenloom.text.pieces`).
        """
        if self.pieces is None:
            with panics_refused():
                return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.pieces.decode(token_ids, self.special_ids if skip_special_tokens else frozenset())

    def token_text(self, token_id: int) -> str:
        """Text that the token adds inside a text, incomplete characters as U+FFFD; "" for unknown ids."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that the token adds inside a text: b" Hello", or one byte of a character.

        b"" for unknown ids. Joined over the tokens of a text they are the text, for logprobs.
        """
        if self.pieces is not None:
            return self.pieces.bytes_of(token_id)
        # Other decoders treat the first token of a text differently, so look at the token behind itself.
        alone = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return (twice[len(alone) :] if twice.startswith(alone) else alone).encode()

    def token_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary, None if there is none."""
        return self._backend.token_to_id(token)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        `add_generation_prompt` (on, unless the final message is continued) opens the assistant's turn;
        `continue_final_message` leaves a final assistant message open for the model to go on with. `tools`
        select the template "tool_use" where the model has one. `variables` are further names for the
        template. Raises `InvalidParameter` naming the message and what is wrong with it.
        """
        template = self._templates.get("default")
        if tools is not None:
            template = self._templates.get("tool_use", template)
        if template is None:
            known = ", ".join(sorted(self._templates))
            named = f"this model's chat templates ({known}) have none named default"
            missing = "this model has no chat template; use /v1/completions"
            raise InvalidParameter("messages", len(messages), "empty", message=named if known else missing)
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**self.special_tokens, **variables},
        )

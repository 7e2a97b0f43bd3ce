"""Failures inside the `tokenizers` library that are no `Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokenloom.errors import ModelError


@contextmanager
def panics_refused() -> Iterator[None]:
    """Raise `ModelError` where the library panics, as it does for some tokenizer files that cannot be.

    Its exception derives from `BaseException` and is exported nowhere, so that its name has to tell.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"a tokenizer that fails inside its library ({error})", "a tokenizer that runs"
        ) from None

"""Tokenizers of foreign folders: read into ours, and written so that the other library reads them."""

from __future__ import annotations

from pathlib import Path

from bvl.convert.families import TextFacts
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import ConversionError


def read_tokenizer(
    folder: Path, facts: TextFacts, *, context_length: int
) -> tuple[Tokenizer, TokenizerConfig]:
    """(tokenizer, options that load it again) of a foreign folder; raises ConversionError or DataError."""
    options = TokenizerConfig(
        context_length=context_length,
        embedding_rows=facts.embedding_rows,
        start="" if facts.start_id == -1 else None,
    )
    tokenizer = Tokenizer.of(folder / "tokenizer.json", options)
    if tokenizer.vocab_size > facts.embedding_rows:
        raise ConversionError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {facts.embedding_rows} rows"
        )
    return tokenizer, options

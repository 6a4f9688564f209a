"""SentencePiece's unigram models (T5, SigLIP) as a `tokenizers` model, without the sentencepiece package.

A `.model` file is a protocol buffer: pieces with scores (field 1), what trained it (2), how text is normalised (3); see
sentencepiece_model.proto of https://github.com/google/sentencepiece (Kudo and Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from bvl.errors import ConversionError

_UNIGRAM = 1
# Kinds of pieces that a text is never split into.
_UNKNOWN, _CONTROL, _UNUSED = 2, 3, 5
_USER_DEFINED, _BYTE = 4, 6
_SPACE = "\u2581"


def read_sentencepiece(path: Path) -> tokenizers.Tokenizer | None:
    """The model of a `.model` file; None where it is of a kind that is not reproduced (BPE, symbols of its user).

    Raises ConversionError for a damaged file.
    """
    try:
        return _read(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise ConversionError(f"{path} is damaged, or no SentencePiece model: {error}") from error


def _read(data: bytes) -> tokenizers.Tokenizer | None:
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    trainer, normalizer = {}, {}
    for field, value in _fields(data):
        if field == 1:
            entry = dict(_fields(value))
            pieces.append((entry[1].decode("utf-8"), struct.unpack("<f", entry.get(2, b"\0\0\0\0"))[0]))
            kinds.append(entry.get(3, 1))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    # Options of the two messages: model_type, treat_whitespace_as_suffix; remove_extra_whitespaces, escape_whitespaces.
    as_usual = trainer.get(3, _UNIGRAM) == _UNIGRAM and not trainer.get(24, False)
    if not (as_usual and normalizer.get(4, True) and normalizer.get(5, True)) or _USER_DEFINED in kinds:
        return None
    unknown = kinds.index(_UNKNOWN)
    model = tokenizers.Tokenizer(models.Unigram(pieces, unknown, _BYTE in kinds))
    steps = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    model.normalizer = normalizers.Sequence(
        [*steps, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    scheme = "always" if normalizer.get(3, True) else "never"
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    model.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    model.add_special_tokens(
        [
            tokenizers.AddedToken(piece, special=True, normalized=False)
            for (piece, _), kind in zip(pieces, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _UNUSED)
        ]
    )
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message: whole numbers, or bytes of what has a length or a fixed size."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {at} is no field")
        if at + size > len(data):
            raise ValueError(f"it ends within a field at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, place behind it) of a number of seven bits a byte, lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

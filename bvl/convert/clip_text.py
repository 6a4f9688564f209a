"""How CLIP reads a text, and what open_clip does to it before: cleaning, its own file of merges, words and bytes.

Of the repairs that open_clip leaves to ftfy those of quotes, ligatures, control characters and the common HTML entities
are made, not those of text that was decoded wrongly.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

Clean = Literal["lower", "whitespace", "canonicalize"]

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_TOKENS = 49408
# Contractions, runs of letters, single digits, runs of the rest: how CLIP splits a text (Radford et al. 2021).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Of what Python calls white space, the separators \x1c to \x1f are none to the regular expressions here.
_SPACES = (normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "), normalizers.Strip())


def cleaning(clean: Clean) -> list[normalizers.Normalizer]:
    """What open_clip's `clean` does to a text: entities, quotes, ligatures, white space, and lower case by option."""
    entities = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " "}
    ligatures = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl"}
    replaced = [normalizers.Replace(old, new) for old, new in (entities | ligatures).items()]
    replaced += [
        normalizers.Replace(Regex(r"[\x00-\x08\x0b\x0e-\x1f\x7f]"), ""),
        normalizers.Replace(Regex("[\u2018-\u201b\u02bc]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
        normalizers.NFC(),
    ]
    if clean == "canonicalize":
        return [*replaced, normalizers.Replace("_", " "), *canonical(lowercase=True)]
    lower = [normalizers.Lowercase()] if clean == "lower" else []
    return [*replaced, *lower, *_SPACES]


def canonical(lowercase: bool) -> list[normalizers.Normalizer]:
    """SigLIP's cleaning: no ASCII punctuation, single spaces, lower case by option (Zhai et al. 2023)."""
    lower = [normalizers.Lowercase()] if lowercase else []
    return [*lower, normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), *_SPACES]


def find_bpe_file(folder: Path) -> Path | None:
    """open_clip's vocabulary in the folder, or in the installed package (which is not imported)."""
    package = importlib.util.find_spec("open_clip")
    places = [folder, *map(Path, package.submodule_search_locations or ())] if package else [folder]
    return next((place / BPE_FILE for place in places if (place / BPE_FILE).is_file()), None)


def read_bpe(path: Path, additional: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """(model, special tokens by role) of open_clip's file of merges: bytes, bytes that end words, merges, special."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : BPE_TOKENS - 2 * 256 - 2 + 1]]
    letters = _byte_letters()
    start, end = "<start_of_text>", "<end_of_text>"
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), start, end, *additional]
    vocab = {word: i for i, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    model.add_special_tokens([start, end, *additional])
    split_as_clip(model)
    decode_word_ends(model)
    # open_clip pads with zeros.
    return model, {"start": start, "end": end, "pad": words[0]}


def _byte_letters() -> list[str]:
    """The letters that stand for bytes in byte-level BPE: printable bytes for themselves, in order, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def split_as_clip(model: tokenizers.Tokenizer) -> None:
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def decode_word_ends(model: tokenizers.Tokenizer) -> None:
    """Let decoding write a space where a word ends; in the byte alphabet that is "Ġ"."""
    if getattr(model.model, "end_of_word_suffix", None) == "</w>":
        model.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])

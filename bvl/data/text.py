"""Text to token ids: tokenizers that are trained on the run's texts or loaded from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from bvl.errors import ConfigError, DataError

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[START]", "[END]", "[MASK]"
# The names that public tokenizers give to these roles, ours first.
ROLES: dict[str, tuple[str, ...]] = {
    "pad": (PAD, "<pad>", "<|endoftext|>", "<|end_of_text|>"),
    "start": (START, "[CLS]", "<s>", "<|startoftext|>", "<start_of_text>"),
    "end": (END, "[SEP]", "</s>", "<|endoftext|>", "<end_of_text>"),
    "mask": (MASK, "<mask>"),
    "unknown": (UNKNOWN, "<unk>", "<|unk|>"),
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`path` loads a tokenizer.json or vocab.txt; without it one is trained on the training text and kept in the run.

    vocab_size: of a trained tokenizer; all characters of the text get a token even if they are more.
    start, end, pad: names of the tokens before, after and behind a text; None finds them by their usual names.
      start="" puts no token in front, as in SigLIP.
    embedding_rows: of the model's token embedding, where it has more than the tokenizer has tokens.
    """

    path: str | None = None
    kind: Literal["wordpiece", "bpe"] = "wordpiece"
    vocab_size: int = 4096
    lowercase: bool = True
    context_length: int = 64
    start: str | None = None
    end: str | None = None
    pad: str | None = None
    embedding_rows: int | None = None

    def __post_init__(self):
        if self.context_length < 3:
            raise ConfigError(
                f"context_length={self.context_length}: start, one token and end need at least 3"
            )
        least = 8 if self.kind == "wordpiece" else 261
        if self.vocab_size < least:
            raise ConfigError(f"vocab_size={self.vocab_size}: must be at least {least} for {self.kind}")
        for role in ("end", "pad"):
            if getattr(self, role) == "":
                raise ConfigError(f'{role}="": every text needs this token; only start can be left out')
        if self.embedding_rows is not None and self.embedding_rows < 1:
            raise ConfigError(f"embedding_rows={self.embedding_rows}: must be at least 1")


class Tokenizer:
    """A Hugging Face `tokenizers` model with start, end and padding to a fixed context length.

    start, end, pad: names of these tokens; None finds them by their usual names, start="" does without.
    start_id: None where texts have no start token.
    mask_id: of the token that hides a word from a masked language model; None where the vocabulary has none.
    unknown_id: of the token that stands for what the vocabulary has not; None where there is none.
    control_ids: of entries that are neither words nor one of the usual special tokens, as `with_tokens` adds them.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        context_length: int,
        *,
        start: str | None = None,
        end: str | None = None,
        pad: str | None = None,
    ):
        model.no_padding()
        model.no_truncation()
        self._model = _reading_plain_text(model)
        self._roles = {"start": start, "end": end, "pad": pad}
        self.context_length = context_length
        self.start_id = None if start == "" else _role_id(model, "start", start)
        self.end_id, self.pad_id = _role_id(model, "end", end), _role_id(model, "pad", pad)
        self.mask_id = _find_role(model, "mask")
        self.unknown_id = _find_role(model, "unknown")
        names = {*itertools.chain(*ROLES.values()), start, end, pad}
        self.control_ids = frozenset(
            i
            for i, token in model.get_added_tokens_decoder().items()
            if token.special and token.content not in names
        )
        # Ids may have gaps; a token embedding needs a row up to the highest.
        self.vocab_size = 1 + max(model.get_vocab().values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Pickling, as for worker processes, forgets the option.
        _reading_plain_text(self._model)

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig, extra: Sequence[str] = ()) -> Tokenizer:
        """Learn a vocabulary from `texts`; equal texts in equal order give equal tokenizers.

        extra: further entries, as `with_tokens` adds them. Raises DataError if there is no text.
        """
        special = [PAD, UNKNOWN, START, END, MASK]
        texts = list(texts)
        if not any(text.strip() for text in texts):
            raise DataError("the training text is empty: no tokenizer can be trained on it")
        if config.kind == "wordpiece":
            model = _train_wordpiece(texts, config, special)
        else:
            model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
            model.normalizer = _normalizer(config)
            model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
            model.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=special,
                show_progress=False,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            )
            model.train_from_iterator(texts, trainer)
        return cls(model, config.context_length).with_tokens(extra)

    @classmethod
    def without_words(cls, context_length: int) -> Tokenizer:
        """A tokenizer of the special tokens alone, for models that read no text."""
        vocab = {token: i for i, token in enumerate((PAD, UNKNOWN, START, END))}
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=UNKNOWN))
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return cls(model, context_length)

    @classmethod
    def of(cls, path: str | Path, options: TokenizerConfig) -> Tokenizer:
        """Read a file as a config's `options` say; raises DataError as `load` does."""
        return cls.load(
            path,
            options.context_length,
            options.lowercase,
            start=options.start,
            end=options.end,
            pad=options.pad,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        context_length: int,
        lowercase: bool = True,
        *,
        start: str | None = None,
        end: str | None = None,
        pad: str | None = None,
    ) -> Tokenizer:
        """Read a tokenizer.json, or a BERT vocab.txt (`lowercase` then says whether it is uncased).

        start, end, pad: as in `TokenizerConfig`. Raises DataError for a file that is no tokenizer or lacks them.
        """
        roles = {"start": start, "end": end, "pad": pad}
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no tokenizer file {path}")
        if path.suffix == ".txt":
            vocab = _read_vocab(path)
            model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
            model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
            model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            model.decoder = tokenizers.decoders.WordPiece()
            return cls(model, context_length, **roles)
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a bad file
            raise DataError(
                f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}"
            ) from error
        return cls(model, context_length, **roles)

    def with_tokens(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer whose vocabulary has `names` too, those it lacks at its end: entries that no text is read as."""
        new = [name for name in names if self._model.token_to_id(name) is None]
        if not new:
            return self
        tree = json.loads(self._model.to_str())
        vocabulary = tree["model"]["vocab"]
        if isinstance(vocabulary, dict) and self.vocab_size > self._model.get_vocab_size():
            # The library numbers new entries by counting the old ones; where ids have gaps, such a number is taken.
            vocabulary |= {name: self.vocab_size + i for i, name in enumerate(new)}
        model = tokenizers.Tokenizer.from_str(json.dumps(tree))
        model.add_special_tokens(new)
        return Tokenizer(model, self.context_length, **self._roles)

    def with_context(self, context_length: int) -> Tokenizer:
        """The same vocabulary for texts of another length."""
        return Tokenizer(self._model, context_length, **self._roles)

    def model(self) -> tokenizers.Tokenizer:
        """A copy of the Hugging Face model, for what writes tokenizers for other software."""
        return tokenizers.Tokenizer.from_str(self._model.to_str())

    def save(self, path: Path) -> None:
        self._model.save(str(path))

    def encode(self, text: str) -> tuple[Int32[np.ndarray, " t"], Bool[np.ndarray, " t"], bool]:
        """(ids, mask, truncated): start + text + end, padded; a cut text keeps its end token."""
        ids = self.ids(text)
        truncated = len(ids) > self.room
        start = [] if self.start_id is None else [self.start_id]
        ids = [*start, *ids[: self.room], self.end_id]
        tokens = np.full(self.context_length, self.pad_id, np.int32)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.context_length) < len(ids), truncated

    def encode_texts(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "n t"], Bool[np.ndarray, "n t"]]:
        """Token ids and masks of several texts."""
        rows = [self.encode(text) for text in texts]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def ids(self, text: str) -> list[int]:
        """Token ids of the text alone, without start and end, however many."""
        return self._model.encode(text, add_special_tokens=False).ids

    def token_id(self, name: str) -> int:
        """Id of a vocabulary entry; raises DataError where there is none."""
        token_id = self._model.token_to_id(name)
        if token_id is None:
            raise DataError(f"the tokenizer has no token {name}; was the run trained with other controls?")
        return token_id

    def token(self, token_id: int) -> str:
        """The vocabulary entry of an id; raises DataError where there is none."""
        token = self._model.id_to_token(token_id)
        if token is None:
            raise DataError(f"the tokenizer has no token of id {token_id}")
        return token

    def as_shown(self, text: str) -> str:
        """The text as decoding gives it back, up to the end of the context."""
        return self.decode(self.ids(text)[: self.room])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token, without the special tokens and controls."""
        ids = [int(i) for i in ids]
        if self.start_id == self.end_id and len(ids) > 1 and ids[0] == self.start_id:
            ids = ids[1:]
        out = []
        for i in ids:
            if i == self.end_id:
                break
            if i not in (self.pad_id, self.start_id) and i not in self.control_ids:
                out.append(i)
        text = self._model.decode(out, skip_special_tokens=False).strip()
        return _rejoined(text) if isinstance(self._model.model, tokenizers.models.WordPiece) else text

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` are longer than the context."""
        return sum(length > self.room for length in self.lengths(texts))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, without start and end, however long it is."""
        return [len(e.ids) for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    @property
    def room(self) -> int:
        """How many tokens of a text fit into the context, beside start and end."""
        return self.context_length - (1 if self.start_id is None else 2)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Of padding, start, end and controls, which hold no word."""
        return tuple(sorted({self.pad_id, self.start_id, self.end_id} - {None} | self.control_ids))

    def no_words(self, rows: int) -> Bool[np.ndarray, " rows"]:
        """Which of so many ids no text is written with: special tokens but the end, and ids that no token has."""
        written = np.zeros(rows, bool)
        written[list(self._model.get_vocab().values())] = True
        written[list({*self.special_ids, self.mask_id, self.unknown_id} - {self.end_id, None})] = False
        return ~written

    @property
    def hash(self) -> str:
        """Hash of vocabulary and rules; two tokenizers with the same hash give the same ids."""
        roles = {"start": self.start_id, "end": self.end_id, "pad": self.pad_id}
        # Tokens with their usual names add nothing: the hashes of older checkpoints stay what they are.
        unusual = {role: i for role, i in roles.items() if i != _find_role(self._model, role)}
        text = self._model.to_str() + (json.dumps(unusual) if unusual else "")
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rejoined(text: str) -> str:
    """The text with the spaces taken out that WordPiece's splitting at punctuation left: "x - ray", "( ct )".

    Decimals stay apart: "2. 5" may as well be the end of a sentence and the beginning of the next.
    """
    text = re.sub(r"(?<=\w) ([-/]) (?=\w)| (') (?=s\b)", r"\1\2", text)
    return re.sub(r"(?<=[(\[]) | (?=[)\]%;:])", "", text)


def _reading_plain_text(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The model, to which "[END]" written in a caption is text and ends nothing."""
    model.encode_special_tokens = True
    return model


def _read_vocab(path: Path) -> dict[str, int]:
    """Token -> number of its line, counted from 0, as BERT's vocab.txt has them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    # Not splitlines: it would also break at separators that are tokens themselves.
    vocab = {word.rstrip("\r"): i for i, word in enumerate(text.removesuffix("\n").split("\n"))}
    if "[UNK]" not in vocab:
        raise DataError(f"{path} has no token [UNK]; a vocab.txt lists one WordPiece token a line")
    return vocab


def _normalizer(config: TokenizerConfig) -> tokenizers.normalizers.Normalizer:
    lower = [tokenizers.normalizers.Lowercase()] if config.lowercase else []
    return tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), *lower])


def _wordpiece(vocab: dict[str, int], config: TokenizerConfig) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=UNKNOWN))
    model.normalizer = _normalizer(config)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    return model


def _train_wordpiece(texts: list[str], config: TokenizerConfig, special: list[str]) -> tokenizers.Tokenizer:
    """The library numbers the "##x" pieces in the order of a randomly seeded hash map, so two trainings on the
    same text differ. Naming them as special tokens pins their order; the second model forgets that they were.
    """

    def train(fixed: list[str]) -> dict[str, int]:
        model = _wordpiece({}, config)
        size = max(config.vocab_size, len(fixed))
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=fixed, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        return model.get_vocab()

    pieces = sorted(w for w in train(special) if w.startswith("##") and len(w) == 3)
    model = _wordpiece(train([*special, *pieces]), config)
    model.add_special_tokens(special)
    return model


def _role_id(model: tokenizers.Tokenizer, role: str, name: str | None) -> int:
    token_id = _find_role(model, role) if name is None else model.token_to_id(name)
    if token_id is None:
        looked_for = ", ".join(ROLES[role]) if name is None else name
        raise DataError(
            f"the tokenizer has no {role} token; looked for {looked_for} (data.tokenizer.{role} names it)"
        )
    return token_id


def _find_role(model: tokenizers.Tokenizer, role: str) -> int | None:
    return next((i for name in ROLES[role] if (i := model.token_to_id(name)) is not None), None)

"""Tokenizers of open_clip and transformers folders, read to give the same ids; and bvl's, written for both.

A foreign tokenizer is what its tokenizer.json says, with the tokens around a text as its post-processor puts them.
What open_clip does to a text before that (its `clean`) becomes part of the normalizer, so that the tokenizer.json of a
run says everything. One departure: special tokens that are spelled out in a text are read as text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from bvl.convert.clip_text import (
    BPE_FILE,
    BPE_TOKENS,
    Clean,
    canonical,
    cleaning,
    decode_word_ends,
    find_bpe_file,
    read_bpe,
    split_as_clip,
)
from bvl.convert.families import TextFacts
from bvl.convert.sentencepiece import read_sentencepiece
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import ConfigError, ConversionError, DataError

# Decoders go on from a start token, whether or not their tokenizer puts one in front.
_DECODERS = ("gpt2", "llama", "qwen2")
# (before, after) a text by kind of tokenizer, where no file of it says so.
_USUAL = {
    "clip": ("<|startoftext|>", "<|endoftext|>"),
    "siglip": ("", "</s>"),
    "bert": ("[CLS]", "[SEP]"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
    "llama": ("<s>", "</s>"),
    "qwen2": ("", "<|endoftext|>"),
}
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_FILES = ("tokenizer.json", "vocab.txt", "vocab.json with merges.txt")
_QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMES = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token", "unk_token", "mask_token")


def read_tokenizer(
    folder: Path,
    facts: TextFacts,
    *,
    context_length: int,
    text_cfg: Mapping[str, Any] | None = None,
) -> tuple[Tokenizer, TokenizerConfig]:
    """(tokenizer, options that load it again) of a foreign folder: the ids of `AutoTokenizer` or of open_clip.

    text_cfg: the entry of open_clip_config.json, for a folder that is read as open_clip reads it.
    Raises ConversionError for missing files, missing special tokens, an option that is not reproduced, and more tokens
    than the model's embedding has rows.
    """
    if text_cfg is None:
        model, roles, where = _read_hf(folder, facts)
    else:
        model, roles, where = _read_open_clip(folder, facts, text_cfg)
    try:
        options = TokenizerConfig(context_length=context_length, **roles)
        tokenizer = Tokenizer(model, context_length, **roles)
    except (ConfigError, DataError) as error:
        raise ConversionError(f"{where}: {error}") from error
    try:
        tokenizer.ids("a text")
    except (
        Exception
    ) as error:  # the library raises plain Exception for a vocabulary without its unknown token
        raise ConversionError(f"{where}: no text can be read with it: {error}") from error
    if tokenizer.vocab_size > facts.embedding_rows:
        raise ConversionError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {facts.embedding_rows} "
            f"rows; they do not belong together"
        )
    if facts.end_id not in (None, tokenizer.end_id) and facts.kind not in _DECODERS:
        raise ConversionError(
            f"{where}: texts end with the token {tokenizer.end_id} ({tokenizer.token(tokenizer.end_id)!r}), and the "
            f"model looks for {facts.end_id} as their end"
        )
    if text_cfg is not None and facts.pad_id not in (None, tokenizer.pad_id):
        # open_clip makes its masks of the ids alone.
        raise ConversionError(
            f"{where}: texts are padded with the token {tokenizer.pad_id} ({tokenizer.token(tokenizer.pad_id)!r}), and "
            f"the model hides {facts.pad_id} (pad_token_id of the BERT, pad_id of a CoCa's text_cfg) as padding"
        )
    if facts.embedding_rows > tokenizer.vocab_size:
        options = dataclasses.replace(options, embedding_rows=facts.embedding_rows)
    return tokenizer, options


def write_hf_tokenizer(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; returns the paths.

    `AutoTokenizer.from_pretrained(folder)` then gives bvl's ids when it is called with `padding="max_length",
    truncation=True`, also for texts that spell out a special token. A special token may have only one role there, so
    a vocabulary without a start token writes none.
    """
    model = tokenizer.model()
    names = {
        role: None if i is None else tokenizer.token(i)
        for role, i in {
            "start": tokenizer.start_id,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
            "unk": tokenizer.unknown_id,
            "mask": tokenizer.mask_id,
        }.items()
    }
    start, end = names["start"], names["end"]
    pieces = [f"{start}:0", "$A:0", f"{end}:0"] if start is not None else ["$A:0", f"{end}:0"]
    around = {end: tokenizer.end_id} | ({} if start is None else {start: tokenizer.start_id})
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=pieces,
        pair=[*pieces, "$B:1", f"{end}:1"],
        special_tokens=sorted(around.items()),
    )
    # bos and cls mean the start to one class or another, eos and sep the end.
    special = {
        "bos_token": start,
        "cls_token": start,
        "eos_token": end,
        "sep_token": end,
        "pad_token": names["pad"],
        "unk_token": names["unk"],
        "mask_token": names["mask"],
    }
    special = {key: value for key, value in special.items() if value is not None}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "padding_side": "right",
        "truncation_side": "right",
        # Special tokens that a text spells out are text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / n for n in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")]
    model.save(str(paths[0]))
    for path, content in zip(paths[1:], (config, special), strict=True):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def open_clip_entries(tokenizer: Tokenizer, *, name: str = "local") -> dict[str, Any]:
    """Entries for text_cfg, so that `open_clip.get_tokenizer("local-dir:FOLDER")` reads what `write_hf_tokenizer` writes.

    name: what `hf_tokenizer_name` says. open_clip does not look it up for a local folder, but a copy on the Hugging
    Face hub is found by it. open_clip always repairs a text and joins its white space first: a tokenizer to which
    white space matters gives other ids there for texts with line breaks or double spaces.
    """
    return {
        "hf_tokenizer_name": name,
        "tokenizer_kwargs": {"clean": "whitespace"},
        "context_length": tokenizer.context_length,
    }


def _read_hf(folder: Path, facts: TextFacts) -> tuple[tokenizers.Tokenizer, dict[str, str | None], str]:
    """(model, special tokens by role, file) of a transformers folder."""
    config = _read_config(folder)
    model, where = _read_model(folder, facts.kind, config)
    if config.get("tokenizer_class") == "SiglipTokenizer":
        # This class cleans a text by itself, whatever its files say.
        model.normalizer = _sequence([*canonical(config.get("do_lower_case", True)), model.normalizer])
    model.no_padding()
    model.no_truncation()
    decode_word_ends(model)
    names = [config[key] for key in _NAMES if isinstance(config.get(key), str)]
    # Where the vocabulary lacks them transformers adds them at its end.
    model.add_special_tokens([name for name in dict.fromkeys(names) if model.token_to_id(name) is None])
    return model, _roles(model, facts, config), where


def _read_open_clip(
    folder: Path, facts: TextFacts, text_cfg: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str | None], str]:
    """(model, special tokens by role, file) of a folder as `open_clip.get_tokenizer("local-dir:FOLDER")` reads it."""
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    named = bool(text_cfg.get("hf_tokenizer_name"))
    clean = options.pop("clean", None) or ("whitespace" if named else "lower")
    if clean not in get_args(Clean):
        raise ConversionError(
            f"{folder}: tokenizer_kwargs.clean={clean!r} of text_cfg: known are {', '.join(get_args(Clean))}"
        )
    strip_end = options.pop("strip_sep_token", False) if named else False
    additional = () if named else options.pop("additional_special_tokens", None) or ()
    for key, value in (*options.items(), ("tokenizer_mode", text_cfg.get("tokenizer_mode"))):
        if value:
            raise ConversionError(
                f"{folder}: {key}={value!r} of text_cfg's tokenizer is not reproduced by bvl"
            )
    path = None if named else find_bpe_file(folder)
    if path is not None and facts.embedding_rows < BPE_TOKENS and (folder / "tokenizer.json").is_file():
        # open_clip itself could read no text with such a model.
        path = None
    if path is not None:
        model, roles = read_bpe(path, additional)
        model.normalizer = _sequence(cleaning(clean))
        return model, roles, str(path)
    if not named and (additional or not (folder / "tokenizer.json").is_file()):
        raise ConversionError(
            f"{folder}: open_clip's vocabulary is not there; put {BPE_FILE} of the open_clip package, or a "
            f"tokenizer.json of CLIP, into this folder, or pip install open_clip_torch"
        )
    model, roles, where = _read_hf(folder, facts)
    model.normalizer = _sequence([*cleaning(clean), model.normalizer])
    if strip_end:
        # open_clip writes zeros over the last token.
        roles["end"] = model.id_to_token(0)
    if not named:
        # open_clip pads with zeros where it reads its own vocabulary.
        roles["pad"] = model.id_to_token(0)
    return model, roles, where


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and special_tokens_map.json where that says nothing; tokens by their names alone."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConversionError(f"{path} is no JSON: {error}") from error
            if not isinstance(content, dict):
                raise ConversionError(f"{path} holds no JSON object")
            config |= {key: value for key, value in content.items() if value is not None}
    if config.get("tokenizer_class") == "SiglipTokenizer":
        config = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"} | config
    for key in _NAMES:
        if isinstance(config.get(key), Mapping):
            config[key] = config[key].get("content")
    return config


def _read_model(folder: Path, kind: str, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, str]:
    """(the tokenizers model, the file it is from)"""
    json_path, vocab_txt = folder / "tokenizer.json", folder / "vocab.txt"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if json_path.is_file():
        try:
            model = tokenizers.Tokenizer.from_file(str(json_path))
        except Exception as error:  # the library raises plain Exception for a bad file
            raise ConversionError(
                f"{json_path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}"
            ) from error
        if isinstance(model.normalizer, normalizers.BertNormalizer):
            # transformers lets the config decide.
            model.normalizer = _bert_normalizer(config, model.normalizer)
        return model, str(json_path)
    if vocab_txt.is_file():
        try:
            model = Tokenizer.load(vocab_txt, 3).model()
        except DataError as error:
            raise ConversionError(str(error)) from error
        model.normalizer = _bert_normalizer(config)
        return model, str(vocab_txt)
    if vocab.is_file() and merges.is_file():
        return _bpe_from_files(vocab, merges, kind, config), str(vocab)
    sentencepiece = next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
    if sentencepiece is not None:
        model = read_sentencepiece(folder / sentencepiece)
        if model is not None:
            return model, str(folder / sentencepiece)
        raise ConversionError(
            f"{folder} holds its tokenizer as {sentencepiece}, which is not read here; write a tokenizer.json beside "
            f"it: python -c \"from transformers import AutoTokenizer as T; d = '{folder}'; "
            f'T.from_pretrained(d).save_pretrained(d)"'
        )
    raise ConversionError(f"{folder} has no tokenizer; looked for {', '.join((*_FILES, *_SENTENCEPIECE))}")


def _bert_normalizer(
    config: Mapping[str, Any], given: normalizers.BertNormalizer | None = None
) -> normalizers.BertNormalizer:
    default = given or normalizers.BertNormalizer()
    return normalizers.BertNormalizer(
        clean_text=default.clean_text,
        handle_chinese_chars=config.get("tokenize_chinese_chars", default.handle_chinese_chars),
        strip_accents=config.get("strip_accents", default.strip_accents),
        lowercase=config.get("do_lower_case", default.lowercase),
    )


def _bpe_from_files(vocab: Path, merges: Path, kind: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """CLIP's and GPT-2's byte-level BPE, which its two files do not describe in full."""
    options = {"end_of_word_suffix": "</w>"} if kind == "clip" else {}
    try:
        bpe = tokenizers.models.BPE.from_file(str(vocab), str(merges), **options)
    except Exception as error:  # the library raises plain Exception for a bad file
        raise ConversionError(f"{vocab} and {merges.name} are no byte-level BPE: {error}") from error
    model = tokenizers.Tokenizer(bpe)
    model.decoder = decoders.ByteLevel()
    if kind == "clip":
        split_as_clip(model)
        model.normalizer = _sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
    elif kind == "qwen2":
        model.normalizer = normalizers.NFC()
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        prefix = bool(config.get("add_prefix_space", False))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return model


def _sequence(parts: Sequence[normalizers.Normalizer | None]) -> normalizers.Normalizer:
    return normalizers.Sequence([part for part in parts if part is not None])


def _roles(model: tokenizers.Tokenizer, facts: TextFacts, config: Mapping[str, Any]) -> dict[str, str | None]:
    """The names of the tokens before, after and behind a text.

    As the post-processor puts them, or the tokenizer's config names them, or the model's numbers them, or as is usual;
    None leaves it to the names that every tokenizer is searched for.
    """

    def named(key: str, number: int | None, usual: str) -> str | None:
        by_number = None if number is None or number < 0 else model.id_to_token(number)
        usual_name = usual if model.token_to_id(usual) is not None else None
        return config.get(key) or by_number or usual_name

    usual_start, usual_end = _USUAL.get(facts.kind, ("", ""))
    around = None if facts.kind in _DECODERS else _around(model)
    if around is not None:
        start, end = around
    else:
        first = ("cls_token", "sep_token") if facts.kind in ("bert", "any") else ("bos_token", "eos_token")
        keys = first if first[0] in config else ("bos_token", "eos_token")
        end = named(keys[1], facts.end_id, usual_end)
        start = named(keys[0], facts.start_id, usual_start)
        if start is None and facts.kind == "siglip":
            start = ""
        if facts.kind in _DECODERS:
            # A decoder goes on from something, as in open-ended generation from the end of what was before.
            start = start or end
    if facts.start_id == -1:
        start = ""
    pad = named("pad_token", facts.pad_id, "[PAD]")
    if pad is None:
        pad = "<pad>" if model.token_to_id("<pad>") is not None else end
    return {"start": start, "end": end, "pad": pad}


def _around(model: tokenizers.Tokenizer) -> tuple[str, str] | None:
    """(start, end) that the post-processor puts around a text, start "" for none; None where it puts no end."""
    tokens = model.encode("", add_special_tokens=True).tokens
    if len(tokens) == 1:
        # One token is a start or an end: with a text it shows on which side.
        tokens_of_text = model.encode("a", add_special_tokens=True).tokens
        return ("", tokens[0]) if tokens_of_text[-1] == tokens[0] else None
    return (tokens[0], tokens[1]) if len(tokens) == 2 else None

"""Words of captions and what needs no reference: tokens, n-grams, length, diversity."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bvl.errors import DataError

# Apostrophes of other alphabets and keyboards, and the slash of fractions.
_PLAIN = str.maketrans("‘’ʼ´`⁄", "'''''/")
# The kinds of word, first match first, then a symbol by itself.
_TOKEN = re.compile(
    r"[^\W\d_](?:\.[^\W\d_])+(?!\w)"  # e.g. u.s.
    r"|(?<!\w)\.\d+"  # .5
    r"|[^\W_]+(?:(?:[-_/'&]|(?<=\d)[.,:](?=\d))[^\W_]+)*"  # right-sided l4/l5 h&e o'clock 1,200.5
    r"|[^\w\s]"
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))")
_DROPPED = frozenset(".,;:?!'\"“”„«»()[]{}-‐‑‒–—−/\\|^•·")


def tokenize(text: str) -> list[str]:
    """The lower-case words of a text without punctuation: the tokens on which caption metrics are compared.

    The rules follow the Penn Treebank tokens that COCO caption scores are computed on (Chen et al. 2015),
    without Java. Hyphens, slashes, apostrophes and & inside a word stay ("right-sided", "ap/pa"), as do
    separators inside a number ("3.5", "1,200", "10:30"); "patient's" is `patient 's`, "isn't" is `is n't`,
    "cannot" is `can not`. Symbols are tokens ("<", "%", "°"). Stops, commas, quotes, brackets and dashes go.

    Known differences from the Java tokenizer: a stop between two words without a space separates them, no
    abbreviation keeps its last stop, brackets leave nothing (there: `-lrb-`), compatibility characters become
    their plain forms ("ﬁ" is "fi", "µ" is "μ"). Scores of different tokenizers are not comparable.
    """
    words = []
    for word in _TOKEN.findall(unicodedata.normalize("NFKC", text).translate(_PLAIN).lower()):
        if word in _DROPPED:
            continue
        if word == "cannot":
            words += ["can", "not"]
        elif clitic := _CLITIC.fullmatch(word):
            words += clitic.groups()
        else:
            words.append(word)
    return words


def num_words(text: str) -> int:
    """Number of words by white space, the count that length control asks for and is judged by."""
    return len(text.split())


def length_error(asked: Float[np.ndarray, " n"], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Words written minus words asked for, per caption; NaN where no length was asked (NaN in `asked`).

    Raises DataError when the numbers of rows disagree.
    """
    asked = np.asarray(asked, np.float64)
    if asked.shape != (len(texts),):
        raise DataError(f"lengths asked {asked.shape} but {len(texts)} captions; give one length a caption")
    return np.array([num_words(text) for text in texts], np.float64) - asked


def length_obeyed(
    asked: Float[np.ndarray, " n"], texts: Sequence[str], *, tolerance: int = 1
) -> Float[np.ndarray, " n"]:
    """1 where |written - asked| <= tolerance words, else 0; NaN where no length was asked.

    The mean over the known rows is the share of captions that obey, and `bootstrap_mean` takes the array as
    it is.
    """
    error = length_error(asked, texts)
    return np.where(np.isnan(error), np.nan, np.abs(error) <= tolerance)


def distinct_n(captions: Sequence[Sequence[str]], n: int) -> float:
    """Number of different n-grams over the number of n-grams of all captions (Li et al. 2016).

    Li et al. divide by the number of words; here every n reaches 1. The value falls as captions are added, so
    only sets of the same size compare; resampling with replacement repeats captions and would bias it, so it
    has no bootstrap interval. NaN when no caption has n words. Raises DataError for n below 1 or strings as
    captions.
    """
    if n < 1:
        raise DataError(f"n={n}: n-grams have at least 1 word")
    check_tokens(captions)
    grams = [tuple(words[i : i + n]) for words in captions for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def unique_share(captions: Sequence[Sequence[str]]) -> float:
    """Number of different captions over the number of captions; NaN for none. Like `distinct_n`, no mean."""
    check_tokens(captions)
    return len({tuple(words) for words in captions}) / len(captions) if captions else float("nan")


def ngram_counts(words: Sequence[str], max_n: int) -> collections.Counter[tuple[str, ...]]:
    """How often each n-gram of 1 to `max_n` words occurs."""
    return collections.Counter(
        tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1)
    )


def check_tokens(captions: Sequence[Sequence[str]]) -> None:
    """Raises DataError where a caption is one string: its letters would be scored as words."""
    for i, words in enumerate(captions):
        if isinstance(words, str):
            raise DataError(f"caption {i} is the string {words[:40]!r}; give its tokens, tokenize(text)")


def check_pairs(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
    """Raises DataError unless every hypothesis and one or more references of each are given as tokens."""
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} hypotheses but references for {len(references)}")
    check_tokens(hypotheses)
    for i, several in enumerate(references):
        if isinstance(several, str) or not len(several):
            raise DataError(f"hypothesis {i} needs a list of one or more references, each a list of tokens")
        check_tokens(several)

"""Options that no search can use are refused with what to do."""

import pytest

from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"beams": 0}, "beams=0: must be at least 1"),
        ({"max_length": 0}, "max_length=0"),
        ({"groups": 0, "beams": 4}, "groups=0"),
        ({"groups": 3, "beams": 4}, "groups=3 does not divide beams=4"),
        ({"num_return": 2}, "num_return=2 is more than beams=1"),
        ({"num_return": 0}, "num_return=0"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0: must lie in \(0, 1\]"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p=1.5"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p=nan"),
        ({"top_k": -1, "temperature": 1.0}, "top_k=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "beams": 4}, "sampling has no beams"),
        ({"top_p": 0.9}, "set temperature"),
        ({"top_k": 5, "beams": 2}, "set temperature"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
        ({"min_length": 8}, "min_length=8: must be below max_length=8"),
        ({"diversity": -1.0, "beams": 2, "groups": 2}, "diversity=-1.0"),
    ],
)
def test_wrong_options_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        DecodeOptions(**{"max_length": 8} | wrong)


def test_options_are_hashable_and_samples_need_no_beams():
    assert hash(DecodeOptions(max_length=8, beams=4, groups=2)) is not None
    assert DecodeOptions(max_length=8, temperature=1.0, num_return=5).sampling

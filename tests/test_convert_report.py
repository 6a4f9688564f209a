"""What the report of a conversion says of differences that are none of its numbers, or of none at all."""

import json
import math

import pytest

from bvl.convert.inputs_parity import InputsParity
from bvl.convert.parity import Difference, Tolerance
from bvl.convert.report import Report


def report(*absolute: float, within: bool = True, inputs: InputsParity | None = None) -> Report:
    differences = [Difference("image", "probe", "embed", "", x, x, within) for x in absolute]
    return Report("hf:a", "b", "CLIPModel", (), {}, differences, inputs, Tolerance())


def test_the_largest_difference_is_named():
    found = report(1e-7, 3e-7, 2e-7)
    assert found.passed and found.largest() == {"image/embed": 3e-7}
    assert found.lines()[-1] == "passed: image/embed 3.0e-07"


@pytest.mark.parametrize("values", [(math.nan, 1e-7), (1e-7, math.nan)])
def test_what_is_no_number_does_not_vanish(values):
    found = report(*values, within=False)
    assert not found.passed and math.isnan(found.largest()["image/embed"])
    written = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(written)["largest"] == {"image/embed": "nan"}


def test_nothing_compared_is_not_passed():
    assert not report().passed

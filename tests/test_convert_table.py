"""Conversion tables: both directions, completeness, and errors that name tensors."""

import numpy as np
import pytest

from bvl.convert.table import (
    Alias,
    Constant,
    Row,
    Unread,
    flat_params,
    join_layers,
    linear,
    nested_params,
    norm,
    packed,
    split_layers,
    table,
    to_ours,
    to_theirs,
)
from bvl.convert.tensors import Tensors
from bvl.errors import ConversionError

BLOCK = table(
    packed("block_{i}/attention", ("query", "key", "value"), "layers.{i}.in_proj", "layers.{i}.in_bias"),
    norm("block_{i}/norm", "layers.{i}.ln"),
)
TABLE = table(
    Row("patch/kernel", "conv.weight", "patches"),
    Row("cls", "class_token", leading=2),
    linear("head", "head"),
    Row("stem/kernel", "stem.weight", "convolution"),
    packed("wide", ("a", "b"), "wide.weight", None, how="same", axis=1),
    Alias("tied.weight", of="head.weight"),
    Unread(r"rotary\..*", "is computed"),
    Constant("steps", 0),
    BLOCK.repeat(2).under("stack/", "body."),
)


def ours() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "patch/kernel": (12, 4), "cls": (4,), "head/kernel": (4, 3), "head/bias": (3,), "stem/kernel": (3, 3, 2, 5),
        "wide/a/kernel": (4, 2), "wide/b/kernel": (4, 2),
    }  # fmt: skip
    for i in range(2):
        shapes |= {f"stack/block_{i}/norm/{name}": (4,) for name in ("scale", "bias")}
        for name in ("query", "key", "value"):
            shapes |= {f"stack/block_{i}/attention/{name}/kernel": (4, 4)}
            shapes |= {f"stack/block_{i}/attention/{name}/bias": (4,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def opened(arrays: dict[str, np.ndarray]) -> Tensors:
    return Tensors({name: x.shape for name, x in arrays.items()}, arrays.__getitem__)


def shapes_of(arrays):
    return {name: x.shape for name, x in arrays.items()}


def test_there_and_back_is_bit_equal():
    params = ours()
    theirs, report = to_theirs(TABLE, params, where="there")
    assert theirs["conv.weight"].shape == (4, 3, 2, 2) and theirs["class_token"].shape == (1, 1, 4)
    assert theirs["body.layers.1.in_proj"].shape == (12, 4) and theirs["wide.weight"].shape == (4, 4)
    assert theirs["steps"] == 0 and "tied.weight" not in theirs
    back, again = to_ours(TABLE, opened(theirs), shapes_of(params), where="here")
    assert back.keys() == params.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(back[name], x)
    assert {(c.ours, c.theirs) for c in report} == {(c.ours, c.theirs) for c in again}


def test_what_each_way_of_conversion_means():
    params = ours()
    theirs, _ = to_theirs(TABLE, params, where="there")
    np.testing.assert_array_equal(theirs["head.weight"], params["head/kernel"].T)
    # Pixel (row 1, column 0), colour 2 of a patch of 2 x 2.
    np.testing.assert_array_equal(
        theirs["conv.weight"][:, 2, 1, 0], params["patch/kernel"][(1 * 2 + 0) * 3 + 2]
    )
    np.testing.assert_array_equal(
        theirs["body.layers.0.in_proj"][4:8], params["stack/block_0/attention/key/kernel"].T
    )
    np.testing.assert_array_equal(theirs["wide.weight"][:, 2:], params["wide/b/kernel"])
    np.testing.assert_array_equal(theirs["stem.weight"][4, 1], params["stem/kernel"][:, :, 1, 4])


def broken(change):
    params = ours()
    theirs, _ = to_theirs(TABLE, params, where="there")
    change(theirs)
    to_ours(TABLE, opened(theirs), shapes_of(params), where="file x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("head.bias"), r"file x:\n.*head\.bias \(3,\) is missing"),
        (lambda t: t.update(odd=np.zeros((2, 3))), r"odd \(2, 3\) has no place"),
        (lambda t: t.update({"head.bias": np.zeros(4)}), r"head\.bias is \(4,\), the config asks for \(3,\)"),
        (
            lambda t: t.update({"body.layers.0.in_proj": np.zeros((8, 4))}),
            r"in_proj is \(8, 4\), the config asks for \(12, 4\)",
        ),
        (
            lambda t: t.update({"tied.weight": np.zeros((3, 4))}),
            r"tied\.weight differs from head\.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, named):
    with pytest.raises(ConversionError, match=named):
        broken(change)


def test_what_need_not_be_read_may_be_there():
    broken(lambda t: t.update({"rotary.inv_freq": np.zeros(2), "tied.weight": t["head.weight"]}))


def test_parameters_without_a_row_are_an_error_in_both_directions():
    params = ours()
    theirs, _ = to_theirs(TABLE, params, where="there")
    more = {**params, "gate": np.zeros(2, np.float32)}
    with pytest.raises(ConversionError, match=r"nothing in the table for bvl's gate \(2,\)"):
        to_ours(TABLE, opened(theirs), shapes_of(more), where="here")
    with pytest.raises(ConversionError, match="no tensor there for gate"):
        to_theirs(TABLE, more, where="there")
    del params["cls"]
    with pytest.raises(ConversionError, match="no parameter cls for the tensor class_token"):
        to_theirs(TABLE, params, where="there")


def test_scanned_stacks_come_apart_and_together():
    stacked = {
        "image/stack/blocks/mlp/bias": np.arange(6.0).reshape(3, 2),
        "image/cls": np.ones(2),
    }
    apart = split_layers(stacked)
    assert sorted(apart) == ["image/cls", *(f"image/stack/block_{i}/mlp/bias" for i in range(3))]
    np.testing.assert_array_equal(apart["image/stack/block_2/mlp/bias"], [4.0, 5.0])
    together = join_layers(apart, stacked)
    assert together.keys() == stacked.keys()
    np.testing.assert_array_equal(
        together["image/stack/blocks/mlp/bias"], stacked["image/stack/blocks/mlp/bias"]
    )
    shapes = split_layers({"stack/blocks/x": (3, 2)}, lambda shape, _: shape[1:])
    assert shapes == {f"stack/block_{i}/x": (2,) for i in range(3)}


def test_names_of_parameters_and_heads():
    tree = {"model": {"image": {"cls": 1}}, "heads": {"mlm": {"bias": {"bias": 2}}}}
    flat = flat_params(tree)
    assert flat == {"image/cls": 1, "heads/mlm/bias/bias": 2}
    assert nested_params(flat) == tree

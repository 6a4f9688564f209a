"""Values of another kind in foreign configs are named; those that the libraries themselves write are taken."""

import pytest

from bvl.convert.kinds import check_kinds
from bvl.errors import ConversionError


def test_every_config_that_open_clip_ships_is_taken():
    pytest.importorskip("torch")
    from bvl.convert.peers import import_peer

    open_clip = import_peer("open_clip", what="the test")
    names = open_clip.list_models()
    assert "RN50" in names and len(names) > 100
    for name in names:
        check_kinds({"model_cfg": open_clip.get_model_config(name)}, where=name)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"embed_dim": "512"}, "embed_dim='512' is no whole number"),
        (
            {"model_cfg": {"vision_cfg": {"patch_size": [16]}}},
            "model_cfg: vision_cfg: patch_size=.16. is no number",
        ),
        ({"text_config": 3}, "text_config=3 is no JSON object"),
        ({"layers": [1, 0]}, "layers=.1, 0. is no whole number"),
    ],
)
def test_another_kind_is_named(config, words):
    with pytest.raises(ConversionError, match=f"a folder: {words}"):
        check_kinds(config, where="a folder")

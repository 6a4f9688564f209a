"""Dual encoders of transformers become ours: every layer and output equal, and what is not reproduced is named."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_hf_peers import clip  # noqa: E402
from random_peers import worst  # noqa: E402

from bvl.convert.importing import import_model  # noqa: E402
from bvl.convert.parity import prove  # noqa: E402
from bvl.convert.peers import import_peer  # noqa: E402

torch.set_num_threads(1)
transformers = import_peer("transformers", what="the test")


def proven(folder):
    """The import of a folder after its proof."""
    imported = import_model(f"hf:{folder}")
    found = prove(
        imported.config, imported.params, imported.tokenizer, imported.family, imported.source.config, folder
    )
    assert found and not worst(found), worst(found)
    return imported, found


def test_clip(tmp_path):
    imported, found = proven(clip(transformers, tmp_path))
    assert {d.tower for d in found} == {"image", "text", "both"}

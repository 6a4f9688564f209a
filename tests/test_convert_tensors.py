"""Files of tensors: what is read, and what is refused with a reason."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bvl.convert.tensors import open_weights, save_safetensors
from bvl.errors import ConversionError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asarray(3.5, np.float32),
    "half": np.asarray([1.5, -2.0], np.float16),
    "count": np.asarray(7, np.int64),
}


def test_safetensors_there_and_back(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", ARRAYS, metadata={"format": "pt"})
    found = open_weights(tmp_path)
    assert dict(found.shapes) == {"a": (2, 3), "b": (), "half": (2,), "count": ()}
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found.load(name), x)
        assert found.load(name).dtype == x.dtype


def test_bfloat16_is_exact(tmp_path):
    values = np.asarray([1.0, 0.1, -3.0], ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + values.tobytes()
    )
    found = open_weights(tmp_path).load("x")
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


def test_shards(tmp_path):
    safetensors.numpy.save_file({"a": ARRAYS["a"]}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": ARRAYS["b"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_weights(tmp_path)
    assert set(found.shapes) == {"a", "b"}
    np.testing.assert_array_equal(found.load("a"), ARRAYS["a"])
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"names the shard two\.safetensors, which is missing"):
        open_weights(tmp_path)


def test_weights_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"module.a": torch.arange(6.0).reshape(2, 3), "module.b": torch.tensor(0.5, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "epoch_3.pt")
    with pytest.raises(ConversionError, match="has no weights"):
        open_weights(tmp_path)
    (tmp_path / "epoch_3.pt").rename(tmp_path / "pytorch_model.bin")
    found = open_weights(tmp_path)
    assert dict(found.shapes) == {"a": (2, 3), "b": ()}
    np.testing.assert_array_equal(found.load("a"), ARRAYS["a"])
    assert found.load("b") == 0.5


def test_what_training_puts_in_front_of_all_names(tmp_path):
    state = {f"module._orig_mod.{name}": x for name, x in ARRAYS.items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    assert set(open_weights(tmp_path).shapes) == set(ARRAYS)
    safetensors.numpy.save_file({**state, "c": ARRAYS["a"]}, tmp_path / "model.safetensors")
    assert "module._orig_mod.a" in open_weights(tmp_path).shapes


def test_one_model_for_both_libraries(tmp_path):
    """Each library finds its own file, and open_clip one of any name."""
    safetensors.numpy.save_file({"hf": ARRAYS["a"]}, tmp_path / "model.safetensors")
    safetensors.numpy.save_file({"open_clip": ARRAYS["a"]}, tmp_path / "open_clip_model.safetensors")
    assert set(open_weights(tmp_path).shapes) == {"hf"}
    assert set(open_weights(tmp_path, "open_clip").shapes) == {"open_clip"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"has no weights.*open_clip_model\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "mine.safetensors")
    assert set(open_weights(tmp_path, "open_clip").shapes) == {"open_clip"}
    (tmp_path / "other.bin").touch()
    with pytest.raises(ConversionError, match=r"several files of weights \(mine\.safetensors, other\.bin\)"):
        open_weights(tmp_path, "open_clip")


@pytest.mark.parametrize("places", [["a"], {"a": 3}, {"a": ["one"]}, "ab", None])
def test_damaged_indices_are_errors(tmp_path, places):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConversionError, match="is no index of shards"):
        open_weights(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_pickles_are_refused_and_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged, or not weights alone"):
        open_weights(tmp_path)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ConversionError, match="bvl reads none"):
        open_weights(tmp_path)
    assert "must not be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, (10**6).to_bytes(8, "little") + b"{}"])
def test_damaged_headers_are_errors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged"):
        open_weights(tmp_path)


def test_a_file_cut_short_is_an_error(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", ARRAYS, metadata={})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ConversionError, match="is damaged"):
        open_weights(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConversionError, match=r"has no weights: looked for model\.safetensors.*there are: config\.json"
    ):
        open_weights(tmp_path)
    with pytest.raises(ConversionError, match="no folder"):
        open_weights(tmp_path / "absent")

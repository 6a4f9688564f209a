"""bvl convert and its proof, on a tiny GPT-2: what passes, what is caught, what is said."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bvl  # noqa: E402
from bvl.cli import main  # noqa: E402
from bvl.conversion import import_run  # noqa: E402
from bvl.convert.hf_decoders import FAMILIES  # noqa: E402
from bvl.convert.importing import import_model  # noqa: E402
from bvl.convert.parity import Tolerance  # noqa: E402
from bvl.convert.peers import import_peer  # noqa: E402
from bvl.convert.registry import open_source  # noqa: E402
from bvl.errors import ConversionError, RunFolderError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from parity_all import randomise, write_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    transformers = import_peer("transformers", what="the test")
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=12, bos_token_id=59, eos_token_id=59
    )
    model = transformers.GPT2LMHeadModel(config)
    randomise(model)
    model.save_pretrained(folder)
    write_tokenizer(folder, 60, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
    return folder


def swap(monkeypatch, a: str, b: str) -> None:
    """Let the table take one matrix for another of the same shape."""
    family = next(f for f in FAMILIES if f.name == "GPT2LMHeadModel")
    right = type(family).table

    def wrong(self, model, foreign):
        table = right(self, model, foreign)
        other = {a: b, b: a}

        def swapped(name: str) -> str:
            return next((name.replace(x, y) for x, y in other.items() if x in name), name)

        rows = tuple(dataclasses.replace(row, ours=swapped(row.ours)) for row in table.rows)
        return dataclasses.replace(table, rows=rows)

    monkeypatch.setattr(type(family), "table", wrong)


def test_an_import_is_a_run_folder_with_its_proof(gpt2, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["convert", f"hf:{gpt2}", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "transformer.h.*.attn.c_attn.weight" in shown and "passed: decoder/layers" in shown
    report = json.loads((out / "parity.json").read_text())
    assert report["passed"] and report["checked"] and report["first_departure"] is None
    named = {tensor["ours"] for tensor in report["tensors"]}
    assert {"decoder/token_embed", "decoder/block_1/attention/key/kernel"} <= named
    assert {d["ours"] for d in report["differences"]} >= {"decoder/block_0", "decoder/block_1", "logits"}
    assert all(d["relative"] < 1e-5 for d in report["differences"])
    assert report["inputs"]["texts"] == []
    loaded, given = bvl.load(out), import_model(f"hf:{gpt2}")
    np.testing.assert_array_equal(
        loaded.params["model"]["decoder"]["token_embed"], given.params["model"]["decoder"]["token_embed"]
    )


@pytest.mark.parametrize(
    ("a", "b", "layer"),
    [
        ("block_1/attention/query/", "block_1/attention/key/", "decoder/block_1"),
        ("block_0/attention/query/", "block_0/attention/value/", "decoder/block_0"),
    ],
)
def test_two_swapped_matrices_are_caught_and_the_layer_is_named(
    monkeypatch, gpt2, tmp_path, capsys, a, b, layer
):
    swap(monkeypatch, a, b)
    assert main(["convert", f"hf:{gpt2}", str(tmp_path / "run")]) == 1
    assert f"FAILED: the first that departs is decoder: {layer} (" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert not report["passed"] and report["first_departure"]["ours"] == layer


def test_without_the_proof_the_output_says_so(monkeypatch, gpt2, tmp_path, capsys):
    swap(monkeypatch, "block_0/attention/query/", "block_0/attention/key/")
    assert main(["convert", f"hf:{gpt2}", str(tmp_path / "run"), "--no-check"]) == 0
    assert "NOT CHECKED (--no-check)" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert not report["checked"] and not report["passed"]


def test_a_tolerance_of_nothing_is_not_met(gpt2, tmp_path):
    report = import_run(f"hf:{gpt2}", tmp_path / "run", tolerance=Tolerance(embed=0.0, relative=0.0))
    assert report.first_departure is not None and not report.passed


def test_other_pixels_or_ids_are_a_failure(gpt2, tmp_path, monkeypatch):
    def other(folder, foreign, tokenizer, words_alone, padding):
        return lambda text: [0] * tokenizer.context_length

    monkeypatch.setitem(bvl.convert.inputs_parity._tokens, "hf", other)
    report = import_run(f"hf:{gpt2}", tmp_path / "run")
    assert not report.passed and report.first_departure is None
    assert any("tokens: DIFFERENT" in line for line in report.lines())
    assert report.lines()[-1].startswith("FAILED: the models agree, but")


def test_a_proof_that_breaks_off_leaves_no_folder(gpt2, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ConversionError("the library cannot load it")

    monkeypatch.setattr(bvl.conversion, "prove", broken)
    with pytest.raises(ConversionError, match="cannot load it"):
        import_run(f"hf:{gpt2}", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_language_model_that_its_library_cannot_load(gpt2, tmp_path):
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"initializer_range": "x"}))
    with pytest.raises(ConversionError, match="transformers cannot load .* as GPT2LMHeadModel"):
        import_run(f"hf:{tmp_path}", tmp_path / "run")


def test_what_cannot_be_taken_over(gpt2, tmp_path):
    with pytest.raises(ConversionError, match="no folder absent"):
        import_model("hf:absent")
    (tmp_path / "config.json").write_text('{"architectures": ["MadeUpModel"], "model_type": "made_up"}')
    with pytest.raises(
        ConversionError, match=r"architecture \(MadeUpModel\) is not known.*CLIPModel.*GPT2LMHeadModel"
    ):
        import_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json is damaged"):
        import_model(f"hf:{tmp_path}")
    with pytest.raises(ConversionError, match=r"has no open_clip_config\.json"):
        import_model(f"open_clip:{gpt2}")
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((gpt2 / "tokenizer.json").read_text())
    with pytest.raises(ConversionError, match="has no weights"):
        import_model(f"hf:{tmp_path}")
    with pytest.raises((RunFolderError, ConversionError), match="is not empty"):
        import_run(f"hf:{gpt2}", tmp_path)
    with pytest.raises(ConversionError, match="context_length=12.*3 to 11"):
        import_model(f"hf:{gpt2}", context_length=12)
    with pytest.raises(ConversionError, match=r"context_length=5: .* position embedding for each of its 11"):
        import_model(f"hf:{gpt2}", context_length=5)


def test_a_folder_without_a_prefix_is_recognised(gpt2):
    assert open_source(gpt2).library == "hf"


def test_verbs_say_what_is_missing(gpt2, tmp_path, capsys):
    assert main(["convert", f"hf:{gpt2}", str(tmp_path / "a"), "--hub-id", "made-up/bert"]) == 1
    assert "--hub-id belongs to --to open_clip" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "a")]) == 1
    assert "--to open_clip" in capsys.readouterr().err

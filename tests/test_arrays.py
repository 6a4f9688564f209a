"""Images and texts in memory as a source: what it reads, its description in a run folder, and training on it."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_run import fast_compilation, tiny_config  # noqa: F401

import bvl.data
from bvl import config as config_lib
from bvl.config import EvalConfig
from bvl.data import from_arrays
from bvl.data.sources import RecordSet, Source
from bvl.errors import ConfigError, DataError, RunFolderError
from bvl.evals.base import overlaps_training
from bvl.evals.retrieval import Retrieval
from bvl.runs import RunFolder, load_components
from bvl.train.loop import train

COUNT = 24


def grey(count=COUNT, size=32):
    levels = np.arange(count, dtype=np.uint8)[:, None, None]
    return np.broadcast_to(levels, (count, size, size)).copy()


def texts(count=COUNT):
    return [f"finding {'abcdefgh'[i % 8]} of grade {i // 8}" for i in range(count)]


def test_records_of_arrays():
    source = from_arrays(
        grey(6),
        ["a", None, "c", "d", "e", "f"],
        labels=[["x", "y"], "x", [], None, ("y",), "x"],
        patient_ids=["p", "p", 1, 2, 3, np.int64(4)],
        splits=["train"] * 4 + ["val"] * 2,
        name="mine",
    )
    train = RecordSet(source)
    assert train.name == "mine" and len(train) == 4 and train.group_unit() == "patient"
    assert [train.describe(i).get("caption") for i in range(4)] == ["a", None, "c", "d"]
    assert [train.describe(i).get("labels") for i in range(4)] == [["x", "y"], ["x"], [], None]
    assert train.groups() == ["p", "p", "1", "2"]
    assert [int(np.asarray(train.load(i)["image"])[0, 0]) for i in range(4)] == [0, 1, 2, 3]
    held = RecordSet(dataclasses.replace(source, split="val"))
    assert [held.describe(i)["id"] for i in range(2)] == ["4", "5"]
    assert np.asarray(held.load(1)["image"]).flat[0] == 5


def test_equal_images_are_one_image():
    palette = [Image.new("P", (2, 2), 0) for _ in range(2)]
    palette[0].putpalette([9, 9, 9])
    palette[1].putpalette([7, 7, 7])
    images = [*grey(3, size=2), *grey(1, size=2), *palette]
    records = RecordSet(from_arrays(images, list("abcdef"), split=None))
    groups = records.groups()
    assert groups[0] == groups[3] and len(set(groups)) == 5 and records.group_unit() == "image"
    assert [records.describe(i)["id"] for i in range(6)] == list("012345")


def test_alternatives_sizes_and_kinds_of_images():
    images = [np.zeros((4, 6), np.uint8), np.full((5, 5, 3), 3, np.uint8), Image.new("L", (3, 2), 9)]
    records = RecordSet(from_arrays(images, [["a", "b"], "c", None], split=None))
    assert records.config.text == "captions" and records.describe(0)["captions"] == ["a", "b"]
    assert records.describe(1)["captions"] == ["c"] and "captions" not in records.describe(2)
    assert [records.load(i)["image"].size for i in range(3)] == [(6, 4), (5, 5), (3, 2)]
    assert len(RecordSet(from_arrays(np.zeros((4, 8, 8, 3), np.uint8), labels=list("abab"), split=None))) == 4


@pytest.mark.parametrize(
    "arguments, options, match",
    [
        ((grey(3), ["a", "b"]), {}, "3 images but 2 texts"),
        (
            (grey(3), list("abc")),
            {"labels": ["x"], "patient_ids": []},
            "3 images but 1 labels, 0 patient_ids",
        ),
        ((grey(3) / 255, list("abc")), {}, r"images has type float64.*\(x \* 255\)"),
        ((grey(3).astype(np.uint16), list("abc")), {}, "images has type uint16 and shape"),
        ((grey(3)[0], None), {}, r"images has type uint8 and shape \(32, 32\)"),
        (([grey(1)[0], grey(1)[0].astype(int)],), {}, r"images\[1\] has type int64"),
        (([grey(1)[0], "a.png"],), {}, r"images\[1\] is a str"),
        (([],), {}, "no images"),
        ((grey(2), ["a", 3]), {}, r"texts\[1\] is 3"),
        ((grey(2), ["a", ["b", 3]]), {}, r"texts\[1\] is \['b', 3\]"),
        ((grey(2),), {"labels": [0, 1]}, r"labels\[0\] is 0"),
        ((grey(2),), {"patient_ids": [0.5, 1]}, r"patient_ids\[0\] is 0.5"),
    ],
)
def test_bad_arrays(arguments, options, match):
    with pytest.raises(DataError, match=match):
        from_arrays(*arguments, **options)


def test_a_description_is_kept_and_not_the_arrays():
    source = from_arrays(grey(), texts())
    dumped = json.loads(json.dumps(config_lib.to_dict(source)))
    assert dumped["arrays"]["num_records"] == COUNT and len(json.dumps(dumped)) < 2000
    again = config_lib.from_dict(dumped)
    assert again == source
    with pytest.raises(DataError, match="24 records were arrays in memory.*from_arrays"):
        RecordSet(again)
    # Checking a config and taking another split keep the arrays.
    assert len(RecordSet(config_lib.check(dataclasses.replace(source, split="val")))) > 0
    changed = grey()
    changed[3, 0, 0] += 1
    others = [from_arrays(changed, texts()), from_arrays(grey(), texts()[::-1])]
    assert len({s.arrays for s in (source, from_arrays(grey(), texts()), *others)}) == 3
    with pytest.raises(ConfigError, match="root or arrays, not both"):
        Source(root="x", arrays=source.arrays)
    assert source.at_root("elsewhere") is source


def config_on(source, workdir, **changes):
    config = tiny_config(workdir, steps=3, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=(source,)))


def test_training_loading_and_resuming(tmp_path, fast_compilation):  # noqa: F811
    source = from_arrays(grey(), texts(), patient_ids=range(COUNT))
    held = dataclasses.replace(source, split="val")
    config = config_on(
        source, tmp_path / "run", eval=EvalConfig(suites={"retrieval": Retrieval(source=held)})
    )
    assert train(config) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["retrieval/num_images"] == len(
        RecordSet(held)
    )
    loaded = load_components(tmp_path / "run")
    assert loaded.step == 3 and loaded.config.data.train[0].arrays == source.arrays
    assert overlaps_training(loaded.config, source) and not overlaps_training(loaded.config, held)
    with pytest.raises(DataError, match="arrays in memory"):
        train(dataclasses.replace(loaded.config, workdir=str(tmp_path / "other")))
    # The same arrays go on; others are another run.
    run = RunFolder(tmp_path / "run")
    same = from_arrays(grey(), texts(), patient_ids=range(COUNT))
    run.claim(config_on(same, tmp_path / "run", eval=config.eval), force=False)
    other = from_arrays(grey() + 1, texts(), patient_ids=range(COUNT))
    with pytest.raises(RunFolderError, match="data.train.0.arrays.content_hash"):
        run.claim(config_on(other, tmp_path / "run", eval=config.eval), force=False)


def test_importing_the_package_costs_nothing():
    code = "import bvl.data, sys; assert not {'numpy', 'jax', 'PIL', 'grain'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'from_array'"):
        getattr(bvl.data, "from_array")  # noqa: B009

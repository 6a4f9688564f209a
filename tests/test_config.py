"""Overrides, checks, the round trip through JSON, and the configs that come with bvl."""

import ast
import dataclasses
import json
import shlex
import textwrap
from pathlib import Path

import pytest

from bvl import cli
from bvl.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    difference,
    dump,
    flatten,
    from_dict,
    load_config,
    load_dump,
    parse_arg,
    to_dict,
    with_value,
)
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

ROOT = Path(__file__).parent.parent
# One is made from the model that it starts from: tests/test_finetune.py.
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "finetune")
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A type that bvl does not know."""

    number: int = 1
    names: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def config():
    return Config(
        steps=10,
        batch_size=4,
        model=DualEncoderConfig(image=ViTConfig("XXS/8"), text=TextConfig(width=32, num_heads=2)),
        tasks={"contrastive": Contrastive(), "classify": Classify()},
        data=DataConfig(
            train=(Source(name="one", root="a"), Source(name="two", root="b")),
            preprocess=Preprocess(image_size=32),
        ),
        optim=OptimConfig(),
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        ("steps=20", 20),
        ("model.image.variant=B/16", "B/16"),
        ("model.image.remat=none", "none"),  # a string, although "none" also spells null
        ("model.init_bias=-10", -10.0),  # int -> float
        ("model.init_bias=none", None),
        ("model.init_bias=null", None),
        ("data.train.1.weight=3", 3.0),
        ("data.train.0.text={'caption': 0.5, 'alt_text': 1}", {"caption": 0.5, "alt_text": 1.0}),
        ('data.train.0.text={"caption": 0.5, "alt_text": 0.5}', {"caption": 0.5, "alt_text": 0.5}),
        ("data.train.0.text=findings", "findings"),
        ("data.train.0.laterality=false", False),
        ("data.train.0.cache=True", True),
        ("data.train.0.templates=['a {}', 'b {}']", ("a {}", "b {}")),
        ('data.classes=["x", "y"]', ("x", "y")),
        ("data.preprocess.image_size=64", 64),
        ("data.preprocess.image_size=(64, 48)", (64, 48)),
        ("data.preprocess.mean=[0, 0.5, 1]", (0.0, 0.5, 1.0)),
        ("mesh.shape=2,4,1", (2, 4, 1)),
        ("tasks.contrastive.label_smoothing=0.1", 0.1),
        ("tasks.classify.class_weights={'a': 2}", {"a": 2.0}),
        ("tasks.classify.class_weights.a=2", 2.0),
        ("frozen.teacher=runs/x", "runs/x"),
        ("workdir=runs/a=b", "runs/a=b"),
        ("workdir=2024", "2024"),
        ("workdir=007", "007"),
        ("data.tokenizer.path=true", "true"),
        ("optim.lr=3e-4", 3e-4),
        ("log.profile=10:15", "10:15"),
        ("log.peak_flops=989e12", 989e12),
        ("log.wandb=2024", "2024"),
        ("eval.stop_metric=retrieval_x/t2i_r10", "retrieval_x/t2i_r10"),
    ],
)
def test_override(config, override, expected):
    key, _, text = override.partition("=")
    node = with_value(config, key, text)
    for part in key.split("."):
        node = (
            getattr(node, part)
            if dataclasses.is_dataclass(node)
            else node[int(part) if part.isdigit() else part]
        )
    assert node == expected and type(node) is type(expected)


def test_an_override_changes_nothing_else(config):
    new = with_value(config, "data.train.1.text", "findings")
    before, after = flatten(to_dict(config)), flatten(to_dict(new))
    assert {k for k in before | after if before.get(k) != after.get(k)} == {"data.train.1.text"}


def test_a_whole_entry_by_its_fields(config):
    new = with_value(config, "data.train", "[{'name': 'c', 'root': 'd', 'weight': 2}]")
    assert new.data.train == (Source(name="c", root="d", weight=2.0),)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("stepz=1", ["unknown config key 'stepz'", "'steps'"]),
        ("model.image.varaint=B/16", ["'model.image.varaint'", "nearest is 'model.image.variant'"]),
        ("data.train.0.wieght=1", ["nearest is 'data.train.0.weight'"]),
        ("tasks.contrastiv.weight=2", ["nearest is 'tasks.contrastive'"]),
        ("tasks.contrastive=3", ["tasks.contrastive=3 is not Contrastive"]),
        ("model=3", ["model=3 is not DualEncoderConfig"]),
        ("steps=many", ["steps='many' is not int"]),
        ("steps=1.5", ["steps=1.5 is not int"]),
        ("steps=true", ["steps=True is not int"]),
        ("steps=0", ["steps=0", "at least 1"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        ("checkpoint.keep=0", ["checkpoint.keep", "at least 1"]),
        ("log.every=-1", ["every=-1", "at least 0"]),
        ("log.profile=10", ["profile='10'", "the first and the last step", "10:15"]),
        ("log.profile=15:10", ["15:10"]),
        ("log.profile=0:3", ["0:3"]),
        ("log.peak_flops=0", ["peak_flops", "above 0"]),
        ("eval.stop_patience=0", ["stop_patience=0", "at least 1"]),
        ("eval.stop_min_delta=-1", ["stop_min_delta", "at least 0"]),
        ("eval.stop_mode=maximum", ["stop_mode", "did you mean 'max'"]),
        ("optim.lr=fast", ["optim.lr='fast' is not"]),
        ("model.image.pool=max", ["'max' is not one of 'cls', 'pooler', 'mean', 'map'", "'map'"]),
        ("data.train.2.weight=1", ["data.train.2", "2 entries"]),
        ("data.train.first.weight=1", ["data.train.first", "numbered from 0"]),
        ("mesh.shape=2,4", ["mesh.shape=(2, 4)"]),
        ("data.train.0.cache=1", ["data.train.0.cache=1 is not bool"]),
        ("steps.more=1", ["'steps' holds 10 and has no keys below"]),
        ("data.train.0.text={'caption': 'often'}", ["data.train.0.text"]),
        ("model.text.num_heads=5", ["model.text.num_heads", "not divisible"]),
        ("model.embed_dim=0", ["embed_dim"]),
    ],
)
def test_bad_override(config, override, parts):
    key, _, text = override.partition("=")
    with pytest.raises(ConfigError) as error:
        with_value(config, key, text)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_round_trip(config, tmp_path):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    (tmp_path / "config.json").write_text(dump(config))
    assert load_dump(tmp_path / "config.json") == config
    assert dump(load_dump(tmp_path / "config.json")) == dump(config)


def test_types_outside_bvl_stay_dicts(config):
    tree = to_dict(dataclasses.replace(config, tasks={"x": Foreign(names=("a",))}))
    assert tree["tasks"]["x"]["type"].endswith("Foreign")
    read = from_dict(json.loads(json.dumps(tree))).tasks["x"]
    assert read == {"type": tree["tasks"]["x"]["type"], "number": 1, "names": ("a",)}


def test_a_type_that_is_gone_is_named(config):
    tree = to_dict(config)
    tree["optim"]["type"] = "bvl.train.optim.OldConfig"
    with pytest.raises(ConfigError, match="bvl.train.optim.OldConfig"):
        from_dict(tree)


@pytest.mark.parametrize("text", ["{", "", "[1]", "3"])
def test_a_dump_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        load_dump(tmp_path / "config.json")


def test_another_format_version(tmp_path, config):
    (tmp_path / "config.json").write_text(dump(config).replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ConfigError, match="99"):
        load_dump(tmp_path / "config.json")


def test_difference_leaves_out_the_free_keys(config):
    free = dataclasses.replace(
        config,
        workdir="elsewhere",
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=1),
        eval=EvalConfig(every=7),
        data=dataclasses.replace(config.data, workers=3, threads=1, prefetch=1),
    )
    free = with_value(free, "mesh.shape", "1,-1,1")
    assert difference(json.loads(dump(config)), to_dict(free)) == []
    other = with_value(with_value(free, "seed", "1"), "data.train.0.text", "findings")
    assert difference(json.loads(dump(config)), to_dict(other)) == [
        "data.train.0.text: 'caption' -> 'findings'",
        "seed: 0 -> 1",
    ]
    fewer = with_value(config, "data.train", "[{'name': 'one', 'root': 'a'}]")
    assert any(
        line.startswith("data.train.1.name: 'two' -> 'absent'")
        for line in difference(to_dict(config), to_dict(fewer))
    )


def test_parse_arg():
    assert vars(parse_arg(None, size=3)) == {"size": 3}
    knobs = parse_arg("size=4,lr=1,name=2024,fast", size=3, lr=0.5, name="x", fast=False, other=1)
    assert vars(knobs) == {"size": 4, "lr": 1.0, "name": "2024", "fast": True, "other": 1}
    with pytest.raises(ConfigError, match="'sise' is unknown; known: size"):
        parse_arg("sise=4", size=3)
    with pytest.raises(ConfigError, match="size='big' is not int"):
        parse_arg("size=big", size=3)


def write(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(textwrap.dedent(text))
    return str(folder / "own.py")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def other(): pass", ["no function get_config"]),
        ("def get_config(): return 3", ["returned int"]),
        ("def get_config(", ["own.py, line 1", "SyntaxError"]),
        (
            "from bvl.config import Config\n\n\ndef get_config():\n    return Config(stepz=3)",
            ["own.py, line 5", "stepz"],
        ),
        ("import no_such_module", ["own.py, line 1", "no_such_module"]),
    ],
)
def test_bad_config_file(tmp_path, text, parts):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_no_config_file(tmp_path):
    with pytest.raises(ConfigError, match="did you mean .*quickstart.py"):
        load_config(str(ROOT / "configs" / "quickstrat.py"))
    with pytest.raises(ConfigError, match="no config file"):
        load_config(str(tmp_path / "none" / "x.py"))
    with pytest.raises(ConfigError, match="takes no argument"):
        load_config(f"{ROOT / 'configs' / 'quickstart.py'}:size=3")
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load_config(str(ROOT / "configs" / "quickstart.py"), ["steps"])


def test_wrong_types_in_a_file_are_found(tmp_path):
    spec = write(
        tmp_path,
        f"""
        import dataclasses, importlib.util
        spec = importlib.util.spec_from_file_location("base", {str(ROOT / "configs" / "quickstart.py")!r})
        base = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(base)


        def get_config():
            config = base.get_config()
            return dataclasses.replace(config, data=dataclasses.replace(config.data, threads="four"))
        """,
    )
    with pytest.raises(ConfigError, match="data.threads='four' is not int"):
        load_config(spec)


def test_a_config_file_may_define_its_own_types(tmp_path):
    spec = write(
        tmp_path,
        f"""
        from __future__ import annotations
        import dataclasses, importlib.util
        from bvl.tasks.contrastive import Contrastive
        spec = importlib.util.spec_from_file_location("base", {str(ROOT / "configs" / "quickstart.py")!r})
        base = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(base)
        Number = float


        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Contrastive):
            strength: Number = 1.0


        def get_config():
            return dataclasses.replace(base.get_config(), tasks={{"mine": Mine()}})
        """,
    )
    config = load_config(spec, ["tasks.mine.strength=2", "tasks.mine.weight=3"])
    assert (config.tasks["mine"].strength, config.tasks["mine"].weight) == (2.0, 3.0)


def test_the_config_of_an_old_run():
    """Keys that came later have their defaults; `old_run.json` is never written anew."""
    old = load_dump(ROOT / "tests" / "golden" / "old_run.json")
    assert (old.steps, old.model.image.variant, old.model.decoder) == (1500, "XS/8", None)
    assert old.data.controls.enabled == ()
    assert (old.log.profile, old.log.peak_flops, old.eval.stop_metric) == (None, None, None)
    assert (
        difference(json.loads((ROOT / "tests" / "golden" / "old_run.json").read_text()), to_dict(old)) == []
    )


# --- The configs that come with bvl -----------------------------------------------------------------------


@each_config
def test_golden(path, golden):
    golden(f"{path.stem}.json", dump(load_config(str(path))))


@each_config
def test_shipped_config_round_trip(path, tmp_path):
    config = load_config(str(path))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    (tmp_path / "config.json").write_text(dump(config))
    assert load_dump(tmp_path / "config.json") == config
    assert difference(to_dict(config), json.loads(dump(config))) == []


@each_config
def test_the_command_in_the_docstring_runs(path, monkeypatch, capsys):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).replace("\\\n", " ")
    commands = [line.strip() for line in doc.splitlines() if line.strip().startswith("bvl train")]
    assert commands, f"{path}: the docstring holds no command"
    assert f"configs/{path.name}" in commands[0]
    monkeypatch.chdir(ROOT)
    for command in commands:
        words = shlex.split(command)[1:]
        assert cli.main([*words, "--dry-run"]) == 0
        printed = json.loads(capsys.readouterr().out)
        for key, _, value in (word.partition("=") for word in words[2:]):
            assert str(flatten(printed)[key]) == value

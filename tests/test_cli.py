"""The command line: help, wrong usage, errors, and the way from arguments to functions."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from bvl import cli
from bvl.errors import DataError
from bvl.evals.items import list_images

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
VERBS = [
    ["train"],
    ["eval"],
    ["embed"],
    ["caption"],
    ["sweep-guidance"],
    ["plan"],
    ["launch"],
    ["runs"],
    ["describe"],
    ["ground"],
    ["segment"],
    ["detect"],
    ["data"],
    ["data", "phantoms"],
    ["data", "show"],
    ["convert"],
]


def run(*words):
    """Exit code of a command line, whether it returns or exits."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return stop.code


def test_all_verbs_are_listed_here():
    subparsers = cli._parser()._subparsers._group_actions[0]
    assert set(subparsers.choices) == {words[0] for words in VERBS}


@pytest.mark.parametrize("words", [[], *VERBS], ids=" ".join)
def test_help_ends_with_an_example(words, capsys):
    assert run(*words, "--help") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-2] == "example:"
    assert lines[-1].startswith("  " + " ".join(["bvl", *words]))
    # The example is a command line that the parser takes.
    cli._parse(lines[-1].split()[1:])


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "VERB"),
        (["trian"], "trian"),
        (["train"], "config"),
        (["train", QUICKSTART, "--bogus"], "--bogus"),
        (["train", QUICKSTART, "--dry-run", "steps"], "steps"),
        (["eval", "runs/x"], "--data"),
        (["eval", "runs/x", "--data", "x", "seed=3"], "seed=3"),
        (["eval", "runs/x", "--data", "x", "--batch-size", "0"], "--batch-size"),
        (["eval", "runs/x", "--data", "x", "--texts-per-image", "0"], "--texts-per-image"),
        (["embed", "runs/x", "--out", "x.npz"], "IMAGES"),
        (["embed", "runs/x", "x", "--out", "x.npz", "--long-texts", "whole"], "--long-texts"),
        (["caption", "runs/x"], "IMAGES"),
        (["caption", "runs/x", "a.png", "--beams", "two"], "--beams"),
        (["caption", "runs/x", "a.png", "--length", "4:6"], "--length"),
        (["sweep-guidance", "runs/x"], "--out"),
        (["sweep-guidance", "runs/x", "--out", "x", "--length", "6:4"], "--length"),
        (["data"], "WHAT"),
        (["data", "phantoms", "out", "--n", "-3"], "--n"),
        (["data", "phantoms", "out", "--n", "many"], "--n"),
    ],
)
def test_wrong_usage(words, part, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "usage:" in error and part.lower() in error.lower()


def test_overrides_may_stand_anywhere(capsys):
    assert run("train", QUICKSTART, "steps=3", "--dry-run", "seed=7", "--force", "workdir=runs/a=b") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["seed"], printed["workdir"]) == (3, 7, "runs/a=b")


@pytest.mark.parametrize(
    "words, part",
    [
        (["train", "configs/none.py"], "no config file configs/none.py"),
        (["train", str(ROOT / "README.md")], "is no .py file"),
        (["train", QUICKSTART, "stepz=3"], "'steps'"),
        (["data", "show", QUICKSTART, "--out", "sheet.pgn"], "end it with .png"),
        (["eval", QUICKSTART, "--data", str(ROOT / "README.md")], "a manifest is a .jsonl"),
        (["train", QUICKSTART], "workdir=DIR"),
        (["eval", "no_such_run", "--data", "no_such_folder"], "no_such_folder"),
        (["caption", "no_such_run", "no_such_image.png"], "no_such_image.png"),
        (["caption", "no_such_run", "x.png", "--out", "x.txt"], "end it with .jsonl"),
        (["sweep-guidance", "no_such_run", "--out", "x"], "no such folder"),
        (["sweep-guidance", "no_such_run", "--out", "x", "--gammas", "4:1:1"], "gammas='4:1:1'"),
        (["embed", "no_such_run", "no_such_image.png", "--out", "x.npz"], "no_such_image.png"),
    ],
)
def test_user_errors_have_no_traceback(words, part, capsys):
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert part in error and "Traceback" not in error
    assert error.startswith(f"bvl {words[0]}: ")


def test_embed_names_a_missing_run(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert run("embed", str(tmp_path / "run"), str(tmp_path / "a.png"), "--out", str(tmp_path / "x.npz")) == 1
    assert str(tmp_path / "run") in capsys.readouterr().err
    picture = str(tmp_path / "a.png")
    assert run("embed", picture, picture, "--out", str(tmp_path / "x.npz")) == 1
    assert "is no run folder: config.json is missing (a file; give its folder)" in capsys.readouterr().err


def test_a_bad_name_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert run("eval", str(tmp_path / "run"), "--data", str(tmp_path), "--name", "a/b") == 1
    assert "evaluation name 'a/b'" in capsys.readouterr().err


def test_options_reach_what_reads_the_records(tmp_path, monkeypatch):
    (tmp_path / "records.jsonl").write_text("{}")
    monkeypatch.setattr("bvl.train.environment.enable_compilation_cache", lambda: None)
    monkeypatch.setattr("bvl.runs.load_components", lambda *args, **options: SimpleNamespace(config="config"))
    calls = {}

    def record(name, result):
        def called(*args, **options):
            calls[name] = options
            if result is None:
                raise DataError("enough")
            return result

        return called

    monkeypatch.setattr("bvl.evals.folder.suites_for", record("eval", None))
    monkeypatch.setattr("bvl.evals.items.list_images", record("list", ["items"]))
    monkeypatch.setattr("bvl.evals.embed.embed_to_file", record("embed", None))
    columns = ("--image-column", "file", "--text-column", "report", "--split", "val")
    texts = ("--texts-per-image", "all", "--long-texts", "chunks")
    captions = ("--guidance", "2", "--length", "4:6", "--max-images", "all", "--lexicon", "chest")
    assert run("eval", "run", "--data", str(tmp_path), *columns, *texts, *captions) == 1
    read = {"image_column": "file", "text_column": "report", "split": "val"}
    texts = {"texts_per_image": None, "long_texts": "chunks"}
    captions = {"guidance": 2.0, "length": (4, 5, 6), "max_images": None, "lexicon": "chest"}
    assert calls["eval"] == {
        **read,
        **texts,
        "name": tmp_path.name,
        "config": "config",
        "captions": captions,
        "calibrate": False,
    }
    options = ("--long-texts", "chunks", "--batch-size", "3")
    assert run("embed", "run", str(tmp_path), "--out", "x.npz", *columns, *options) == 1
    assert calls["list"] == {**read, "config": None}
    assert calls["embed"] == {"long_texts": "chunks", "batch_size": 3}


def test_images_of_several_folders_have_ids_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / "0.png")
    a, b = tmp_path / "a", tmp_path / "b"
    assert [item.id for item in list_images([a])] == ["0.png"]
    assert [item.id for item in list_images([a, b])] == [f"{a}/0.png", f"{b}/0.png"]


def test_captions_are_lines_and_unreadable_images_are_named(tmp_path, monkeypatch, capsys):
    for name in "abc":
        Image.new("L", (4, 4), ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    monkeypatch.setattr("bvl.train.environment.enable_compilation_cache", lambda: None)
    calls = []

    def caption(images, **options):
        calls.append(options)
        return [f"grey\n{image.getpixel((0, 0))}" for image in images]

    model = SimpleNamespace(caption=caption, components=None)
    loaded = []
    monkeypatch.setattr("bvl.api.load", lambda path, **options: loaded.append(path) or model)
    options = ("--guidance", "2", "--beams", "4", "--length", "12", "--scorer", "judge", "--seed", "5")
    assert run("caption", "run", str(tmp_path), *options) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["a.png\tgrey 97", "c.png\tgrey 99"]
    assert "1 got no caption: b.png" in printed.err
    assert loaded == ["run", "judge"]
    wanted = {"guidance": 2.0, "beams": 4, "length": 12, "scorer": model, "seed": 5, "prompt": None}
    # Images keep their numbers, whichever of them can be read.
    assert calls == [{**wanted, "batch_size": 16, "first_row": [0, 2]}]

    (tmp_path / "b.png").unlink()
    out = tmp_path / "new" / "captions.jsonl"
    assert run("caption", "run", str(tmp_path), "--out", str(out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"id": "a.png", "caption": "grey\n97"}, {"id": "c.png", "caption": "grey\n99"}]

    def fail(images, **options):
        raise DataError("no captions")

    model.caption = fail
    assert run("caption", "run", str(tmp_path), "--out", str(out.with_name("more.jsonl"))) == 1
    assert [path.name for path in out.parent.iterdir()] == ["captions.jsonl"]


def test_images_are_captioned_in_parts(tmp_path, monkeypatch, capsys):
    for i in range(20):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:02}.png")
    monkeypatch.setattr("bvl.train.environment.enable_compilation_cache", lambda: None)
    parts = []

    def caption(images, *, seed, first_row, **options):
        parts.append((seed, first_row))
        return ["x"] * len(images)

    model = SimpleNamespace(caption=caption, components=None)
    monkeypatch.setattr("bvl.api.load", lambda path, **options: model)
    assert run("caption", "run", str(tmp_path), "--batch-size", "16", "--seed", "3") == 0
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert parts == [(3, list(range(16))), (3, list(range(16, 20)))]


def test_a_prompt_beyond_its_room_is_named_and_left_out(tmp_path, monkeypatch, capsys, caplog):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    prompts = ["one", "one two three", None]
    rows = [{"id": f"r{i}", "image": "a.png", "view": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = list_images([tmp_path])
    items = [dataclasses.replace(item, prompt=prompt) for item, prompt in zip(items, prompts, strict=True)]
    monkeypatch.setattr("bvl.evals.items.list_images", lambda *args, **options: items)
    monkeypatch.setattr("bvl.train.environment.enable_compilation_cache", lambda: None)
    asked = []

    def caption(images, *, prompt, first_row, **options):
        asked.append((prompt, first_row))
        return ["x"] * len(images)

    config = SimpleNamespace(data=SimpleNamespace(controls=SimpleNamespace(prompt_tokens=2)))
    components = SimpleNamespace(tokenizer=SimpleNamespace(ids=str.split), config=config)
    model = SimpleNamespace(caption=caption, components=components)
    monkeypatch.setattr("bvl.api.load", lambda path, **options: model)
    assert run("caption", "run", str(tmp_path)) == 1
    assert asked == [(["one", None], [0, 2])]
    assert "1 got no caption: r1" in capsys.readouterr().err
    # A prompt for all leaves no room to those of the records.
    assert run("caption", "run", str(tmp_path), "--prompt", "why") == 0
    assert asked[1:] == [("why", [0, 1, 2])]


@pytest.mark.parametrize(
    "error, code",
    [
        (DataError("the folder is empty"), 1),
        (FileNotFoundError(2, "No such file or directory", "missing/sheet.png"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr("bvl.cli.data._data_show", fail)
    assert run("data", "show", "x.py") == code
    text = capsys.readouterr().err
    assert text.startswith("bvl data: ") and "Traceback" not in text


def test_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(args):
        raise OSError("not about a path of the user's")

    monkeypatch.setattr("bvl.cli.data._data_show", fail)
    with pytest.raises(OSError):
        cli.main(["data", "show", "x.py"])


def test_data_phantoms_writes_a_folder(tmp_path, capsys):
    out = tmp_path / "phantoms"
    assert run("data", "phantoms", str(out), "--n", "3", "--size", "32") == 0
    lines = (out / "records.jsonl").read_text().splitlines()
    assert len(lines) == 3 and (out / json.loads(lines[0])["image"]).is_file()
    assert run("data", "phantoms", str(out), "--n", "3", "--size", "32") == 1
    assert str(out) in capsys.readouterr().err


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "bvl.cli", "train", "none.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bvl train: no config file none.py") and "Traceback" not in done.stderr

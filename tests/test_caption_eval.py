"""The suite of captions: values against direct computation, what is asked for, the sweep, and bad input."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from tiny_model import PHANTOMS, tiny_components
from tiny_run import fast_compilation, tiny_config  # noqa: F401

from bvl.config import EvalConfig, check
from bvl.data.phantoms import FINDING_LEXICON, write_phantoms
from bvl.data.sources import RecordSet, Source
from bvl.errors import ConfigError, DataError, UserError
from bvl.evals.base import evaluate, write_eval
from bvl.evals.caption import Captions
from bvl.evals.folder import suites_for
from bvl.evals.sweep import parse_gammas, suite_for, sweep_guidance, write_frontier
from bvl.evals.table import print_captions, read_examples
from bvl.evals.writing import decode_options
from bvl.metrics.bleu import bleu, bleu_statistics
from bvl.metrics.bootstrap import bootstrap_mean, bootstrap_sums
from bvl.metrics.caption_alignment import clip_score, retrieve_in_pools
from bvl.metrics.caption_text import tokenize
from bvl.metrics.cider import cider_d
from bvl.runs import RunFolder
from bvl.tasks import captioning, writing_rows
from bvl.tasks.contrastive import embed_images, embed_texts
from bvl.train.loop import train

ALL = Source(phantoms=PHANTOMS, split=None, text="captions")
NUM_SAMPLES = 50
pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr("bvl.evals.caption_scores.BOOTSTRAP_SAMPLES", NUM_SAMPLES)


@pytest.fixture(scope="module")
def components():
    return tiny_components(captions=True)


@pytest.fixture(scope="module")
def alone():
    """A captioner without any contrastive task."""
    return tiny_components(captions=True, contrastive=False)


@pytest.fixture(scope="module")
def suite():
    return Captions(source=ALL, max_images=24, decode_batch_size=12)


@pytest.fixture(scope="module")
def prepared(suite, components):
    suite.check()
    return suite.prepare(components, batch_size=16)


def records_of(prepared, source=ALL):
    record_set = RecordSet(source)
    return [record_set.load(item.index) for item in prepared.items]


def test_values_equal_direct_computation(suite, components, prepared):
    records = records_of(prepared)
    # Half of the captions are a text of their own image, half that of another.
    captions = [r["captions"][0] for r in records[:12]] + [r["captions"][1] for r in records[:12]]
    result = suite.judge(components, prepared, captions)
    metrics, groups = result.metrics, [r["patient_id"] for r in records]
    assert (metrics["num_images"], metrics["num_references"]) == (
        24,
        sum(len({t.lower() for t in r["captions"]}) for r in records),
    )
    words = [tokenize(c) for c in captions]
    references = [[tokenize(t) for t in item.references] for item in prepared.items]
    cider = cider_d(words, references)
    assert metrics["cider_d"] == pytest.approx(cider.mean()) and cider[:12].min() > cider[12:].mean()
    interval = bootstrap_mean(cider, groups, num_samples=NUM_SAMPLES)
    assert metrics["cider_d/ci95"] == pytest.approx([interval.low, interval.high])
    statistics = bleu_statistics(words, references)
    assert metrics["bleu2"] == pytest.approx(bleu(statistics.sum(0))[1])
    interval = bootstrap_sums(statistics, lambda s: bleu(s)[3], groups, num_samples=NUM_SAMPLES)
    assert metrics["bleu4/ci95"] == pytest.approx([interval.low, interval.high])
    image = embed_images(components, [r["image"] for r in records])
    text = embed_texts(components, captions)
    assert metrics["clipscore"] == pytest.approx(clip_score(image, text).mean(), rel=1e-5)
    found = retrieve_in_pools(image, text, seed=suite.seed)
    assert metrics["self_retrieval_r1"] == pytest.approx(found.hit.mean())
    assert metrics["self_retrieval_r1/chance"] == pytest.approx(1 / 24)
    assert metrics["bag_r1/chance"] == pytest.approx(0.1)
    assert metrics["mean_length"] == pytest.approx(np.mean([len(c.split()) for c in captions]))
    assert metrics["unique"] == pytest.approx(len({tuple(w) for w in words}) / 24)
    row = result.per_example[13]
    assert (row["id"], row["caption"]) == (records[13]["id"], captions[13])
    assert row["cider_d"] == pytest.approx(cider[13]) and row["references"] == list(
        prepared.items[13].references
    )
    assert result.provenance["scorer"]["run"] == "the run itself"
    assert result.provenance["interval"]["num_groups"] == len(set(groups))
    assert "finding_f1" not in metrics and "length_within_1" not in metrics
    json.dumps([result.provenance, result.per_example, metrics], allow_nan=False)


def test_findings_are_compared_with_the_facts(components, prepared):
    suite = Captions(source=ALL, max_images=24, lexicon="phantoms")
    prepared = dataclasses.replace(prepared, truths=suite._truths(suite.opened(), prepared.items))
    records = records_of(prepared)

    def said(record, presence, prefix=""):
        facts = record["facts"]["findings"].items()
        nouns = FINDING_LEXICON[record["modality"]]
        return ". ".join(prefix + nouns[name][0] for name, fact in facts if fact["presence"] == presence)

    true = suite.judge(components, prepared, [said(r, "present") for r in records]).metrics
    assert true["finding_precision"] == 1 and true["invented_rate"] == 0 and true["finding_recall"] > 0.6
    false = suite.judge(components, prepared, [said(r, "absent") for r in records]).metrics
    assert false["finding_precision"] == 0 and false["invented_rate"] == 1
    denied = suite.judge(components, prepared, [said(r, "absent", "no ") for r in records])
    assert "finding_precision" not in denied.metrics and denied.metrics["finding_recall"] == 0
    assert "invented_rate" in denied.provenance["undefined"] and denied.metrics["wrong_negation_rate"] == 0
    assert denied.provenance["finding_rules"]["unmentioned_true"] == "ignored"
    wrongly = suite.judge(components, prepared, [said(r, "present", "no ") for r in records]).metrics
    assert wrongly["wrong_negation_rate"] == 1 and wrongly["wrong_negation_rate/ci95"] == [1, 1]
    # A finding of another modality is as invented as an absent one of the image's own.
    elsewhere = ["a malaria parasite" if r["modality"] != "blood smear" else "a calculus" for r in records]
    assert suite.judge(components, prepared, elsewhere).metrics["invented_rate"] == 1


def test_findings_of_chest_reports_are_those_of_the_references(components, prepared):
    suite = Captions(source=ALL, max_images=24, lexicon="chest")
    items = [
        dataclasses.replace(item, references=("No effusion.", "A nodule in the left lung."))
        for item in prepared.items
    ]
    prepared = dataclasses.replace(
        prepared, items=items, truths=suite._truths(suite.opened(), items), embeddings=None
    )
    metrics = suite.judge(
        components, prepared, ["Pleural effusion."] * 12 + ["Pulmonary nodule."] * 12
    ).metrics
    assert metrics["finding_precision"] == metrics["finding_recall"] == metrics["invented_rate"] == 0.5


def test_lengths_asked_for_reach_the_captioner(suite, components, prepared, monkeypatch):
    asked = []

    def write(components, images, *, controls, **options):
        asked.append(controls["length"])
        return [" ".join(["word"] * n) for n in controls["length"]]

    monkeypatch.setattr("bvl.evals.caption.best_captions", write)
    turns = dataclasses.replace(suite, length=(4, 5, 6))
    captions = turns.write(components, prepared)
    assert asked[-1] == [4, 5, 6] * 8
    assert turns.judge(components, prepared, captions).metrics["length_within_1"] == 1
    shorter = turns.judge(components, prepared, [c[5:] for c in captions])
    assert shorter.metrics["length_error"] == -1 and shorter.metrics["length_within_1"] == 1
    assert turns.judge(components, prepared, [c[10:] for c in captions]).metrics["length_within_1"] == 0
    assert [row["asked_length"] for row in shorter.per_example[:4]] == [4, 5, 6, 4]
    dataclasses.replace(suite, length="reference").write(components, prepared)
    # The run knows lengths up to 12, which also stands for more.
    words = [len(item.references[0].split()) for item in prepared.items]
    assert asked[-1] == [min(n, 12) for n in words] and max(words) > 12
    dataclasses.replace(suite, length=7).write(components, prepared)
    assert asked[-1] == [7] * 24


def test_a_sweep_compiles_once_and_is_written(suite, components, tmp_path):
    before = writing_rows.generate._cache_size()
    points = sweep_guidance(components, suite, (0.0, 1.0, 3.0), batch_size=16)
    assert writing_rows.generate._cache_size() == before + 1
    assert [p.guidance for p in points] == [0, 1, 3]
    assert [p.result.provenance["decoding"]["guidance"] for p in points] == [0, 1, 3]
    # Scale 1 with null rows decodes as without.
    plain = suite.run(components, batch_size=16)
    assert [e["caption"] for e in plain.per_example] == [e["caption"] for e in points[1].result.per_example]
    captions = [[e["caption"] for e in p.result.per_example] for p in points]
    # Without the image a caption follows from the prompt alone.
    prompts = [e["prompt"] for e in points[0].result.per_example]
    assert len(set(zip(prompts, captions[0], strict=True))) == len(set(prompts))
    assert len({tuple(c) for c in captions}) == 3

    write_frontier(points, tmp_path, title="a run")
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert [float(row["guidance"]) for row in rows] == [0, 1, 3]
    for row, point in zip(rows, points, strict=True):
        assert float(row["clipscore"]) == point.metrics["clipscore"]
        low, high = point.metrics["clipscore/ci95"]
        assert (float(row["clipscore_low"]), float(row["clipscore_high"])) == (low, high)
    table = (tmp_path / "frontier.md").read_text().splitlines()
    assert table[0] == "# a run" and [row.split("|")[1].strip() for row in table[6:9]] == ["0", "1", "3"]
    assert f"Scorer: the run itself (weights {components.weights_hash()})" in table[2]
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width > 800 and len(picture.convert("L").getcolors()) > 50
    written = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert written[3]["captions"] == {"0": captions[0][3], "1": captions[1][3], "3": captions[2][3]}


def test_without_a_scorer_its_metrics_are_absent(alone, tmp_path):
    suite = Captions(source=ALL, max_images=6)
    points = sweep_guidance(alone, suite, (1.0, 2.0))
    assert "cider_d" in points[0].metrics and "clipscore" not in points[0].metrics
    assert points[0].result.provenance["scorer"] is None
    write_frontier(points, tmp_path)
    assert (tmp_path / "frontier.png").is_file() and "R@1" not in (tmp_path / "frontier.md").read_text()
    with pytest.raises(ConfigError, match="needs a contrastive model to choose, which this run is not"):
        dataclasses.replace(suite, best_of=2, temperature=1.0).run(alone, batch_size=16)


def test_another_scorer_is_read_once(suite, alone, components, monkeypatch):
    read = []
    monkeypatch.setattr("bvl.evals.caption.load_components", lambda path: read.append(path) or components)
    judged = dataclasses.replace(suite, scorer="runs/judge", max_images=6)
    judged.check()
    results = [judged.run(alone, batch_size=16) for _ in range(2)]
    assert read == ["runs/judge"]
    scorer = results[0].provenance["scorer"]
    assert (scorer["run"], scorer["weights_hash"]) == ("runs/judge", components.weights_hash())
    captions = [row["caption"] for row in results[0].per_example]
    image = embed_images(components, [r["image"] for r in records_of(judged.prepare(alone, batch_size=16))])
    expected = clip_score(image, embed_texts(components, captions))
    assert results[0].metrics["clipscore"] == pytest.approx(expected.mean(), rel=1e-5)
    sweep_guidance(alone, judged, (1.0, 2.0))
    assert read == ["runs/judge"]


def test_best_of_takes_what_the_scorer_likes(components):
    suite = Captions(source=ALL, max_images=8, temperature=1.0, best_of=6, length=5)
    prepared = suite.prepare(components, batch_size=16)
    captions = suite.write(components, prepared)
    candidates = captioning.write_captions(
        components,
        prepared.pixels,
        options=decode_options(components.config, temperature=1.0, best_of=6),
        controls={"length": 5, "prompt": [item.prompt for item in prepared.items]},
        batch_size=8,
    )
    image = embed_images(components, [r["image"] for r in records_of(prepared)])
    for row, (caption, several) in enumerate(zip(captions, candidates, strict=True)):
        texts = [candidate.text for candidate in several]
        assert len(set(texts)) > 1
        assert caption == texts[int((embed_texts(components, texts) @ image[row]).argmax())]


def test_records_of_one_image_are_one_item(components, tmp_path):
    for name in "ab":
        Image.new("RGB", (32, 32), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    lines = [("a", "a spot"), ("b", "normal"), ("a", "one small spot"), ("a", "A  spot")]
    records = [{"id": str(i), "image": f"{a}.png", "caption": c} for i, (a, c) in enumerate(lines)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    suite = Captions(source=Source(root=str(tmp_path), split=None))
    prepared = suite.prepare(components, batch_size=4)
    assert [item.references for item in prepared.items] == [
        ("a spot", "one small spot", "A  spot"),
        ("normal",),
    ]
    # Two questions about one image are two items, each with its own answers.
    records = [r | {"view": ["left", "right"][i // 2]} for i, r in enumerate(records)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    prepared = dataclasses.replace(suite).prepare(components, batch_size=4)
    found = [(item.prompt, item.references) for item in prepared.items]
    assert found == [("left", ("a spot",)), ("left", ("normal",)), ("right", ("one small spot", "A  spot"))]
    long = {"view": " ".join(["nodule"] * 9)}
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps(r | (long if i == 3 else {})) + "\n" for i, r in enumerate(records))
    )
    prepared = dataclasses.replace(suite).prepare(components, batch_size=4)
    assert prepared.left_out == {"prompt beyond data.controls.prompt_tokens": 1}
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 images with references can be read"):
        dataclasses.replace(suite).prepare(components, batch_size=4)


def test_captions_of_a_run_are_found_again(suite, components, tmp_path):
    evaluation = evaluate(components, {"caption_x/short": suite}, batch_size=16)
    run = RunFolder(tmp_path)
    metrics = write_eval(run, evaluation)
    assert metrics["caption_x/short/num_images"] == 24
    assert "caption_x/short/provenance" in json.loads(run.eval.read_text())
    assert read_examples(run, ("caption_x/short", "retrieval_x")) == evaluation.per_example


def test_a_sweep_takes_the_suite_of_the_run(suite, components):
    evaluation = EvalConfig(suites={"caption_x": suite, "caption_y": dataclasses.replace(suite, beams=3)})
    config = dataclasses.replace(components.config, eval=evaluation)
    found = suite_for(config, max_images=5, length=7)
    assert (found.max_images, found.length, found.beams, found.source) == (5, 7, 1, ALL)
    placed = dataclasses.replace(suite, source=Source(subfolder="held_out"))
    data = dataclasses.replace(config.data, root="scans")
    config = dataclasses.replace(config, data=data, eval=EvalConfig(suites={"caption_x": placed}))
    assert suite_for(config).source.root == "scans/held_out"
    with pytest.raises(ConfigError, match="split='test' is of a folder"):
        suite_for(config, split="test")


def test_captions_are_printed_beside_references(capsys):
    rows = [{"caption": f"written {i}", "references": [f"wanted [{i}]", "more"]} for i in range(10)]
    print_captions({"caption_x": rows, "retrieval_x": [{"text": "none"}], "caption_y": []}, count=5)
    out = capsys.readouterr().out
    assert "caption_x" in out and "retrieval_x" not in out
    for i in range(0, 10, 2):
        assert f"written {i}" in out and f"wanted [{i}]" in out
    assert "written 1 " not in out


def test_a_folder_gives_a_suite_of_captions(components, tmp_path):
    write_phantoms(tmp_path / "p", PHANTOMS, 60)
    suites = suites_for(tmp_path / "p", config=components.config, captions={"max_images": 4, "guidance": 2.0})
    suite = suites["caption_p"]
    assert (suite.task, suite.max_images, suite.guidance, suite.lexicon) == ("caption", 4, 2.0, "phantoms")
    assert suite.source.text == {"caption": 0.5, "impression": 0.5}  # what the run was trained on
    result = evaluate(components, {"caption_p": suite}, batch_size=8)
    assert result.metrics["caption_p/num_images"] == 4
    only = suite_for(components.config, data=tmp_path / "p", beams=3)
    assert only.beams == 3
    assert not any(n.startswith("caption") for n in suites_for(tmp_path / "p", config=tiny_config()))
    with pytest.raises(ConfigError, match="no task of type Caption, only contrastive"):
        suites_for(tmp_path / "p", config=tiny_config(), captions={"beams": 2})


@pytest.mark.parametrize(
    "options, part",
    [
        ({"max_images": 1}, "max_images=1"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance_null": "text"}, "guidance_null='text'"),
        ({"length": 0}, "length=0"),
        ({"length": ()}, "length="),
        ({"lexicon": "skin"}, "lexicon='skin'"),
        ({"decode_batch_size": 0}, "decode_batch_size=0"),
    ],
)
def test_bad_options(options, part):
    with pytest.raises(ConfigError, match=part):
        Captions(source=ALL, **options)


@pytest.mark.parametrize(
    "options, part",
    [
        (
            {"task": "contrastive"},
            "task='contrastive' does not write captions; tasks are contrastive, caption",
        ),
        ({"beams": 4, "groups": 3}, "groups=3 does not divide beams=4"),
        ({"top_k": 5}, "set temperature"),
        ({"max_length": 16}, "max_length=16: this run was trained on texts of up to 15 tokens"),
        ({"section": "history"}, "section='history': the run knows caption, impression"),
        ({"quality": 3}, "quality=3: the run knows bins from 0 to 2"),
        ({"length": (4, 13)}, "length=.* the run knows up to 12 words"),
        ({"best_of": 3, "beams": 2}, "best_of=3 with beams=2"),
    ],
)
def test_what_a_run_cannot_write_is_said_before_training(components, options, part):
    with pytest.raises(ConfigError, match=part):
        Captions(source=ALL, **options).check_config(components.config)


def test_choosing_needs_a_contrastive_task_or_a_scorer(components, alone):
    suite = Captions(source=ALL, best_of=2, beams=2)
    suite.check_config(components.config)
    dataclasses.replace(suite, scorer="runs/judge").check_config(alone.config)
    with pytest.raises(ConfigError, match="best_of=2 needs a contrastive model"):
        suite.check_config(alone.config)


def test_a_folder_for_a_captioner_alone(alone, tmp_path):
    write_phantoms(tmp_path / "p", PHANTOMS, 60)
    assert list(suites_for(tmp_path / "p", config=alone.config)) == ["caption_p"]
    (tmp_path / "records.jsonl").write_text('{"id": "0", "image": "a.png", "labels": ["x"]}\n')
    with pytest.raises(DataError, match="(?s)nothing to evaluate.*no task of type Contrastive, only caption"):
        suites_for(tmp_path, config=alone.config)
    # Options of captions are not for nothing: what is wrong with the records is an error of its own.
    with pytest.raises(DataError, match="captions need 2"):
        suites_for(tmp_path, config=alone.config, captions={"beams": 2})


def test_bad_runs_and_records(components, tmp_path):
    suite = Captions(source=ALL)
    with pytest.raises(ConfigError, match="no task of type Caption, only contrastive \\(Contrastive\\)"):
        suite.run(tiny_components(), batch_size=16)
    config = tiny_config(tmp_path / "run", eval=EvalConfig(suites={"caption_x": suite}))
    with pytest.raises(ConfigError, match="caption_x reads the task 'caption'; tasks are contrastive"):
        train(check(config))
    plain = dataclasses.replace(components.config, data=tiny_config().data)
    with pytest.raises(ConfigError, match="length=5 is asked for, .* set data.controls.lengths"):
        dataclasses.replace(suite, length=5).check_config(plain)
    with pytest.raises(ConfigError, match="beams"):
        dataclasses.replace(suite, beams=0, max_images=4).run(components, batch_size=16)
    with pytest.raises(UserError, match="is no run folder"):
        dataclasses.replace(suite, scorer=str(tmp_path / "nothing")).check()
    with pytest.raises(DataError, match="the text 'notes'.*captions need 2"):
        dataclasses.replace(suite, text="notes").check()
    (tmp_path / "records.jsonl").write_text(
        '{"id": "0", "image": "a.png", "caption": "x"}\n{"id": "1", "image": "b.png", "caption": "y"}\n'
    )
    with pytest.raises(DataError, match="record '0' has no facts of phantoms"):
        Captions(source=Source(root=str(tmp_path), split=None), lexicon="phantoms").check()
    with pytest.raises(ConfigError, match="have no Captions: name a folder of records by data"):
        suite_for(components.config)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.5:2:0.5", (0.5, 1.0, 1.5, 2.0)),
        ("2,1,1", (1.0, 2.0)),
        ("0:0.3:0.1", (0.0, 0.1, 0.2, 0.3)),
        ("3", (3.0,)),
    ],
)
def test_gammas(text, expected):
    assert parse_gammas(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1:2", "2:1:1", "1:2:0", "-1,2", "nan", "1:inf:1"])
def test_bad_gammas(text):
    with pytest.raises(ConfigError, match="gammas"):
        parse_gammas(text)

"""Suites of regions: values of known predictions, calibration, and all of it by an untrained model on phantoms."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from tiny_model import PHANTOMS, tiny_components
from tiny_regions import region_model
from tiny_run import fast_compilation  # noqa: F401

from bvl.data.arrays import Arrays
from bvl.data.phantoms import write_phantoms
from bvl.data.regions import Regions
from bvl.data.sources import RecordSet, Source
from bvl.data.transforms import Preprocess, apply
from bvl.errors import ConfigError, DataError
from bvl.evals import describing, detection, grounding
from bvl.evals import heat_maps as heat_maps_suite
from bvl.evals.base import evaluate, write_eval
from bvl.evals.describing import RegionDescriptions, first_name
from bvl.evals.detection import ObjectDetection
from bvl.evals.folder import suites_for
from bvl.evals.grounding import PhraseGrounding
from bvl.evals.heat_maps import HeatMapPointing
from bvl.evals.regions import PhraseLists, _of_size, instance_ious
from bvl.metrics.heat_maps import inside_boxes
from bvl.metrics.masks import pairwise_mask_iou
from bvl.runs import RunFolder
from bvl.tasks.grounding import Grounding
from bvl.tasks.locating import Detections, LocatedImage
from bvl.tasks.region_caption import RegionCaption
from bvl.tasks.writing_rows import Candidate

SOURCE = Source(phantoms=PHANTOMS, split=None)
pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Of intervals nothing is judged here but that they are there."""
    monkeypatch.setattr("bvl.evals.caption_scores.BOOTSTRAP_SAMPLES", 100)


@pytest.fixture(scope="module")
def components():
    return region_model().components


@pytest.fixture(scope="module")
def records():
    record_set = RecordSet(SOURCE)
    return [record_set.load(i, mask=True) for i in range(len(record_set))]


def run(suite, components, **options):
    suite.check_config(components.config)
    suite.check()
    return suite.run(components, batch_size=8, **options)


def oracle(records, *, shift=0.0, logits=None):
    """`locate` of a model that knows the truth of names; boxes moved by `shift` of their width, logits by presence."""
    by_image = {record["image"].tobytes(): record for record in records}
    rng = np.random.default_rng(0)

    def locate(components, images, phrases, *, batch_size):
        for image, names in zip(images, phrases, strict=True):
            record = by_image[image.tobytes()]
            shown = apply(image, preprocess=Preprocess(image_size=32))
            boxes, presence, masks = [], [], []
            for name in names:
                own = [i for i, entry in enumerate(record["boxes"]) if entry["name"] == name]
                box = np.array(record["boxes"][own[0]]["box"]) if own else np.array([0.0, 0.0, 0.1, 0.1])
                boxes.append(box + shift * np.array([box[2] - box[0], 0.0] * 2))
                presence.append((logits or (lambda there, rng: 3.0 if there else -3.0))(bool(own), rng))
                inside = np.isin(record["mask"], np.array(own) + 1) if own else np.zeros((32, 32), bool)
                masks.append(np.where(inside, 9.0, -9.0))
            yield LocatedImage(np.array(boxes), np.array(presence), np.array(masks), shown, (32, 32))

    return locate


def test_the_truth_gets_full_marks(components, records, monkeypatch):
    monkeypatch.setattr(grounding, "locate", oracle(records))
    result = run(PhraseGrounding(source=SOURCE, min_area=1), components)
    metrics = result.metrics
    for name in ("acc_at_50", "acc_at_75", "miou", "dice", "presence_auroc"):
        assert metrics[name] == pytest.approx(1), name
        assert metrics[f"{name}/ci95"] == pytest.approx([1, 1])
    assert metrics["false_found_rate_at_90"] == metrics["aurc_at_50"] * 0
    present = [{e["name"] for e in r["boxes"]} for r in records]
    absent = [set(r["labels_known"]) - p - set(r["labels"]) for r, p in zip(records, present, strict=True)]
    assert metrics["num_present"] == sum(map(len, present))
    assert metrics["num_absent"] == sum(map(len, absent))
    assert result.provenance["interval"]["unit"] == "patient"
    first = next(row for row in result.per_example if any(p["present"] for p in row["phrases"]))
    shown = next(p for p in first["phrases"] if p["present"])
    assert shown["iou"] == shown["dice"] == 1 and 0 < shown["p_value"] <= 1
    json.dumps(result.per_example)


@pytest.mark.parametrize("untrained", [("l1", "giou", "score"), ("bce", "dice")])
def test_what_was_not_trained_is_not_judged(components, records, monkeypatch, untrained):
    monkeypatch.setattr(grounding, "locate", oracle(records))
    config = dataclasses.replace(
        components.config, tasks={"find": Grounding(**dict.fromkeys(untrained, 0.0))}
    )
    result = run(PhraseGrounding(source=SOURCE, by="phrase"), dataclasses.replace(components, config=config))
    of_boxes, of_masks = {"acc_at_50", "acc_at_75", "miou", "aurc_at_50"}, {"dice", "instance_ap50"}
    there = {name.split("/")[0] for name in result.metrics}
    gone, kept = (of_boxes, of_masks) if "l1" in untrained else (of_masks, of_boxes)
    assert kept <= there and not gone & there and "presence_auroc" in there


def test_masks_of_another_resolution_are_brought_to_the_image():
    ids = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    np.testing.assert_array_equal(_of_size(ids, (4, 6)), ids.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(_of_size(ids.repeat(3, 0).repeat(3, 1), (2, 3)), ids)


def test_a_box_half_a_width_away_has_a_third(components, records, monkeypatch):
    monkeypatch.setattr(grounding, "locate", oracle(records, shift=0.5))
    one = [r for r in records if len(r["boxes"]) == 1]
    metrics = run(PhraseGrounding(source=SOURCE, by="modality"), components).metrics
    assert len(one) > 5 and metrics["acc_at_50"] < 0.3
    per_example = run(PhraseGrounding(source=SOURCE), components).per_example
    ids = {record["id"] for record in one}
    shown = [p for row in per_example if row["id"] in ids for p in row["phrases"] if p["present"]]
    np.testing.assert_allclose([p["iou"] for p in shown], 1 / 3, atol=1e-6)
    means = [v for k, v in metrics.items() if k.startswith("miou/") and not k.endswith("ci95")]
    assert len(means) == len({r["modality"] for r in records if r["boxes"]})
    assert min(means) <= metrics["miou"] <= max(means)


def test_calibration_is_of_one_half_and_judged_on_the_other(components, records, monkeypatch, tmp_path):
    """Logits without any meaning: at alpha 0.2 about a fifth of the absent ones of the other half is found."""
    source = dataclasses.replace(SOURCE, phantoms=dataclasses.replace(PHANTOMS, num_patients=100))
    more = RecordSet(source)
    known = [more.load(i, mask=True) for i in range(len(more))]
    monkeypatch.setattr(grounding, "locate", oracle(known, logits=lambda there, rng: float(rng.normal())))
    suite = PhraseGrounding(source=source, alpha=0.2)
    result = run(suite, components)
    calibration, total = result.calibration, result.metrics["num_absent"]
    assert 0.3 * total < len(calibration["negatives"]) < 0.7 * total
    assert calibration["negatives"] == sorted(calibration["negatives"])
    assert calibration["weights_hash"] == components.weights_hash()
    low, high = result.metrics["conformal_false_found_rate/ci95"]
    assert low - 0.05 < 0.2 < high + 0.05
    assert result.metrics["presence_auroc"] == pytest.approx(0.5, abs=0.1)

    everything = run(dataclasses.replace(suite, calibrate="all"), components)
    assert len(everything.calibration["negatives"]) == total
    assert "conformal_found_rate" not in everything.metrics
    assert run(dataclasses.replace(suite, calibrate="none"), components).calibration is None
    calibrated = dataclasses.replace(components, calibration=calibration)
    own = run(dataclasses.replace(suite, calibrate="none"), calibrated)
    assert own.calibration is None and "conformal_found_rate" not in own.metrics
    assert "these records made" in own.provenance["calibration"]
    others = dataclasses.replace(components, calibration={**calibration, "split_hash": "other"})
    own = run(dataclasses.replace(suite, calibrate="none"), others)
    assert own.calibration is None and "conformal_found_rate" in own.metrics
    few = run(dataclasses.replace(suite, alpha=0.001, calibrate="all"), components)
    assert few.calibration is None and "needs 999" in few.provenance["calibration"]

    evaluation = evaluate(components, {"regions_x/grounding": suite}, batch_size=8)
    folder = RunFolder(tmp_path / "run")
    write_eval(folder, evaluation)
    assert json.loads(folder.calibration.read_text())["split_hash"] == more.split_hash()


def test_the_mean_training_box_stands_beside_the_model(components, records, monkeypatch):
    monkeypatch.setattr(grounding, "locate", oracle(records))
    metrics = run(PhraseGrounding(source=SOURCE, baseline=SOURCE), components).metrics
    by_name = {}
    for record in records:
        for entry in record["boxes"]:
            by_name.setdefault(entry["name"], []).append(entry["box"])
    means = {name: np.mean(boxes, 0) for name, boxes in by_name.items()}
    expected = [
        max(
            float(grounding.nearest_iou(means[name], np.array([e["box"]])))
            for e in r["boxes"]
            if e["name"] == name
        )
        for r in records
        for name in dict.fromkeys(e["name"] for e in r["boxes"])
    ]
    assert metrics["mean_box_miou"] == pytest.approx(np.mean(expected))
    assert 0 < metrics["mean_box_miou"] < 0.9


def test_phrases_by_field_and_by_list():
    record_set = RecordSet(SOURCE)
    index = next(i for i in range(len(record_set)) if record_set.describe(i)["boxes"])
    record = record_set.describe(index)
    entry = record["boxes"][0]
    by_text = PhraseLists(record_set, {"texts": 1.0}, regions=Regions(), seed=0)
    there = [p for p in by_text.of(index) if p.present]
    assert any(p.text in entry["texts"] and 0 in p.members for p in there)
    assert [p.text for p in by_text.of(index)] == [p.text for p in by_text.of(index)]
    absent = [name for name in record["labels_known"] if name not in record["labels"]]
    listed = PhraseLists(record_set, (entry["name"], *absent, "liver"), regions=Regions(), seed=0)
    assert [(p.text, p.present) for p in listed.of(index)] == [
        (entry["name"], True),
        *((n, False) for n in absent),
    ]
    synonym = PhraseLists(record_set, (entry["texts"][-1],), regions=Regions(), seed=0)
    assert 0 in synonym.of(index)[0].members, "a text of the entry names it too"


def test_instances_by_counting_ids_equal_masks_by_pairs():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (9, 7))
    masks = rng.random((5, 9, 7)) < 0.4
    true = np.stack([ids == i for i in (1, 3)])
    np.testing.assert_allclose(instance_ious(masks, ids, [0, 2]), pairwise_mask_iou(masks, true))


@pytest.mark.parametrize(("shift", "ap50", "ap"), [(0.0, 1.0, 1.0), (0.25, 1.0, 0.3), (0.5, 0.0, 0.0)])
def test_average_precision_of_known_boxes(components, records, monkeypatch, shift, ap50, ap):
    """A box a quarter of its width away has an IoU of 0.6: right at three of the ten thresholds."""
    by_image = {record["image"].tobytes(): record for record in records}

    def detect(components, images, names, **options):
        out = []
        for image in images:
            entries = by_image[image.tobytes()]["boxes"][:1]
            boxes = np.array([e["box"] for e in entries]).reshape(-1, 4)
            moved = boxes + shift * np.stack([boxes[:, 2] - boxes[:, 0], np.zeros(len(boxes))] * 2, axis=1)
            out.append(Detections(moved, [e["name"] for e in entries], np.ones(len(entries))))
        return out

    monkeypatch.setattr(detection, "detect", detect)
    monkeypatch.setattr(detection._Image, "of", _first_only(detection._Image.of))
    result = run(ObjectDetection(source=SOURCE), components)
    assert result.metrics["ap50"] == pytest.approx(ap50)
    assert result.metrics["map"] == pytest.approx(ap, abs=0.02)
    names = result.provenance["names"]
    assert {f"ap50/{name}" for name in names} <= result.metrics.keys()


def _first_only(of):
    def first(picture, detected, names):
        return of(
            dataclasses.replace(picture, entries=picture.entries[:1], boxes=picture.boxes[:1]),
            detected,
            names,
        )

    return first


class Written:
    """`describe` of a model that says what `say` makes of (entry-like prompt, length asked)."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def __call__(self, components, encoded, prompts, *, controls, **options):
        asked = controls["length"] or [[None] * len(some) for some in prompts]
        self.asked += [n for some in asked for n in some]
        return [
            [[Candidate(self.say(p, n), 0.0, 0.0, ())] for p, n in zip(some, own, strict=True)]
            for some, own in zip(prompts, asked, strict=True)
        ]


def left_right_source():
    """Two things a picture, whose box tells name and side: wide ones are "cyst", others "stone"."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(12):
        entries = []
        for side, x in (("left", 0.1), ("right", 0.6)):
            name, width = (("cyst", 0.3), ("stone", 0.1))[rng.integers(2)]
            box = [x, 0.3, x + width, 0.5]
            entries.append({"box": box, "name": name, "site": f"{name} on the {side} side"})
        records.append({"id": str(i), "image": f"image {i}", "boxes": entries})
    images = rng.integers(0, 255, (12, 32, 32, 3), np.uint8)
    return Source(arrays=Arrays.holding(images, records), split=None, name="sides"), records


def truth(prompt, asked):
    x0, _, x1, _ = prompt["box"]
    name, side = "cyst" if x1 - x0 > 0.2 else "stone", "left" if x0 + x1 < 1 else "right"
    return f"{name} on the {side} side"


SIDES = {"side": ("left", "right")}


@pytest.mark.parametrize("mirrored", [False, True])
def test_true_descriptions_get_full_marks_also_in_the_mirror(components, monkeypatch, mirrored):
    source, records = left_right_source()
    monkeypatch.setattr(describing, "describe_regions", Written(truth))
    suite = RegionDescriptions(source=source, text="site", mirrored=mirrored, word_groups=SIDES, jitter=0.1)
    result = run(suite, components)
    for name in (
        "name_accuracy",
        "name_balanced_accuracy",
        "word_accuracy/side",
        "word_stated/side",
        "rouge_l",
    ):
        assert result.metrics[name] == 1, name
    box, true = (result.per_example[0]["regions"][0][k] for k in ("box", "true_box"))
    x0, _, x1, _ = records[0]["boxes"][0]["box"]
    np.testing.assert_allclose([true[0], true[2]], [1 - x1, 1 - x0] if mirrored else [x0, x1])
    assert 0 < np.abs(np.subtract(box, true)).max() <= 0.1 * 0.3 + 1e-6


def test_wrong_names_sides_and_lengths_cost_what_they_should(components, monkeypatch):
    source, records = left_right_source()
    write = Written(lambda prompt, asked: "stone on the left" + " side" * (asked == 5))
    monkeypatch.setattr(describing, "describe_regions", write)
    metrics = run(
        RegionDescriptions(source=source, text="site", word_groups=SIDES, length="reference"), components
    ).metrics
    names = [entry["name"] for record in records for entry in record["boxes"]]
    assert metrics["name_accuracy"] == pytest.approx(np.mean([name == "stone" for name in names]))
    assert metrics["name_stated"] == metrics["name_accuracy"]
    assert metrics["name_balanced_accuracy"] == 0.5
    assert (metrics["recall/stone"], metrics["recall/cyst"]) == (1, 0)
    assert metrics["word_accuracy/side"] == 0.5 and metrics["word_stated/side"] == 1
    assert set(write.asked) == {5} and metrics["length_exact"] == 1
    asked = run(RegionDescriptions(source=source, length=6, name_words={"cyst": ("stone",)}), components)
    assert (asked.metrics["length_exact"], asked.metrics["length_within_1"]) == (0, 0)
    assert asked.metrics["name_stated"] == 1, "what also says cyst"
    assert asked.metrics["name_accuracy"] == asked.metrics["recall/cyst"] * np.mean(
        [n == "cyst" for n in names]
    ) + (asked.metrics["recall/stone"] * np.mean([n == "stone" for n in names]))


def test_the_first_name_is_the_answer(components, monkeypatch):
    source, records = left_right_source()
    monkeypatch.setattr(describing, "describe_regions", Written(lambda prompt, asked: "a cyst or a stone"))
    metrics = run(RegionDescriptions(source=source, text="site"), components).metrics
    names = [entry["name"] for record in records for entry in record["boxes"]]
    assert metrics["name_accuracy"] == pytest.approx(np.mean([name == "cyst" for name in names]))
    assert metrics["name_stated"] == 1 and metrics["name_balanced_accuracy"] == 0.5


def test_words_are_mirrored_whole_and_in_their_case():
    swap = {"left": "right", "right": "left"}
    entry = {"texts": ["Left lung, left-sided; LEFT. Leftover bright"], "box": [0, 0, 1, 1]}
    assert describing._swapped(entry, swap) == {
        "texts": ["Right lung, right-sided; RIGHT. Leftover bright"],
        "box": [0, 0, 1, 1],
    }


def test_the_first_and_longest_name_counts():
    spoken = {n: {tuple(n.split())} for n in ("cell", "red cell", "white cell")}
    assert first_name("a red cell beside a white cell".split(), spoken) == "red cell"
    assert first_name("cell not a white cell".split(), spoken) == "cell"
    assert first_name("redcell".split(), spoken) is None


def test_points_lie_on_the_mask(components, records, monkeypatch):
    pointed = []
    monkeypatch.setattr(
        describing, "describe_regions", Written(lambda prompt, asked: pointed.append(prompt) or "x")
    )
    result = run(RegionDescriptions(source=SOURCE, kind="point", jitter=0.4), components)
    by_id = {record["id"]: record for record in records}
    for row in result.per_example:
        for region in row["regions"]:
            x, y = (int(v * 32) for v in region["point"])
            record = by_id[row["id"]]
            names = [e["name"] for e in record["boxes"] if e["box"] == pytest.approx(region["true_box"])]
            assert record["mask"][y, x] > 0 and region["name"] in names
    assert len(pointed) == result.metrics["num_regions"]
    masks = run(RegionDescriptions(source=SOURCE, kind="mask", max_images=4, max_regions=1), components)
    assert (
        pointed[-1]["mask"].dtype == bool and masks.metrics["num_regions"] == masks.metrics["num_images"] == 4
    )


def test_dense_captions_need_place_and_words(components, monkeypatch):
    source, records = left_right_source()
    boxes = np.array([[e["box"] for e in record["boxes"]] for record in records])

    def detect(components, images, names, **options):
        assert names == ["cyst", "stone"]
        return [Detections(own, ["x"] * 2, np.array([0.9, 0.8])) for own in boxes]

    monkeypatch.setattr(describing, "detect", detect)
    suite = RegionDescriptions(source=source, text="site", dense=True)
    monkeypatch.setattr(describing, "describe_regions", Written(truth))
    assert run(suite, components).metrics["dense_caption_map"] == pytest.approx(1)
    monkeypatch.setattr(describing, "describe_regions", Written(lambda prompt, asked: "nothing"))
    # Of the six thresholds of words the first is 0.
    assert run(suite, components).metrics["dense_caption_map"] == pytest.approx(1 / 6)
    # Boxes that are not among those to describe are there to be found all the same.
    monkeypatch.setattr(describing, "describe_regions", Written(truth))
    fewer = dataclasses.replace(suite, max_regions=1)
    assert run(fewer, components).metrics["dense_caption_map"] == pytest.approx(1)


@pytest.mark.parametrize(("sign", "hit"), [(1.0, 1.0), (-1.0, 0.0)])
def test_heat_maps_point_or_not(components, records, monkeypatch, sign, hit):
    by_image = {record["image"].tobytes(): record for record in records}

    def heat_maps(components, images, phrases, **options):
        rng = np.random.default_rng(0)
        out = []
        for image, names in zip(images, phrases, strict=True):
            entries = by_image[image.tobytes()]["boxes"]
            insides = [
                inside_boxes(np.array([e["box"] for e in entries if e["name"] == n]), (32, 32)) for n in names
            ]
            out.append(np.stack([sign * (x + 0.1 * rng.random((32, 32))) for x in insides]))
        return out

    monkeypatch.setattr(heat_maps_suite, "heat_maps", heat_maps)
    metrics = run(HeatMapPointing(source=SOURCE), components).metrics
    assert metrics["pointing_game"] == hit
    assert metrics["pointing_game/chance"] == metrics["area_share"] and 0 < metrics["area_share"] < 0.5
    assert metrics["cnr"] > 5 and metrics["cnr_signed"] == pytest.approx(sign * metrics["cnr"])


def test_an_untrained_model_end_to_end(components, tmp_path):
    suites = {
        "regions_p/grounding": PhraseGrounding(source=SOURCE, max_images=8, phrases="texts"),
        "regions_p/detection": ObjectDetection(source=SOURCE, max_images=8),
        "regions_p/describe": RegionDescriptions(
            source=SOURCE, max_images=8, max_regions=2, length="reference", dense=True, max_length=4
        ),
        "regions_p/pointing": HeatMapPointing(source=SOURCE, max_images=8),
    }
    for suite in suites.values():
        suite.check_config(components.config)
        suite.check()
    evaluation = evaluate(components, suites, batch_size=8)
    metrics = write_eval(RunFolder(tmp_path / "run"), evaluation)
    assert 0 <= metrics["regions_p/grounding/miou"] <= 1 and 0 <= metrics["regions_p/grounding/dice"] <= 1
    assert "regions_p/grounding/instance_ap50" in metrics
    assert 0 <= metrics["regions_p/detection/map"] <= metrics["regions_p/detection/ap50"] <= 1
    assert (
        0 <= metrics["regions_p/describe/length_exact"] <= metrics["regions_p/describe/length_within_1"] <= 1
    )
    assert {"name_balanced_accuracy", "rouge_l", "dense_caption_map"} <= {n.split("/")[-1] for n in metrics}
    assert 0 <= metrics["regions_p/pointing/pointing_game"] <= 1
    rows = evaluation.per_example["regions_p/grounding"]
    assert len(rows) <= 8 and all(len(p["box"]) == 4 for row in rows for p in row["phrases"])
    assert evaluation.provenance["regions_p/detection"]["num_evaluated"] == 8


def test_what_cannot_be_evaluated_says_why(components):
    with pytest.raises(ConfigError, match="no task of type Grounding"):
        PhraseGrounding(source=SOURCE).check_config(tiny_components().config)
    with pytest.raises(ConfigError, match="calibrate"):
        PhraseGrounding(source=SOURCE, calibrate="some")
    with pytest.raises(ConfigError, match="phrases"):
        PhraseGrounding(source=SOURCE, phrases=("",))
    with pytest.raises(DataError, match="no box has the name 'liver'"):
        run(ObjectDetection(source=SOURCE, names=("liver",)), components)
    with pytest.raises(DataError, match="no record shows one of the phrases"):
        run(PhraseGrounding(source=SOURCE, phrases=("liver",)), components)


def test_a_folder_with_boxes_gets_the_suites_of_the_tasks(components, tmp_path):
    write_phantoms(tmp_path / "p", PHANTOMS, 24)
    suites = suites_for(tmp_path / "p", config=components.config)
    regions = [name for name in suites if name.startswith("regions")]
    assert regions == [f"regions_p/{part}" for part in ("describe", "grounding", "detection", "pointing")]
    describe = suites["regions_p/describe"]
    assert describe.length == "reference" and suites["regions_p/grounding"].calibrate == "none"
    assert (
        suites_for(tmp_path / "p", config=components.config, calibrate=True)["regions_p/grounding"].calibrate
        == "all"
    )
    asked = suites_for(
        tmp_path / "p", config=components.config, captions={"max_images": 3, "beams": 2, "length": 4}
    )
    assert {suite.max_images for name, suite in asked.items() if name.startswith("regions")} == {3}
    assert (asked["regions_p/describe"].beams, asked["regions_p/describe"].length) == (2, 4)
    trained = Source(root=str(tmp_path / "p"), text={"caption": 0.5, "impression": 0.5})
    seen = dataclasses.replace(
        components.config,
        tasks={"region_caption": RegionCaption(), "grounding": Grounding()},
        data=dataclasses.replace(components.config.data, train=(trained,)),
    )
    assert (
        suites_for(tmp_path / "p", config=seen, captions={"guidance": 2.0})["regions_p/describe"].guidance
        == 2
    )
    with pytest.raises(ConfigError, match="no task of type Caption"):
        suites_for(tmp_path / "p", config=seen, captions={"lexicon": "phantoms"})
    with pytest.raises(ConfigError, match="may have been trained on these records"):
        suites_for(tmp_path / "p", config=seen, split="train", calibrate=True)
    plain = tiny_components().config
    assert "regions_p/grounding" not in suites_for(tmp_path / "p", config=plain)
    with pytest.raises(ConfigError, match="no task of type Grounding"):
        suites_for(tmp_path / "p", config=plain, calibrate=True)
    sided = dataclasses.replace(
        components.config,
        data=dataclasses.replace(components.config.data, regions=Regions(text="texts")),
    )
    assert suites_for(tmp_path / "p", config=sided)["regions_p/describe"].word_groups == {
        "side": ("left", "right")
    }


def test_what_is_not_boxed_is_absent_where_training_said_so(components, tmp_path):
    _, records = left_right_source()
    for i, record in enumerate(records):
        record |= {"image": f"{i}.png", "boxes": record["boxes"][:1]}
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / record["image"])
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match="nothing is known to be absent"):
        suites_for(tmp_path, config=components.config, name="x", calibrate=True)
    trained = Source(root=str(tmp_path), text={"caption": 0.5, "impression": 0.5}, boxes_complete=True)
    config = dataclasses.replace(
        components.config, data=dataclasses.replace(components.config.data, train=(trained,))
    )
    suite = suites_for(tmp_path, config=config, name="x", split="val", calibrate=True)["regions_x/grounding"]
    assert suite.source.boxes_complete and suite.opened().complete_names() == ("cyst", "stone")

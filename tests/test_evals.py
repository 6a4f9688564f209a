"""Evaluation suites: values against direct computation, provenance, and bad input."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.optimize
from PIL import Image
from tiny_model import PHANTOMS, tiny_components

from bvl import config as config_lib
from bvl.data.phantoms import FINDING_PROMPTS, FINDINGS, MODALITY_PROMPTS
from bvl.data.sources import RecordSet, Source
from bvl.errors import ConfigError, DataError
from bvl.evals import probe
from bvl.evals.base import evaluate, write_eval
from bvl.evals.classification import WeightedAuroc
from bvl.evals.folder import suites_for
from bvl.evals.probe import LinearProbe
from bvl.evals.retrieval import Retrieval
from bvl.evals.supervised import Supervised
from bvl.evals.zeroshot import ZeroShot
from bvl.metrics.bootstrap import bootstrap_interval, bootstrap_mean
from bvl.metrics.classification import auroc, balanced_accuracy, macro_auroc, one_hot
from bvl.runs import RunFolder
from bvl.tasks import classify, contrastive

ALL = Source(phantoms=PHANTOMS, split=None)
CLASSES = tuple(FINDING_PROMPTS)


@pytest.fixture(scope="module")
def components():
    return tiny_components(classes=CLASSES, multi_label=True)


@pytest.fixture(scope="module")
def records():
    record_set = RecordSet(ALL)
    return [record_set.load(i) for i in range(len(record_set))]


def run(suite, components, **options):
    suite.check()
    return suite.run(components, batch_size=16, **options)


def write_folder(path, records, size=(40, 32)):
    """A records.jsonl folder with a picture of its own for every image that a record names."""
    path.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        if record.get("image") and not (path / record["image"]).exists():
            pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(path / record["image"])
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def labelled(n, **fields):
    return [
        {"id": f"r{i}", "image": f"{i}.png", "labels": [["Cat", "big_Dog"][i % 2]], **fields}
        for i in range(n)
    ]


def test_zeroshot_single_label_equals_direct_computation(components, records):
    result = run(ZeroShot(source=ALL, by="modality", prompts=MODALITY_PROMPTS), components)
    names = list(MODALITY_PROMPTS)
    probabilities = contrastive.classify(
        components, [r["image"] for r in records], [list(p) for p in MODALITY_PROMPTS.values()], batch_size=16
    )
    truth = np.array([names.index(r["modality"]) for r in records])
    predicted, groups = probabilities.argmax(1), [r["patient_id"] for r in records]
    metrics = result.metrics
    assert metrics["num_images"] == len(records)
    assert metrics["accuracy"] == pytest.approx(np.mean(predicted == truth))
    assert 0 < metrics["accuracy"] < 1
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy(predicted, truth))
    targets = one_hot(truth, len(names))
    assert metrics["auroc_macro"] == pytest.approx(macro_auroc(probabilities, targets).value)
    for c, name in enumerate(names):
        assert metrics[f"recall/{name}"] == pytest.approx(np.mean(predicted[truth == c] == c))
    by_patient = bootstrap_mean((predicted == truth).astype(float), groups)
    assert metrics["accuracy/ci95"] == pytest.approx([by_patient.low, by_patient.high])
    expected = bootstrap_interval(lambda rows: macro_auroc(probabilities[rows], targets[rows]).value, groups)
    assert metrics["auroc_macro/ci95"] == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert [e["predicted"] for e in result.per_example] == [names[c] for c in predicted]
    assert [e["id"] for e in result.per_example] == [r["id"] for r in records]


def test_zeroshot_multi_label_counts_only_known_labels(components, records):
    result = run(ZeroShot(source=ALL, prompts=FINDING_PROMPTS, multi_label=True), components)
    modality, findings = next(iter(FINDINGS.items()))
    name = findings[0]
    image = contrastive.embed_images(components, [r["image"] for r in records])
    positive, negative = contrastive.embed_prompts(components, list(FINDING_PROMPTS[name].values()))
    scores, truth = image @ (positive - negative), np.array([name in r["labels"] for r in records])
    looked_for = np.array([r["modality"] == modality for r in records])
    assert truth[looked_for].any() and not truth[~looked_for].any()
    assert result.metrics[f"auroc/{name}"] == pytest.approx(auroc(scores[looked_for], truth[looked_for]))
    assert result.metrics[f"auroc/{name}"] != pytest.approx(auroc(scores, truth))
    areas = [v for k, v in result.metrics.items() if k.startswith("auroc/")]
    assert result.metrics["auroc_macro"] == pytest.approx(np.mean(areas))
    assert result.metrics["num_classes"] == len(areas)
    low, high = result.metrics["auroc_macro/ci95"]
    assert low < result.metrics["auroc_macro"] < high
    assert set(result.provenance["undefined"]) == {
        f"auroc/{c}" for c in CLASSES if f"auroc/{c}" not in result.metrics
    }


def test_weighted_auroc_equals_auroc_of_repeated_rows():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(1, 25))
        scores = rng.integers(0, 5, (n, 3)).astype(float)
        labels, valid = rng.random((n, 3)) < 0.4, rng.random((n, 3)) < 0.8
        rows = rng.integers(0, n, n)
        expected = [auroc(scores[rows, c][valid[rows, c]], labels[rows, c][valid[rows, c]]) for c in range(3)]
        found = WeightedAuroc(scores, labels, valid)(np.bincount(rows, minlength=n))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_provenance_stands_beside_the_numbers(components):
    result = run(ZeroShot(source=ALL, by="modality", prompts=MODALITY_PROMPTS), components)
    record_set, beside = RecordSet(ALL), result.provenance
    assert beside["prompts"] == {name: list(p) for name, p in MODALITY_PROMPTS.items()}
    assert beside["split_hash"] == record_set.split_hash()
    assert beside["weights_hash"] == components.weights_hash()
    assert beside["preprocess"] == components.preprocess.to_dict()
    assert beside["step"] == 7
    assert beside["interval"]["unit"] == "patient"
    assert beside["interval"]["num_groups"] == PHANTOMS.num_patients
    json.dumps(beside, allow_nan=False)
    json.dumps(result.per_example, allow_nan=False)


def test_same_model_same_result(components):
    suite = ZeroShot(source=ALL, by="modality", prompts=MODALITY_PROMPTS)
    assert run(suite, components) == run(dataclasses.replace(suite), components, cache={})


def test_classes_are_named_by_prompt_field_then_by_label(tmp_path, components):
    records = labelled(6)
    for record in records[::2]:
        record["class_prompt"] = "a photo of a cat" if record["id"] != "r4" else "a cat"
    suite = ZeroShot(
        source=Source(root=write_folder(tmp_path / "a", records), split=None), templates=("one {}", "{}")
    )
    assert suite.class_prompts() == {
        "Cat": ("a cat", "a photo of a cat"),
        "big_Dog": ("one big dog", "big dog"),
    }
    result = run(suite, components)
    assert result.provenance["interval"]["unit"] == "image"
    several = dataclasses.replace(suite, multi_label=True)
    assert several.class_prompts()["big_Dog"] == {
        "positive": ("one big dog", "big dog"),
        "negative": ("one no big dog", "no big dog"),
    }
    assert run(several, components).metrics["num_classes"] == 2


def test_positive_prompts_alone_are_enough_for_an_area(components, records):
    name = FINDINGS["chest radiograph"][0]
    result = run(ZeroShot(source=ALL, prompts={name: ("a spot",)}, multi_label=True), components)
    rows = [r for r in records if r["modality"] == "chest radiograph"]
    scores = contrastive.embed_images(components, [r["image"] for r in rows])
    scores = scores @ contrastive.embed_texts(components, ["a spot"])[0]
    assert result.metrics["auroc_macro"] == pytest.approx(auroc(scores, [name in r["labels"] for r in rows]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": {"Cat": ("a cat",), "Dog": ("a dog",)}}, r"'big_Dog' \(3 records\); there are Cat, Dog"),
        ({"by": "organ"}, "the field 'organ' .*; fields that records have: .*labels"),
        ({"by": "boxes"}, "boxes is a list; classes need a string"),
        ({"by": "organ", "multi_label": True}, "the field 'organ'"),
        ({"multi_label": True, "prompts": {"Fish": ("a fish",)}}, "Fish none has records with and without"),
        ({"by": "site"}, "every record has the same 'site', 'left'"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(tmp_path, options, message):
    boxes = [{"box": [0, 0, 1, 1], "name": "all"}]
    root = write_folder(tmp_path / "a", labelled(6, boxes=boxes, site="left"))
    suite = ZeroShot(source=Source(root=root, split=None), **options)
    with pytest.raises(DataError, match=message):
        suite.check()


def test_templates_may_hold_other_braces(tmp_path):
    source = Source(root=write_folder(tmp_path / "a", labelled(2)), split=None)
    prompts = ZeroShot(source=source, templates=("{x} {}",)).class_prompts()
    assert prompts == {"Cat": ("{x} cat",), "big_Dog": ("{x} big dog",)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ("a photo",)}, "needs '{}'"),
        ({"prompts": {"a": ("x",)}}, "at least two"),
        ({"prompts": {"a": ("x",), "b": ()}}, r"prompts\['b'\].*one or more texts"),
        ({"prompts": {"a": "x", "b": "y"}}, r"write \('x',\)"),
        ({"prompts": {"a": {"positive": ("x",), "negative": ("y",)}, "b": ("z",)}}, "for multi_label=True"),
        (
            {"multi_label": True, "prompts": {"a": {"positive": ("x",)}}},
            "'positive' and 'negative', not positive",
        ),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ZeroShot(source=ALL, **options)


def test_several_labels_need_multi_label(tmp_path):
    records = labelled(4)
    records[2]["labels"] = ["Cat", "big_Dog"]
    suite = ZeroShot(source=Source(root=write_folder(tmp_path / "a", records), split=None))
    with pytest.raises(DataError, match="'r2': labels is .*set multi_label=True"):
        suite.check()


def test_retrieval_knows_equal_texts_and_texts_of_one_image(tmp_path, components):
    texts = ["a nodule", "no nodule", "A  Nodule", "two cysts", "a stone"]
    images = ["0.png", "1.png", "2.png", "0.png", "4.png"]
    records = [
        {"id": f"r{i}", "image": image, "caption": text, "patient_id": f"p{i % 3}"}
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    records += [{"id": "text only", "caption": "x"}, {"id": "image only", "image": "6.png"}]
    root = write_folder(tmp_path / "a", records)
    result = run(Retrieval(source=Source(root=root, split=None)), components)
    assert result.provenance["left_out"] == {"without image": 1, "without text": 1}
    metrics = result.metrics
    assert (metrics["num_images"], metrics["num_texts"], metrics["num_distinct_texts"]) == (4, 5, 4)
    image = contrastive.embed_images(components, [f"{root}/{n}.png" for n in (0, 1, 2, 4)])
    text = contrastive.embed_texts(components, texts)
    # rows: images 0, 1, 2, 4; columns: the texts. Image 0 has texts 0 and 3; texts 0 and 2 are equal.
    positive = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], bool)
    scores = (image @ text.T).astype(np.float64)
    for name, s, right in (("i2t", scores, positive), ("t2i", scores.T, positive.T)):
        best = np.where(right, s, -2).max(1, keepdims=True)
        rank = ((s >= best - 1e-6) & ~right).sum(1)
        assert metrics[f"{name}_r1"] == pytest.approx(np.mean(rank < 1)), name
        assert metrics[f"{name}_r1/chance"] == pytest.approx(np.mean(right.sum(1) / right.shape[1]))
        assert metrics[f"{name}_r10"] == 1.0
        low, high = metrics[f"{name}_r1/ci95"]
        assert low <= metrics[f"{name}_r1"] <= high
    assert [e["id"] for e in result.per_example] == ["r0", "r3", "r1", "r2", "r4"]


def test_retrieval_with_all_texts_of_a_record(tmp_path, components):
    records = [
        {"id": "a", "image": "0.png", "caption": "a nodule", "alt_text": "one spot"},
        {"id": "b", "image": "1.png", "caption": "no nodule", "alt_text": "A nodule"},
        {"id": "c", "image": "2.png", "caption": "two cysts", "alt_text": "two  cysts"},
    ]
    root = write_folder(tmp_path / "a", records)
    source = Source(root=root, split=None, text={"alt_text": 0.2, "caption": 0.8})
    every = run(Retrieval(source=source, texts_per_image=None), components)
    texts = ["a nodule", "one spot", "no nodule", "A nodule", "two cysts"]
    assert [e["text"] for e in every.per_example] == texts
    metrics = every.metrics
    assert (metrics["num_images"], metrics["num_texts"], metrics["num_distinct_texts"]) == (3, 5, 4)
    assert every.provenance["num_evaluated"] == 3 and every.provenance["texts_per_image"] is None
    # Both texts "a nodule" are right for images 0 and 1, each of which has one more.
    positive = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    image = contrastive.embed_images(components, [f"{root}/{n}.png" for n in range(3)])
    scores = (image @ contrastive.embed_texts(components, texts).T).astype(np.float64)
    for name, s, right in (("i2t", scores, positive), ("t2i", scores.T, positive.T)):
        best = np.where(right, s, -2).max(1, keepdims=True)
        assert metrics[f"{name}_r1"] == pytest.approx(np.mean(((s >= best - 1e-6) & ~right).sum(1) < 1))
        assert metrics[f"{name}_r1/chance"] == pytest.approx(np.mean(right.sum(1) / right.shape[1]))
    one = run(Retrieval(source=source), components)
    assert [e["text"] for e in one.per_example] == ["a nodule", "no nodule", "two cysts"]
    two = run(Retrieval(source=source, texts_per_image=2), components)
    assert two.per_example == every.per_example
    with pytest.raises(ConfigError, match="texts_per_image=0"):
        Retrieval(source=source, texts_per_image=0)


def test_retrieval_takes_a_fixed_sample(components):
    suite = Retrieval(source=ALL, max_images=20)
    first, second = run(suite, components), run(dataclasses.replace(suite), components)
    assert first == second
    assert first.metrics["num_images"] == 20
    assert first.provenance["left_out"] == {"beyond max_images": len(RecordSet(ALL)) - 20}
    other = run(dataclasses.replace(suite, seed=1), components)
    assert {e["id"] for e in other.per_example} != {e["id"] for e in first.per_example}
    impression = run(dataclasses.replace(suite, text="impression"), components)
    assert impression.per_example[0]["text"] != first.per_example[0]["text"]


def test_retrieval_without_texts_is_refused(tmp_path):
    source = Source(root=write_folder(tmp_path / "a", labelled(4)), split=None)
    with pytest.raises(DataError, match="0 records have an image and the text 'caption'.*labels"):
        Retrieval(source=source).check()
    source = Source(root=write_folder(tmp_path / "b", labelled(4, caption="same")), split=None)
    with pytest.raises(DataError, match="all texts are equal"):
        Retrieval(source=source).check()
    with pytest.raises(DataError, match="(?s)suite Retrieval: .*hold out more records.*eval.suites={}"):
        Retrieval(source=source).check()
    with pytest.raises(ConfigError, match="max_images=1"):
        Retrieval(source=source, max_images=1)


def test_unreadable_images_are_left_out_and_named(tmp_path, components):
    root = write_folder(tmp_path / "a", labelled(6))
    (tmp_path / "a" / "2.png").write_bytes(b"no picture")
    result = run(ZeroShot(source=Source(root=root, split=None)), components)
    assert result.metrics["num_images"] == 5
    assert [e["id"] for e in result.provenance["unreadable"]] == ["r2"]
    assert [e["id"] for e in result.per_example] == ["r0", "r1", "r3", "r4", "r5"]
    with_head = tiny_components(classes=("Cat", "big_Dog"))
    by_head = run(Supervised(source=Source(root=root, split=None)), with_head)
    assert [e["id"] for e in by_head.provenance["unreadable"]] == ["r2"]
    assert [e["id"] for e in by_head.per_example] == [e["id"] for e in result.per_example]
    for file in (tmp_path / "a").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of its 6 images can be read"):
        run(ZeroShot(source=Source(root=root, split=None)), components)


@pytest.mark.parametrize("multi_label", [False, True])
def test_logistic_regression_finds_the_optimum(multi_label):
    rng = np.random.default_rng(0)
    x, l2 = rng.normal(size=(40, 3)), 0.05
    labels = one_hot(rng.integers(0, 3, 40), 3)
    valid = rng.random((40, 3)) < 0.7 if multi_label else np.ones((40, 3), bool)
    found = probe.fit_logistic(x, labels, valid, l2=l2, multi_label=multi_label)

    def objective(flat):
        weights = flat.reshape(4, 3)
        loss = probe.log_loss(x, labels, valid, weights, multi_label=multi_label)
        return loss + 0.5 * l2 * np.sum(weights[:3] ** 2)

    # Independent of the gradient under test: differences only.
    slope = scipy.optimize.approx_fprime(found.ravel(), objective, 1e-6)
    assert np.abs(slope).max() < 2e-4
    logits = x @ found[:3] + found[3]
    if multi_label:
        likelihood = np.where(labels, 1, -1) * logits
        direct = np.mean(np.log1p(np.exp(-likelihood))[valid])
    else:
        direct = -np.mean((logits - np.log(np.exp(logits).sum(1, keepdims=True)))[labels])
    assert probe.log_loss(x, labels, valid, found, multi_label=multi_label) == pytest.approx(direct)


def test_linear_probe_reads_modality_from_random_features(components):
    train, test = (Source(phantoms=PHANTOMS, split=split) for split in ("train", "test"))
    suite = LinearProbe(train=train, test=test, by="modality", l2=(1e-3, 1e3))
    result = run(suite, components)
    assert result.metrics["accuracy"] > 0.6
    assert result.provenance["l2"] == 1e-3
    assert result.provenance["train"]["num_groups_also_in_test"] == 0
    assert result.metrics["num_train_images"] == len(RecordSet(train))
    assert result.metrics["num_images"] == len(RecordSet(test))
    smaller = run(dataclasses.replace(suite, max_train=12), components)
    assert smaller.metrics["num_train_images"] == 12
    leaking = run(dataclasses.replace(suite, test=train), components)
    assert leaking.provenance["train"]["num_groups_also_in_test"] > 0


def test_linear_probe_refuses_what_cannot_be_fitted(tmp_path):
    one_patient = write_folder(tmp_path / "a", labelled(4, patient_id="p"))
    fine = write_folder(tmp_path / "b", labelled(4))
    other = write_folder(tmp_path / "c", [{**r, "labels": ["Fish"]} for r in labelled(4)])
    a, b, c = (Source(root=root, split=None) for root in (one_patient, fine, other))
    with pytest.raises(DataError, match="all images belong to one group"):
        LinearProbe(train=a, test=b).check()
    with pytest.raises(DataError, match="'Fish' \\(4 records\\)"):
        LinearProbe(train=b, test=c).check()
    with pytest.raises(ConfigError, match="l2"):
        LinearProbe(train=b, test=b, l2=())


def test_supervised_reads_the_trained_head(components, records):
    result = run(Supervised(source=ALL), components)
    encoded = components.encode_images([r["image"] for r in records], frozenset({"pooled"}), 16)
    scores = classify.predict(components, np.concatenate([f.pooled for f in encoded]), "classify")
    labels = np.array([[c in r["labels"] for c in CLASSES] for r in records])
    valid = np.array([[c in FINDINGS[r["modality"]] for c in CLASSES] for r in records])
    assert result.metrics["auroc_macro"] == pytest.approx(macro_auroc(scores, labels, valid).value)
    with pytest.raises(ConfigError, match="no task 'other'"):
        run(Supervised(source=ALL, task="other"), components)


def test_supervised_leaves_out_classes_that_the_head_does_not_know(tmp_path):
    records = labelled(6)
    records[3]["labels"] = ["Fish"]
    components = tiny_components(classes=("Cat", "big_Dog"))
    result = run(
        Supervised(source=Source(root=write_folder(tmp_path / "a", records), split=None)), components
    )
    assert result.provenance["left_out"] == {"with labels 'Fish', which is no class": 1}
    assert result.metrics["num_images"] == 5
    assert result.metrics["accuracy"] == np.mean([e["predicted"] == e["labels"] for e in result.per_example])


def test_images_are_decoded_once_for_all_suites(components, monkeypatch):
    loads = []
    load = RecordSet.load
    monkeypatch.setattr(RecordSet, "load", lambda self, i, **kw: loads.append(i) or load(self, i, **kw))
    suites = {
        "retrieval_x": Retrieval(source=dataclasses.replace(ALL, text="captions"), max_images=20),
        "zeroshot_x": ZeroShot(source=ALL, by="modality", prompts=MODALITY_PROMPTS),
    }
    evaluate(components, suites, batch_size=16)
    assert sorted(loads) == list(range(len(RecordSet(ALL))))
    loads.clear()
    heads = {"probe": LinearProbe(train=ALL, test=ALL, by="modality", l2=(1.0,))}
    evaluate(components, heads | {"head": Supervised(source=ALL)}, batch_size=16)
    assert sorted(loads) == list(range(len(RecordSet(ALL))))


def test_results_are_written_without_touching_those_of_the_training(tmp_path, components):
    run_folder = RunFolder(tmp_path)
    evaluation = evaluate(components, {"retrieval_x": Retrieval(source=ALL, max_images=20)}, batch_size=16)
    metrics = write_eval(run_folder, evaluation)
    written = json.loads(run_folder.eval.read_text())
    assert written["retrieval_x/provenance"]["split_hash"] == RecordSet(ALL).split_hash()
    assert {k: v for k, v in written.items() if not k.endswith("/provenance")} == metrics
    assert len((run_folder.predictions / "retrieval_x.jsonl").read_text().splitlines()) == 20
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write_eval(run_folder, evaluation, name="other")
    assert json.loads((run_folder.evals / "other.json").read_text()) == written
    assert (run_folder.predictions / "other.retrieval_x.jsonl").is_file()
    assert all(p.read_bytes() == content for p, content in before.items())
    with pytest.raises(ConfigError, match="file name"):
        write_eval(run_folder, evaluation, name="../x")


def test_an_undefined_metric_is_absent_and_the_file_stays_json(tmp_path, components):
    records = [
        {**r, "labels": ["Cat"] if i else ["big_Dog"]} for i, r in enumerate(labelled(4, patient_id="p"))
    ]
    suite = ZeroShot(
        source=Source(root=write_folder(tmp_path / "a", records), split=None),
        prompts={"Cat": ("a cat",), "big_Dog": ("a dog",), "Fish": ("a fish",)},
    )
    evaluation = evaluate(components, {"z": suite})
    assert evaluation.provenance["z"]["undefined"] == ["recall/Fish"]
    # One patient shows no spread, so there is no interval.
    assert not any(key.endswith("/ci95") for key in evaluation.metrics)
    write_eval(RunFolder(tmp_path / "run"), evaluation)


def test_errors_name_the_suite(tmp_path, components):
    source = Source(root=write_folder(tmp_path / "a", labelled(4)), split=None)
    with pytest.raises(DataError, match="^evaluation retrieval_x: "):
        evaluate(components, {"retrieval_x": Retrieval(source=source)})


def test_suites_survive_the_config_file(components):
    suites = {
        "a": ZeroShot(source=ALL, prompts=FINDING_PROMPTS, multi_label=True),
        "b": ZeroShot(source=ALL, by="modality", prompts=MODALITY_PROMPTS),
        "c": Retrieval(source=ALL, max_images=500, text={"caption": 0.5, "findings": 0.5}),
        "d": LinearProbe(train=ALL, test=ALL),
        "e": Supervised(source=ALL),
    }
    config = dataclasses.replace(components.config, eval=config_lib.EvalConfig(suites=suites))
    tree = json.loads(config_lib.dump(config_lib.check(config)))
    del tree["format_version"]
    assert config_lib.from_dict(tree).eval.suites == suites
    changed = config_lib.with_value(config, "eval.suites.c.max_images", "10")
    assert changed.eval.suites["c"].max_images == 10


def test_root_goes_to_sources_without_a_place():
    suite = LinearProbe(train=Source(), test=ALL)
    placed = suite.at_root("somewhere")
    assert (placed.train.root, placed.test) == ("somewhere", ALL)
    assert suite.reads_phantoms() and not LinearProbe(train=Source(), test=Source()).reads_phantoms()


def test_folder_of_captions_and_classes(tmp_path):
    records = labelled(6, class_prompt="x")
    for i, record in enumerate(records):
        record |= {
            "alt_text": f"text {i}",
            "split": ["train", "val", "test"][i // 2],
            "class_prompt": record["labels"][0],
        }
    root = write_folder(tmp_path / "scans", records)
    suites = suites_for(root)
    assert list(suites) == ["retrieval_scans", "zeroshot_scans"]
    assert suites["retrieval_scans"].text == "alt_text"
    assert suites["zeroshot_scans"].source.split == "test"
    assert not suites["zeroshot_scans"].multi_label
    assert suites["zeroshot_scans"].class_prompts() == {"Cat": ("Cat",), "big_Dog": ("big_Dog",)}
    assert list(suites_for(root, split="train", name="mine")) == ["retrieval_mine", "zeroshot_mine"]
    with pytest.raises(DataError, match="there is no split 'tset'; there is test"):
        suites_for(root, split="tset")


def test_folder_split_falls_back_to_val_then_to_everything(tmp_path, caplog):
    caplog.set_level("INFO")
    with_val = write_folder(
        tmp_path / "a", [{**r, "split": ["train", "val"][i // 3]} for i, r in enumerate(labelled(6))]
    )
    assert suites_for(with_val)["zeroshot_a"].source.split == "val"
    assert "split 'val'" in caplog.text
    assert "no retrieval" in caplog.text
    without = write_folder(tmp_path / "b", labelled(6))
    assert suites_for(without)["zeroshot_b"].source.split is None
    assert "all records" in caplog.text


def trained_on(components, *sources):
    data = dataclasses.replace(components.config.data, train=sources, root=None)
    return dataclasses.replace(components, config=dataclasses.replace(components.config, data=data))


def test_folder_of_a_run_reads_what_training_held_out(tmp_path, components, caplog):
    caplog.set_level("INFO")
    root = write_folder(tmp_path / "a", labelled(12))
    ran = trained_on(components, Source(root=root), Source(phantoms=PHANTOMS))
    suites = suites_for(f"{root}/records.jsonl", config=ran.config)
    assert suites["zeroshot_a"].source.split == "val"
    assert "held out" in caplog.text and "MAY HAVE BEEN TRAINED" not in caplog.text
    result = suites["zeroshot_a"].run(ran, batch_size=4)
    assert result.provenance["num_records"] == 2 and "overlaps_training" not in result.provenance


@pytest.mark.parametrize("trained, split", [(None, None), (None, "val"), ("train", "train")])
def test_records_of_the_training_are_marked(tmp_path, components, caplog, trained, split):
    root = write_folder(tmp_path / "a", labelled(30))
    ran = trained_on(components, Source(root=root, split=trained))
    suite = suites_for(root, split=split, config=ran.config)["zeroshot_a"]
    assert suite.source.split == split
    assert "MAY HAVE BEEN TRAINED ON THESE RECORDS" in caplog.text
    assert suite.run(ran, batch_size=16).provenance["overlaps_training"] is True


def test_folder_with_none_or_several_labels_is_multi_label(tmp_path):
    records = labelled(4)
    records[0]["labels"] = []
    suites = suites_for(write_folder(tmp_path / "a", records))
    assert list(suites) == ["zeroshot_a"]
    assert suites["zeroshot_a"].multi_label


def test_folder_with_nothing_to_evaluate_says_why(tmp_path):
    root = write_folder(tmp_path / "a", [{**r, "labels": ["Cat"]} for r in labelled(3)])
    with pytest.raises(DataError, match="(?s)nothing to evaluate.*no retrieval: .*no zeroshot: .*'Cat'"):
        suites_for(root)


def test_two_column_csv(tmp_path, components):
    write_folder(tmp_path, labelled(4))
    (tmp_path / "records.jsonl").unlink()
    table = tmp_path / "pairs.csv"
    table.write_text("image,text\n" + "".join(f"{i}.png,text number {i}\n" for i in range(4)))
    metrics = evaluate(components, suites_for(table)).metrics
    assert metrics["retrieval_pairs/num_images"] == 4


def write_csv(path, text_column, *, rows=4):
    write_folder(path, labelled(rows))
    (path / "records.jsonl").unlink()
    lines = [f"{i}.png,text number {i}" for i in range(rows)]
    (path / "pairs.csv").write_text("\n".join([f"image,{text_column}", *lines]))
    return str(path / "pairs.csv")


def test_columns_are_those_of_the_training_where_the_usual_ones_are_absent(tmp_path, components, caplog):
    caplog.set_level("INFO")
    trained, other, usual = (
        write_csv(tmp_path / name, column)
        for name, column in (("a", "report"), ("b", "report"), ("c", "caption"))
    )
    config = trained_on(components, Source(root=trained, text_column="report")).config
    with pytest.raises(DataError, match="there is .*report.*--text-column"):
        suites_for(other)
    for folder, column in ((trained, "report"), (other, "report"), (usual, None)):
        caplog.clear()
        suite = suites_for(folder, config=config)["retrieval_pairs"]
        assert suite.source.text_column == column
        assert ("texts in 'report'" in caplog.text) == (column is not None)
    assert suites_for(other, text_column="report")["retrieval_pairs"].source.text_column == "report"
    with pytest.raises(DataError, match="there is no column 'finding'; there is image, report"):
        suites_for(other, text_column="finding", config=config)


def test_folder_with_several_texts_of_a_record(tmp_path):
    records = labelled(4)
    for i, record in enumerate(records):
        record |= {"impression": f"impression {i}", "findings": f"findings {i}"}
    root = write_folder(tmp_path / "a", records)
    for count, texts in (
        (1, ["findings 0"]),
        (2, ["findings 0", "impression 0"]),
        (None, ["findings 0", "impression 0"]),
    ):
        suite = suites_for(root, texts_per_image=count, long_texts="chunks")["retrieval_a"]
        assert (suite.texts_per_image, suite.long_texts) == (count, "chunks")
        pairs, _ = suite._pairs
        assert [text for number, _, text in pairs if number == 0] == texts

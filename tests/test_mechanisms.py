"""What each named system's mechanism does that a plain run does not, on miniatures of phantoms.

Each test trains with the mechanism and without it, all else equal, and compares on held-out pictures.
"""

import dataclasses
import functools

import numpy as np
import pytest
import scipy.special
from miniature import (
    COVERS,
    MODALITY,
    MODEL,
    OPTIM,
    TONES,
    accuracy,
    cosines,
    fit,
    pictures,
    source,
    tokenizer,
)
from tiny_run import fast_compilation  # noqa: F401

from bvl.config import EvalConfig
from bvl.data.pipeline import DataConfig, Pipeline
from bvl.data.sources import RecordSet
from bvl.data.transforms import Preprocess
from bvl.models.bert import BertConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.early_stop import EarlyStop
from bvl.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

FACTS = "{modality} {tone} {cover}"
KINDS = [dict(modality=m, tone=t, cover=c) for m in MODALITY.values() for t in TONES for c in COVERS]


def training(count: int = 400):
    return pictures("train", count)


@functools.cache
def pairs():
    """The pictures with all their facts, drawn once for the tests that read them."""
    images, records = training()
    return source(records, images, text=FACTS)


@functools.cache
def plain():
    """80 steps on `pairs` without any mechanism: CLIP's loss."""
    return fit(pairs(), steps=80)[0]


@functools.cache
def plain_without_equal_texts():
    """As `plain`, where an image's own text alone is right."""
    return fit(pairs(), task=Contrastive(targets="diagonal"), steps=80)[0]


def held_out():
    return pictures("val", 200)


def classes_by(template: str, kinds=KINDS) -> tuple[list[str], np.ndarray]:
    """(the different texts that a template gives, the number of the right one of every held-out picture)."""
    texts = list(dict.fromkeys(template.format(**kind) for kind in kinds))
    return texts, np.array([texts.index(template.format(**record)) for record in held_out()[1]])


def log_loss(components, texts: list[str], truth: np.ndarray) -> float:
    """Mean negative logarithm of the zero-shot probability of the right text."""
    logits = components.scale_and_bias()[0] * cosines(components, held_out()[0], texts)
    return float(-scipy.special.log_softmax(logits, axis=1)[np.arange(len(truth)), truth].mean())


def test_clip_learns_its_temperature():
    """Zero-shot probabilities become sharp. At the fixed scale 1 the nearest text is as often right (0.92 against
    0.94), but its probability stays about 0.1 and the log loss 2.3, against 0.2."""
    texts, truth = classes_by(FACTS)
    start = dataclasses.replace(MODEL, init_temperature=1.0)
    learned, _ = fit(
        pairs(), model=start, optim=dataclasses.replace(OPTIM, lr_multipliers={"log_scale$": 30.0})
    )
    fixed, _ = fit(pairs(), model=start, optim=dataclasses.replace(OPTIM, freeze=("log_scale$",)))
    assert fixed.scale_and_bias()[0] == 1.0 < 10.0 < learned.scale_and_bias()[0]
    assert accuracy(learned, held_out()[0], texts, truth) > 0.85
    assert log_loss(learned, texts, truth) < 0.5 < 1.5 < log_loss(fixed, texts, truth)


def test_siglip_says_yes_or_no_to_a_single_pair():
    """A probability above one half means "these belong together" (sensitivity 0.94, specificity 0.99). The softmax
    says so to every second pair that does not (specificity 0.53), and a sigmoid whose targets deny that equal texts
    belong to each other's images says so to none."""
    texts, truth = classes_by(FACTS)
    belong = truth[:, None] == np.arange(len(texts))

    def judged(components) -> tuple[float, float]:
        scale, bias = components.scale_and_bias()
        yes = scale * cosines(components, held_out()[0], texts) + bias > 0
        return float(yes[belong].mean()), float(1 - yes[~belong].mean())

    with_bias = dataclasses.replace(MODEL, init_temperature=0.1, init_bias=-10.0)
    sigmoid, _ = fit(pairs(), model=with_bias, task=Contrastive(loss_type="sigmoid"), steps=80)
    sensitivity, specificity = judged(sigmoid)
    assert sensitivity > 0.85 and specificity > 0.95
    assert judged(plain())[1] < 0.7
    denied, _ = fit(
        pairs(), model=with_bias, task=Contrastive(loss_type="sigmoid", targets="diagonal"), steps=80
    )
    assert judged(denied)[0] < 0.1


def test_align_smoothing_keeps_wrong_pairs_from_being_learned_by_heart():
    """A quarter of 96 texts is wrong. Both runs are right as often, but the plain one grows surer (scale 14 -> 17.5,
    log loss 1.55 on correct pairs), the smoothed one less sure (11, 1.27)."""
    images, records = training()
    texts, truth = classes_by(FACTS)
    rng = np.random.default_rng(0)
    wrong = rng.random(96) < 0.25
    told = [records[rng.integers(len(records))] if w else records[i] for i, w in enumerate(wrong)]
    wrong_pairs = source(told, images[:96], text=FACTS)
    start = 1 / MODEL.init_temperature
    surer, _ = fit(wrong_pairs, steps=200)
    smoothed, _ = fit(wrong_pairs, task=Contrastive(label_smoothing=0.1), steps=200)
    assert smoothed.scale_and_bias()[0] < start - 1 < start + 1 < surer.scale_and_bias()[0]
    assert log_loss(smoothed, texts, truth) < log_loss(surer, texts, truth) - 0.1
    found = [accuracy(c, held_out()[0], texts, truth) for c in (smoothed, surer)]
    assert found[0] > found[1] - 0.1


def test_convirt_one_sentence_is_enough_to_find_an_image():
    """The second sentence of a report repeats in other words what the first one says. Trained on one random sentence
    it tells pictures apart (0.97); read only within whole reports it is understood less (0.83)."""
    images, records = training()
    reports = [
        {**record, "report": FACTS.format(**record) + ". " + _second_sentence(record)} for record in records
    ]
    texts = [_second_sentence({"tone": tone}) for tone in TONES]
    truth = [TONES.index(record["tone"]) for record in held_out()[1]]
    found = {}
    for sentences in ("one", "all"):
        model, _ = fit(source(reports, images, text="report", sentences=sentences), steps=80)
        found[sentences] = accuracy(model, held_out()[0], texts, truth)
    assert found["one"] > 0.92 and found["one"] - found["all"] > 0.05


def _second_sentence(record) -> str:
    return {"positive": "bright print.", "negative": "dark print."}[record["tone"]]


def test_convirt_weights_of_the_directions():
    """Three quarters of the weight on image-to-text lower its loss (2.80 against 2.86) and raise that of text-to-image
    (3.13 against 2.88), compared to the opposite weights. The image tower is frozen: random embeddings lie close
    together, so that the two directions want different things of the text tower."""
    own = [FACTS.format(**record) for record in held_out()[1]]
    optim = dataclasses.replace(OPTIM, freeze=("model/image",))
    losses = []
    for weights in ((0.75, 0.25), (0.25, 0.75)):
        model, _ = fit(pairs(), task=Contrastive(direction_weights=weights), optim=optim)
        logits = model.scale_and_bias()[0] * cosines(model, held_out()[0], own)
        losses.append([-np.diag(scipy.special.log_softmax(logits, axis)).mean() for axis in (1, 0)])
    (image_first, text_second), (image_second, text_first) = losses
    assert image_first < image_second - 0.02 and text_first < text_second - 0.1


def test_biomedclip_reads_beyond_77_tokens():
    """The words that matter stand behind 90 that do not: found by a BERT with a context of 256 (0.87), while one with
    CLIP's 77 sees equal texts and guesses (1 of 8)."""
    images, records = training()
    long = "a picture of the print . " * 15 + "{modality} {tone}"
    texts, truth = classes_by(long)
    assert min(tokenizer(256).lengths(texts)) > 77
    text = BertConfig("tiny", hidden_size=32, depth=1, num_heads=2, pool="cls", dropout=0.0)
    model = dataclasses.replace(MODEL, text=text)
    found = {}
    for context in (256, 77):
        trained, _ = fit(
            source(records, images, text=long), model=model, context=context, batch_size=16, steps=100
        )
        found[context] = accuracy(trained, held_out()[0], texts, truth)
    assert found[256] > 0.65 and found[77] < 0.25, found


def test_pubmedclip_goes_on_from_a_run_and_stops():
    """48 pictures with texts of another kind. A first run understands them after ten slow steps (0.96, then 0.99) and
    stops after three evaluations without gain; a fresh model at the same rate stands at 0.09 then, at 0.75 after 60
    steps, and still gains."""
    images, records = training()
    first, _ = fit(source(records[:300], images[:300], text=FACTS))
    template = "a {tone} picture of the {modality} with a {cover} view"
    texts, truth = classes_by(template)
    few = source(records[300:348], images[300:348], text=template)
    slow = OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0, weight_decay=5e-4)
    found, stops = [], []
    for model in (first, None):
        scores, stop = [], EarlyStop(EvalConfig(every=10, stop_metric="accuracy", stop_patience=3))
        for steps in range(10, 70, 10):
            model, _ = fit(few, optim=slow, steps=10, start_from=model)
            scores.append(accuracy(model, held_out()[0], texts, truth))
            stop.add(steps, {"accuracy": scores[-1]})
        found.append(scores)
        stops.append(stop.reached)
    assert found[0][0] > 0.85 and np.all(np.subtract(*found) > 0.15), found
    assert stops == [True, False], found


# Twelve classes with names that say nothing, and what they mean.
MEANINGS = {
    name: (f"{cover} {modality}", f"a {modality} with the {cover} view")
    for name, (modality, cover) in zip(
        "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima".split(),
        [(m, c) for m in MODALITY.values() for c in COVERS],
        strict=True,
    )
}
LABEL_OF = {texts[0]: name for name, texts in MEANINGS.items()}


def label_of(record) -> str:
    return LABEL_OF["{cover} {modality}".format(**record)]


def test_flair_knows_a_class_by_its_description():
    """Four of twelve classes never come in training, where labels are shown by descriptions that share words. The
    four are told apart by theirs (0.94); by their bare names, in a run on bare names, they are guessed (0.15)."""
    images, records = training()
    # Each modality and each side was seen, but not together.
    unseen = [LABEL_OF[text] for text in ("left radiograph", "right fundus", "open smear", "left ultrasound")]
    labels = [label_of(record) for record in records]
    kept = [i for i, label in enumerate(labels) if label not in unseen]
    test = [i for i, record in enumerate(held_out()[1]) if label_of(record) in unseen]
    truth = [unseen.index(label_of(held_out()[1][i])) for i in test]
    found = []
    for descriptions in (MEANINGS, {}):
        shown = source(
            [{"labels": [labels[i]]} for i in kept],
            images[kept],
            text="labels",
            templates=("a picture of {}",),
            descriptions=descriptions,
        )
        model, _ = fit(shown, steps=120)
        prompts = [f"a picture of {descriptions.get(name, (name,))[0]}" for name in unseen]
        found.append(accuracy(model, held_out()[0][test], prompts, truth))
    assert len(test) > 40 and found[0] > 0.8 and found[1] < 0.6, found


def test_flair_soft_targets_by_category():
    """The category is the modality; the texts say more than that. With soft targets all texts of an image's category
    stand before those of others; the diagonal pushes texts of the same category apart."""
    images, records = training()
    categories = tuple(MODALITY.values())
    labelled = [{**record, "labels": [record["modality"]]} for record in records]
    soft, _ = fit(
        source(labelled, images, text=FACTS),
        task=Contrastive(targets="same_labels"),
        classes=categories,
        steps=80,
    )
    texts = [FACTS.format(**kind) for kind in KINDS]
    same = np.array([[kind["modality"] == r["modality"] for kind in KINDS] for r in held_out()[1]])
    found = {}
    for targets, model in (("same_labels", soft), ("diagonal", plain_without_equal_texts())):
        similar = cosines(model, held_out()[0], texts)
        first = np.argsort(-similar, axis=1)[:, : same.sum(1)[0]]
        found[targets] = float(np.take_along_axis(same, first, axis=1).mean())
    assert found["same_labels"] > 0.95 and found["diagonal"] < found["same_labels"] - 0.05, found


def test_unimed_clip_labels_become_captions():
    """Fundus and smear come with labels alone. With their templates in the mixture they are recognised by prompts
    (three quarters and more); a run on the captioned source alone takes them for something else."""
    images, records = training()
    of = {m: [i for i, record in enumerate(records) if record["modality"] == m] for m in MODALITY.values()}
    captioned = of["radiograph"] + of["ultrasound"]
    caption = "a {tone} picture of the {modality}"
    sources = [source([records[i] for i in captioned], images[captioned], text=caption, name="captions")]
    for name in ("fundus", "smear"):
        sources.append(
            source(
                [{"labels": [records[i]["tone"]]} for i in of[name]],
                images[of[name]],
                text="labels",
                templates=(f"a {{}} {name}", f"a {{}} picture of the {name}"),
                name=name,
            )
        )
    texts, truth = classes_by(caption)
    labelled = [i for i, record in enumerate(held_out()[1]) if record["modality"] in ("fundus", "smear")]
    found = []
    for used in (sources, sources[:1]):
        model, _ = fit(*used, steps=100)
        found.append(accuracy(model, held_out()[0][labelled], texts, truth[labelled]))
    assert found[0] > 0.75 and found[1] < 0.4, found
    # A weight of 1 each: as often, although one source has more than twice the records of another.
    pipeline = Pipeline(
        DataConfig(train=tuple(sources), preprocess=Preprocess(image_size=32)),
        sets=[RecordSet(one) for one in sources],
        keys_of_tasks={"contrastive": Contrastive().fields()},
        tokenizer=tokenizer(16),
        classes=(),
        batch_size=60,
        seed=0,
    )
    drawn = np.concatenate([batch["source"] for batch, _ in pipeline.batches(start=0, stop=10)])
    assert len(captioned) > 2 * len(of["fundus"])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 1 / 3, atol=0.05)


COMMON = dict(zip(MODALITY.values(), ("alfa", "bravo", "charlie", "delta"), strict=True)) | {
    "positive": "echo",
    "negative": "golf",
}
SCIENTIFIC = dict(zip(MODALITY.values(), ("thorax", "retina", "sanguis", "abdomen"), strict=True)) | {
    "positive": "lumen",
    "negative": "umbra",
}
TYPES_OF_TEXT = (
    "a photo of {common}",
    "a photo of {scientific}",
    "a photo of {taxonomy}",
    "a photo of {scientific} with common name {common}",
    "a photo of {taxonomy} with common name {common}",
)


def names_of(record) -> dict[str, str]:
    modality, tone = record["modality"], record["tone"]
    scientific = f"{SCIENTIFIC[modality]} {SCIENTIFIC[tone]}"
    order = "grey" if modality in ("radiograph", "ultrasound") else "coloured"
    return {
        "common": f"{COMMON[modality]} {COMMON[tone]}",
        "scientific": scientific,
        "taxonomy": f"{order} {scientific}",
    }


def test_bioclip_answers_every_type_of_name():
    """One of five types of text a step: prompts of each type are understood (0.97). A run on scientific names alone
    does not know the common ones (0.01)."""
    images, records = training()
    named = [names_of(record) for record in records]
    truth_of = [names_of(record) for record in held_out()[1]]

    def by_type(text) -> list[float]:
        model, _ = fit(source(named, images, text=text), steps=80)
        found = []
        for template in TYPES_OF_TEXT:
            prompts = list(dict.fromkeys(template.format(**names_of(kind)) for kind in KINDS))
            truth = [prompts.index(template.format(**names)) for names in truth_of]
            found.append(accuracy(model, held_out()[0], prompts, truth))
        return found

    assert min(by_type(dict.fromkeys(TYPES_OF_TEXT, 0.2))) > 0.9
    only_scientific = by_type(TYPES_OF_TEXT[1])
    assert only_scientific[1] > 0.9 and only_scientific[0] < 0.5


def test_medclip_partly_equal_labels_are_partly_near():
    """The cosine of an image and a text follows the number of labels they share (correlation 0.90); with the
    diagonal two shared labels of three are hardly nearer than one (0.66)."""
    images, records = training()
    labels = (*MODALITY.values(), *TONES, *COVERS)
    labelled = [{**record, "labels": list(record.values())} for record in records]
    similar_labels, _ = fit(
        source(labelled, images, text=FACTS),
        task=Contrastive(targets="label_similarity", target_temperature=0.2),
        classes=labels,
        steps=80,
    )
    shared = np.array(
        [[len(kind.items() & record.items()) for kind in KINDS] for record in held_out()[1]], float
    )
    found = []
    for model in (similar_labels, plain_without_equal_texts()):
        similar = cosines(model, held_out()[0], [FACTS.format(**kind) for kind in KINDS])
        found.append(np.corrcoef(similar.ravel(), shared.ravel())[0, 1])
    assert found[0] > 0.82 and found[1] < found[0] - 0.1, found

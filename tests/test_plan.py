"""The plan of a config: exact where it can be, within a factor where it cannot, and no data needed."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from tiny_regions import first_batch
from tiny_run import tiny_config

from bvl import cli
from bvl.config import MeshConfig
from bvl.data.regions import Regions
from bvl.data.text import Tokenizer
from bvl.errors import ConfigError, UserError
from bvl.mesh import make_mesh
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import RunFolder
from bvl.tasks.caption import Caption
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption
from bvl.train.abstract import abstract_batch, abstract_data, abstract_program
from bvl.train.estimate import Model, bytes_of, bytes_on_device, transfers
from bvl.train.loop import train
from bvl.train.optim import OptimConfig
from bvl.train.plan import (
    Estimate,
    OutOfMemory,
    compiled_lines,
    explain_out_of_memory,
    knobs,
    parse_memory,
    plan_table,
    together,
)
from bvl.train.setup import plan_state
from bvl.train.step import make_train_step

ONE = (1, 1, 1)


def deep_config(remat="none", **changes):
    """Two scanned towers of 8 layers, whose activations are most of a step's memory."""
    options = dict(scan=True, remat=remat, width=64, depth=8, num_heads=4)
    model = DualEncoderConfig(image=ViTConfig("XXS/8", **options), text=TextConfig(**options), embed_dim=32)
    return tiny_config(model=model, batch_size=64, **changes)


def estimate_of(config, shape=ONE):
    return Estimate(Model.of(config, abstract_data(config)), shape)


def test_parameters_and_optimiser_are_exact():
    config = tiny_config(optim=OptimConfig(warmup_steps=2, ema_decay=0.9))
    estimate = estimate_of(config)
    program = abstract_program(config, estimate.model.data, make_mesh(devices=jax.devices()[:1]))
    state = plan_state(config, program).fresh(jax.random.key(0))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert estimate.memory["parameters"] == size(state.params) == estimate.memory["gradients"]
    assert estimate.memory["optimiser"] == size(state.opt_state) > 2 * size(state.params)
    assert estimate.memory["moving average"] == size(state.params)
    # Norms and biases stay whole; everything else is split.
    whole, split = size(state.params), bytes_on_device(estimate.model.state.params, (1, 2, 2))
    assert whole / 4 < split < whole / 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_activations_against_the_compiler(remat):
    """Within a factor of 2 of what XLA needs on CPU beside the arguments."""
    config = deep_config(remat)
    estimate = estimate_of(config)
    model = estimate.model
    plan = plan_state(config, model.program)
    step = make_train_step(model.program, model.optimizer, plan.shardings)
    batch = abstract_batch(config, model.data, config.batch_size)
    needed = step.lower(plan.target, {}, batch).compile().memory_analysis().temp_size_in_bytes
    expected = sum(estimate.memory[what] for what in ("gradients", "activations", "working memory"))
    assert expected / 2 <= needed <= 2 * expected, (expected, needed)


def test_knobs_do_what_they_say():
    config = dataclasses.replace(deep_config(), mesh=MeshConfig((4, 1, 1)))
    estimate = estimate_of(config, (4, 1, 1))
    turned = knobs(estimate)
    both = "model.image.remat={0} model.text.remat={0}"
    assert set(turned) == {
        both.format("dots"), both.format("full"), "precision=bfloat16", "mesh.shape=1,4,1", "optim.accumulate=2", "batch_size=32",
    }  # fmt: skip
    part = lambda name, what: turned[name].memory[what] / estimate.memory[what]  # noqa: E731
    assert part(both.format("full"), "activations") < 0.5 * part(both.format("dots"), "activations") < 0.5
    assert part("precision=bfloat16", "activations") < 0.9
    assert part("mesh.shape=1,4,1", "parameters") < 0.3 and part("mesh.shape=1,4,1", "optimiser") < 0.3
    assert part("optim.accumulate=2", "activations") == pytest.approx(0.5, rel=1e-3)
    assert part("optim.accumulate=2", "gradients") == 2
    # A layer's inside is that of a microbatch; the logits, four times, are those of all 16 rows of a device.
    whole, halves = (e.memory["working memory"] for e in (estimate, turned["optim.accumulate=2"]))
    assert 2 * halves - whole == pytest.approx(4 * 4 * 16 * 16, rel=0.05)
    assert part("batch_size=32", "activations") == pytest.approx(0.5, rel=1e-3)
    # The same as planning the changed config.
    direct = estimate_of(deep_config("full", mesh=MeshConfig((4, 1, 1))), (4, 1, 1))
    assert turned[both.format("full")].memory == direct.memory


def test_groups_shorten_the_ring():
    model = Model.of(tiny_config(batch_size=64), abstract_data(tiny_config()))

    def moved(groups):
        tasks = {"contrastive": Contrastive(groups=groups)}
        return transfers(
            dataclasses.replace(model, config=dataclasses.replace(model.config, tasks=tasks)), (4, 2, 1)
        )

    one, two, each, more = (moved(groups) for groups in (1, 2, 8, 16))
    assert "all-to-all" not in one and one["collective-permute"] == 2 * two["collective-permute"] > 0
    assert "collective-permute" not in each and "collective-permute" not in more
    # 8 images and 8 texts of a device, 16 numbers each, there and back.
    sent = 2 * (8 + 8) * 16 * 4
    assert sent < two["all-to-all"] == each["all-to-all"] == more["all-to-all"] < 1.2 * sent


def test_kernels_that_stay_gathered():
    """Layers one after the other, not computed again: scanning them or computing them again lets kernels go."""
    shape = (1, 4, 1)
    towers = dict(width=64, depth=8, num_heads=4)
    config = tiny_config(
        model=DualEncoderConfig(image=ViTConfig("XXS/8", **towers), text=TextConfig(**towers), embed_dim=32)
    )
    estimate = estimate_of(config, shape)
    turned = knobs(estimate)
    scanned = turned["model.image.scan=true model.text.scan=true"]
    full = turned["model.image.remat=full model.text.remat=full"]
    of_layers = 16 * 4 * (12 * 64 * 64 + 13 * 64)
    for other in (scanned, full):
        saved = estimate.memory["working memory"] - other.memory["working memory"]
        assert saved == pytest.approx(of_layers, rel=0.3)
        more = transfers(other.model, shape)["all-gather"] / transfers(estimate.model, shape)["all-gather"]
        assert 1.7 < more < 2
    assert "model.image.scan=true model.text.scan=true" not in knobs(estimate_of(config, (4, 1, 1)))


def test_several_knobs_where_one_is_not_enough():
    estimate = estimate_of(deep_config(), (4, 1, 1))
    turned = knobs(estimate)
    least = min(e.total for e in turned.values())
    assert not together(estimate, turned, int(least) + 1)
    assert not together(estimate, turned, 1000)
    ((name, found),) = together(estimate, turned, int(0.9 * least)).items()
    words = name.split()
    assert words[:3] == ["model.image.remat=full", "model.text.remat=full", "mesh.shape=1,4,1"]
    assert words[3:] in ([], ["optim.accumulate=2"])
    assert found.total <= 0.9 * least and found.shape == (1, 4, 1)


def test_shapes_of_batches_are_those_of_the_pipeline():
    tower = {"width": 32, "depth": 1, "num_heads": 2}
    config = tiny_config(
        model=DualEncoderConfig(
            image=ViTConfig("XXS/16", pool="mean", **tower),
            text=TextConfig(**tower),
            decoder=DecoderConfig(**tower),
            region_encoder=RegionEncoderConfig(width=32, output_size=2, num_heads=2),
            region_decoder=RegionDecoderConfig(pixel_width=8, **tower),
            embed_dim=16,
        ),
        tasks={
            "caption": Caption(), "labels": Classify(multi_label=True), "grounding": Grounding(), "detection": Detection(),
            "region_caption": RegionCaption(),
        },
    )  # fmt: skip
    regions = Regions(max_objects=2, max_phrases=3, max_regions=2, context_length=8)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=(), regions=regions))
    _, batch = first_batch(config)
    expected = {key: (x.shape, x.dtype) for key, x in batch.items()}
    found = abstract_batch(config, abstract_data(config), config.batch_size)
    assert {key: (x.shape, x.dtype) for key, x in found.items()} == expected


def test_what_a_run_folder_knows_is_not_assumed(tmp_path):
    config = tiny_config(tmp_path, tasks={"labels": Classify(multi_label=True)})
    assumed = abstract_data(config).assumed
    assert (
        len(assumed) == 2 and "300 entries, which is the most" in assumed[0] and "100 classes" in assumed[1]
    )
    Tokenizer.without_words(16).save(RunFolder(tmp_path).tokenizer)
    RunFolder(tmp_path).classes.write_text('["a", "b"]')
    data = abstract_data(config)
    assert (data.tokenizer.vocab_size, data.classes, data.assumed) == (4, ("a", "b"), ())


def test_frozen_models_are_not_opened():
    estimate = estimate_of(tiny_config(frozen={"teacher": "no/such/folder"}))
    assert estimate.memory["frozen models"] == bytes_of(estimate.model.state.params["model"]) > 0


def test_the_verb(tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(cli.__path__[0])!r})\nfrom tiny_run import tiny_config as get_config\n"
    )
    words = [
        "plan",
        str(file),
        "model.image.remat=full",
        "--memory",
        "1MB",
        "--peak-flops",
        "1e9",
        "--no-compile",
    ]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 device(s): data 1, fsdp 1, tensor 1; batch of 8, 8 rows of it at a time on a device"
    total = next(line for line in lines if line.startswith("  total"))
    assert "is too much for 0.001" in total
    assert any("FLOPs" in line and "s at its best" in line for line in lines)
    assert any(line.startswith("  model.text.remat=full") for line in lines)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_compiler_is_that_of_the_backend(backend, monkeypatch):
    memory = SimpleNamespace(argument_size_in_bytes=2e9, temp_size_in_bytes=3e9)
    compiled = SimpleNamespace(
        memory_analysis=lambda: memory, as_text=lambda: "ENTRY main {\n  ROOT %x = f32[] constant(0)\n}\n"
    )
    changed = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setattr("bvl.config.load_config", lambda *_: tiny_config())
    monkeypatch.setattr("bvl.train.plan.plan_table", lambda *_, **__: "")
    lines = compiled_lines(compiled)
    assert all(line.startswith(f"  {backend.upper()} compiler, ") for line in lines) and len(lines) == 2
    assert ("accelerator" in lines[1]) == (backend == "cpu")
    assert cli.main(["plan", "c.py"]) == 0
    # An accelerator's compiler is to do what it does for a run.
    assert ("jax_disable_most_optimizations" in changed) == (backend == "cpu")


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 parsecs", "80GBs"])
def test_memory_of_another_form(text):
    with pytest.raises(UserError, match=f"--memory {text}: .*80GB or 16GiB"):
        parse_memory(text)


def test_memory():
    assert (
        parse_memory("80GB") == 80 * 10**9
        and parse_memory("1.5 GiB") == 1.5 * 2**30
        and parse_memory("10M") == 10**7
    )


def test_devices_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"needs 6 devices, there are 8.*\[1, 2, 4, 8\]"):
        plan_table(tiny_config(mesh=MeshConfig((3, 2, 1))), num_devices=8)
    with pytest.raises(ConfigError, match="batch_size=8 cannot be split over 16"):
        plan_table(tiny_config(), num_devices=16)


def test_out_of_memory_ends_with_the_plan(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr("bvl.train.loop._train", fail)
    with pytest.raises(OutOfMemory, match=r"allocating 123 bytes\.\n\n1 device.*(?s:.*)optim.accumulate=2"):
        train(tiny_config(tmp_path))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory(tiny_config()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

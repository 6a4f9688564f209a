"""FLAIR: fundus photographs whose labels become what an expert says of them, with soft targets by category.

    bvl train configs/flair.py:tiny workdir=runs/flair_tiny
    bvl train configs/flair.py data.root=my_fundus_sets workdir=runs/flair

Each time a record is read, every label of DESCRIPTIONS is replaced by one of its texts, drawn at random; images with
equal labels are each other's positives. `:tiny` shows the same on phantoms of the fundus, in a few minutes on two CPU
cores. Without it the records of data.root need an image and `labels`, among them those of DESCRIPTIONS (other labels
stand for themselves); a tenth is held out by patient, where findings are told apart by their descriptions alone.

Source: Silva-Rodriguez et al. 2023, arXiv:2308.07898. Image size and padding, projection, temperature, prompt, soft
targets, rate and decay are those of the authors' code.
Differs: the descriptions are ours and few, where the authors collected theirs from the literature for 97 categories;
both towers start from random weights, not from ImageNet and Bio_ClinicalBERT; a record with several labels has one
text with all of them; images without any label have no text and are left out, so give healthy ones the label "normal".
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.zeroshot import ZeroShot
from bvl.models.bert import BertConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

TEMPLATE = "A fundus photograph of {}"
# In our words and not reviewed by an ophthalmologist: put your own here before you rely on results.
DESCRIPTIONS = {
    "normal": ("a healthy retina", "no lesion, a clear macula and a disc with sharp margins"),
    "haemorrhage": ("dark red blots in the retina", "bleeding from retinal vessels"),
    "microaneurysms": ("tiny round red dots", "small outpouchings of retinal capillaries"),
    "hard exudates": ("small bright yellow deposits with sharp edges", "lipid that leaked from vessels"),
    "cotton wool spot": ("a pale fluffy patch with blurred edges", "a swollen patch of nerve fibres"),
    "laser scar": ("round pale burns with dark rims", "marks of photocoagulation"),
    "neovascularisation": ("fine new vessels that run astray", "a network of fragile vessels"),
    "drusen": ("yellow deposits beneath the retina", "scattered pale spots around the macula"),
    "geographic atrophy": ("a sharply bounded pale area at the macula", "loss of pigment epithelium"),
    "glaucoma": ("a large cup within the optic disc", "a thin rim of the optic disc"),
    "papilloedema": ("a swollen optic disc with blurred margins", "a raised disc with full veins"),
    "epiretinal membrane": ("a glistening film over the macula", "wrinkles of the inner retina"),
    "macular hole": ("a round reddish gap at the fovea", "a break through the centre of the macula"),
    "retinal detachment": ("a grey raised fold of retina", "retina lifted off the layers beneath"),
}
PHANTOMS = Phantoms(num_patients=3000, image_size=64, modalities=("fundus photograph",))
LABELS = dict(text="labels", templates=(TEMPLATE,), descriptions=DESCRIPTIONS)
SHOWN_BY_PHANTOMS = ("haemorrhage", "hard exudates", "cotton wool spot", "laser scar")

PAPER = SimpleNamespace(
    image=ResNetConfig("ResNet50"),
    text=BertConfig("clinicalbert", pool="mean", pool_layers=(1, 2, -1)),
    embed_dim=512,
    train=Source(**LABELS),
    held_out=Source(split="val"),
    findings=tuple(DESCRIPTIONS),
    image_size=512,
    crop_scale=(0.8, 1.0),
    tokenizer=TokenizerConfig(vocab_size=28996, lowercase=False, context_length=256),
    steps=35_000,
    batch_size=128,
    precision="bfloat16",
    optim=OptimConfig(lr=5e-4, weight_decay=1e-5, warmup_steps=2000),
)
TINY = SimpleNamespace(
    image=ResNetConfig("ResNet18", width=16, stages=(1, 1, 1, 1)),
    text=BertConfig("tiny", depth=1, pool="mean"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, cache=True, **LABELS),
    held_out=Source(phantoms=PHANTOMS, split="test", cache=True),
    findings=SHOWN_BY_PHANTOMS,
    image_size=64,
    crop_scale=(1.0, 1.0),
    tokenizer=TokenizerConfig(vocab_size=500, context_length=48),
    steps=1000,
    batch_size=64,
    precision="float32",
    optim=OptimConfig(lr=1e-3, weight_decay=1e-5, warmup_steps=50),
)


def get_config(arg: str | None = None) -> Config:
    size = TINY if parse_arg(arg, tiny=False).tiny else PAPER
    prompts = {
        name: tuple(TEMPLATE.replace("{}", text) for text in DESCRIPTIONS[name]) for name in size.findings
    }
    return Config(
        steps=size.steps,
        batch_size=size.batch_size,
        precision=size.precision,
        model=DualEncoderConfig(
            image=size.image,
            text=size.text,
            embed_dim=size.embed_dim,
            image_projection="linear",
            text_projection="linear",
            init_temperature=0.07,
        ),
        tasks={"contrastive": Contrastive(targets="same_labels")},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(image_size=size.image_size, resize="pad"),
            augment=Augment(crop_scale=size.crop_scale, brightness=0.1, contrast=0.1),
            tokenizer=size.tokenizer,
        ),
        optim=size.optim,
        eval=EvalConfig(
            suites={"zeroshot_fundus": ZeroShot(source=size.held_out, prompts=prompts, multi_label=True)}
        ),
        checkpoint=CheckpointConfig(every=1000),
    )

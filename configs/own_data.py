"""Your images and texts: a CSV with the columns `image` and `text`, or a folder with records.jsonl.

    bvl train configs/own_data.py data.root=my_pairs.csv workdir=runs/mine

Paths of images are relative to the file. Where the file has no `split`, a tenth is held out by patient (by image
where there are no `patient_id`s) and retrieval is measured on it. Text comes from the column `text` or `caption`;
others: data.train.0.text_column=report. The defaults fit a few thousand pairs and a laptop; with an accelerator:

    bvl train configs/own_data.py:size=224,image=B/16,text_width=512,text_depth=12 data.root=my_pairs.csv \\
        workdir=runs/mine batch_size=512 precision=bfloat16 steps=20000

With `:captions=true` a captioner is trained beside it, which can be asked for a number of words.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.controls import Controls
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.caption import Captions
from bvl.evals.retrieval import Retrieval
from bvl.models.decoder import DecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, size=96, image="XS/16", text_width=128, text_depth=4, captions=False)
    heads = knobs.text_width // 32
    suites = {"retrieval_held_out": Retrieval(source=Source(split="val"))}
    if knobs.captions:
        suites["caption_held_out"] = Captions(source=Source(split="val"))
    return Config(
        steps=1000,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig(knobs.image, pool="mean"),
            text=TextConfig(width=knobs.text_width, depth=knobs.text_depth, num_heads=heads),
            decoder=DecoderConfig(width=knobs.text_width, depth=knobs.text_depth, num_heads=heads)
            if knobs.captions
            else None,
            embed_dim=min(512, 2 * knobs.text_width),
        ),
        tasks={"contrastive": Contrastive()} | ({"caption": Caption()} if knobs.captions else {}),
        data=DataConfig(
            train=(Source(),),
            preprocess=Preprocess(image_size=knobs.size, resize="pad"),
            augment=Augment(crop_scale=(0.6, 1.0), brightness=0.1, contrast=0.1),
            tokenizer=TokenizerConfig(vocab_size=8000, context_length=64),
            controls=Controls(lengths=40 if knobs.captions else 0),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=100, weight_decay=0.1),
        eval=EvalConfig(every=250, suites=suites),
        checkpoint=CheckpointConfig(every=250, best="retrieval_held_out/t2i_r10"),
        log=LogConfig(every=25),
    )

"""Fine-tune a model on your images and texts: one of open_clip or transformers, or a run of bvl.

    bvl train configs/finetune.py:recipe=lora init_from=open_clip:path/to/model data.root=my_pairs.csv \\
        workdir=runs/tuned

`init_from` is open_clip:DIR, hf:DIR or a run folder; of several with commas between, such as hf:VISION,hf:BERT, each
tower is that of the last model that has one. Towers, preprocessing, tokenizer and context come from there, and can
be changed as in any config: data.preprocess.image_size=336, data.tokenizer.context_length=248 (positions are resized).
The context is often longer than your texts (512 tokens of a BERT, 1024 of a language model); fewer are faster.
`data.root` is a CSV with the columns `image` and `text`, or a folder with records.jsonl. Without a `split` a tenth
is held out by patient, as in configs/own_data.py; retrieval is measured on it before and after.

    recipe=full          all parameters, 3e-5
    recipe=frozen_tower  all but one tower (LiT: Zhai et al. 2022, arXiv:2111.07991): tower=image or text stays
    recipe=layer_decay   all parameters, each layer at 0.75 of the rate of the one above it (BEiT: Bao et al. 2022,
                         arXiv:2106.08254)
    recipe=lora          low-rank factors of attention's queries and values (Hu et al. 2021, arXiv:2106.09685); what is
                         saved are ordinary parameters
    recipe=low_rate      all parameters, 1e-5 and constant (PubMedCLIP: Eslami et al. 2021, arXiv:2112.13906)

`:labels=true` is for records with `labels` and a `class_prompt`: that is the text, and the table is zero-shot
classification. A model with a decoder also learns captions. steps=500 of 64 pairs suit a few thousand pairs.
"""

import dataclasses
import difflib

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.transforms import Augment
from bvl.errors import ConfigError
from bvl.evals.caption import Captions
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.train.lora import LoraConfig
from bvl.train.optim import OptimConfig
from bvl.train.parameters import SEES
from bvl.train.source_config import source_config

WARM_UP = dict(warmup_steps=50, weight_decay=0.05)
RECIPES = {
    "full": OptimConfig(lr=3e-5, **WARM_UP),
    "frozen_tower": OptimConfig(lr=1e-4, **WARM_UP),
    "layer_decay": OptimConfig(lr=1e-4, layer_decay=0.75, **WARM_UP),
    "lora": OptimConfig(lr=5e-4, lora=LoraConfig(), warmup_steps=50, weight_decay=0.0),
    "low_rate": OptimConfig(lr=1e-5, schedule="constant", warmup_steps=50, weight_decay=5e-4),
}


def get_config(arg: str | None = None, *, init_from=None, workdir=None) -> Config:
    knobs = parse_arg(arg, recipe="full", tower="image", labels=False)
    if knobs.recipe not in RECIPES:
        near = difflib.get_close_matches(knobs.recipe, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"recipe={knobs.recipe!r} is unknown{hint} (there are {', '.join(RECIPES)})")
    if knobs.tower not in ("image", "text"):
        raise ConfigError(f"tower={knobs.tower!r}: the tower that stays as it is, image or text")
    source = source_config(init_from, workdir)
    optim = RECIPES[knobs.recipe]
    if knobs.recipe == "frozen_tower":
        if getattr(source.model, knobs.tower) is None:
            raise ConfigError(f"tower={knobs.tower}: the model of init_from has none")
        optim = dataclasses.replace(optim, freeze=(f"^model/{knobs.tower}/",))
    if optim.lora is not None and source.fresh_decoder_parts:
        # No low-rank factor could learn it.
        lora = dataclasses.replace(optim.lora, train=(*optim.lora.train, SEES))
        optim = dataclasses.replace(optim, lora=lora)
    held_out = Source(split="val", text="class_prompt" if knobs.labels else "caption")
    suites = {}
    if knobs.labels:
        suites["zeroshot_held_out"] = ZeroShot(source=held_out)
    elif "contrastive" in source.tasks:
        suites["retrieval_held_out"] = Retrieval(source=held_out)
    if "caption" in source.tasks:
        suites["caption_held_out"] = Captions(source=held_out)
    return Config(
        init_from=init_from,
        steps=500,
        batch_size=64,
        model=source.model,
        tasks=source.tasks,
        data=DataConfig(
            train=(Source(text=held_out.text),),
            preprocess=source.preprocess,
            augment=Augment(crop_scale=(0.8, 1.0)),
            tokenizer=source.tokenizer,
            controls=source.controls,
        ),
        optim=optim,
        eval=EvalConfig(every=100, suites=suites, before=True),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=20),
    )

"""transformers' side of tools/bench_decode.py; sizes and requests are described there.

Needs torch and transformers, and nothing of bvl's packages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

# It is not needed, and the wheels of PyPI do not load beside a CPU build of torch.
sys.modules["torchvision"] = None

import torch  # noqa: E402
from bench_decode import END, IMAGE_SIZE, IMAGE_TOKENS, NEW_TOKENS, PAD, START, VOCABULARY, serve  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402


def make_model() -> VisionEncoderDecoderModel:
    special = dict(bos_token_id=START, eos_token_id=END, pad_token_id=PAD)
    encoder = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=IMAGE_SIZE,
    )
    decoder = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=NEW_TOKENS + 2,
        n_embd=512,
        n_layer=6,
        n_head=8,
        add_cross_attention=True,
        is_decoder=True,
        **special,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config=config).eval()
    model.generation_config.update(decoder_start_token_id=START, **special)
    return model


def prepare(model: VisionEncoderDecoderModel, kind: str, batch: int, beams: int) -> Callable[[], None]:
    options = dict(
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = torch.randn(batch, IMAGE_TOKENS, 384)

    @torch.no_grad()
    def run() -> None:
        # generate() writes into what it is given.
        given = dict(encoder_outputs=BaseModelOutput(last_hidden_state=tokens))
        if kind == "caption":
            given = dict(pixel_values=images)
        found = model.generate(**given, **options)
        if found.shape != (batch, 1 + NEW_TOKENS):
            raise SystemExit(f"texts of shape {tuple(found.shape)}: these times mean nothing")

    return run


def main() -> None:
    torch.manual_seed(0)
    model = make_model()
    facts = {
        "threads": torch.get_num_threads(),
        "decoder_parameters": sum(x.numel() for x in model.decoder.parameters()),
    }
    print(json.dumps(facts), flush=True)
    serve(lambda *case: prepare(model, *case))


if __name__ == "__main__":
    main()

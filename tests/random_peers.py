"""Peer models with random weights, written to folders as their own libraries write them."""

from pathlib import Path

import tokenizers


def randomise(model, seed=0, spread=0.3):
    """All parameters drawn anew, so that none is where it is by construction (biases of 0, scales of 1); eval mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            # Matrices keep the size of what they are given.
            width = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(noise / max(width**0.5 / 4, 1.0) + (parameter.ndim == 1) * 0.1)
    return model.eval()


def write_tokenizer(
    folder: Path, words: int, special=("[PAD]", "[UNK]", "[START]", "[END]", "[MASK]")
) -> None:
    """A tokenizer.json of so many tokens: the special ones, then "w5", "w6" and so on."""
    vocab = {name: i for i, name in enumerate(special)}
    vocab |= {f"w{i}": i for i in range(len(vocab), words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(list(special))
    model.save(str(folder / "tokenizer.json"))


def worst(differences) -> str:
    """The differences that are out of tolerance, for a message."""
    return "; ".join(
        f"{d.tower}/{d.ours} ({d.probe}) {d.absolute:.2g} {d.relative:.2g}"
        for d in differences
        if not d.within
    )

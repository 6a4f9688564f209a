"""All families, and which of them a folder belongs to."""

from __future__ import annotations

import importlib
from pathlib import Path

from bvl.convert.families import Family, Library, Source, read_json
from bvl.errors import ConversionError

# Modules with a tuple FAMILIES. The more special come first.
MODULES = ("coca", "open_clip", "hf_captioner", "hf_dual", "hf_vision", "hf_bert", "hf_decoders")
CONFIG_FILES: dict[Library, str] = {"open_clip": "open_clip_config.json", "hf": "config.json"}
PREFIXES = tuple(f"{library}:" for library in CONFIG_FILES)
HUB = "hf-hub:"
# Configs, tokenizers and indices of shards.
_TEXT_FILES = ("*.json", "*.txt", "*.model")


def families(library: Library | None = None) -> tuple[Family, ...]:
    """All families, or those of one library."""
    found = [f for name in MODULES for f in importlib.import_module(f"bvl.convert.{name}").FAMILIES]
    return tuple(f for f in found if library in (None, f.library))


def is_foreign(spec: str | Path) -> bool:
    """Whether a spec names a model of another library: "open_clip:DIR", "hf:DIR", "hf-hub:NAME"."""
    return str(spec).startswith((*PREFIXES, HUB))


def looks_foreign(folder: Path) -> bool:
    """Whether a folder without a prefix holds a model of another library and no run."""
    if (folder / CONFIG_FILES["open_clip"]).is_file():
        return True
    path = folder / CONFIG_FILES["hf"]
    return path.is_file() and bool({"model_type", "architectures"} & read_json(path).keys())


def open_source(spec: str | Path) -> Source:
    """The folder that a spec names; raises ConversionError where it is none, or has no config."""
    spec = str(spec)
    library: Library | None = None
    for prefix in PREFIXES:
        if spec.startswith(prefix):
            library, spec = prefix[:-1], spec.removeprefix(prefix)
    folder = _from_hub(spec.removeprefix(HUB)) if spec.startswith(HUB) else Path(spec)
    if not folder.is_dir():
        raise ConversionError(f"no folder {folder}; give {' or '.join(f'{p}DIR' for p in PREFIXES)}")
    if library is None:
        library = next((name for name, file in CONFIG_FILES.items() if (folder / file).is_file()), None)
        if library is None:
            raise ConversionError(f"{folder} has no {' and no '.join(CONFIG_FILES.values())}")
    path = folder / CONFIG_FILES[library]
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ConversionError(
            f"{folder} has no {path.name}, so its architecture is not known; there are: {there}"
        )
    return Source(library, folder, read_json(path))


def family_of(source: Source) -> Family:
    """The family of a folder; raises ConversionError that lists the known ones."""
    known = families(source.library)
    for family in known:
        if family.accepts(source):
            return family
    named = source.config.get("architectures") or source.config.get("model_type", "not named")
    named = named if isinstance(named, list) else [named]
    raise ConversionError(
        f"{source.folder}: the architecture ({', '.join(map(str, named))}) is not known; of {source.library} bvl reads "
        f"{', '.join(family.name for family in known)}"
    )


def _from_hub(name: str) -> Path:
    """The folder of a public model, fetched where there is a network."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_TEXT_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=[*_TEXT_FILES, "*.bin"])
        return folder
    except Exception as error:  # whatever goes wrong with the network, the name or the rights
        raise ConversionError(
            f"{HUB}{name} could not be fetched ({type(error).__name__}). Where there is a network, download the "
            f"repository {name} with its config, weights and tokenizer files (hf download {name} "
            "--local-dir DIR), and give its folder: open_clip:DIR or hf:DIR"
        ) from error

"""What a family of foreign models says about itself: its config in bvl's terms and back, its table, its proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from bvl.config import Config
from bvl.convert.table import Table
from bvl.convert.tensors import Tensors, open_weights
from bvl.data.text import Tokenizer
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.vlm import DualEncoderConfig

Library = Literal["open_clip", "hf"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder that another library wrote. config: its open_clip_config.json, or its config.json."""

    library: Library
    folder: Path
    config: Mapping[str, Any]

    def tensors(self) -> Tensors:
        """The weights, not loaded yet."""
        return open_weights(self.folder, self.library)

    def json(self, name: str) -> dict[str, Any]:
        """A further JSON file of the folder; empty where there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConversionError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is damaged, or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} is no JSON object")
    return value


@dataclasses.dataclass(frozen=True)
class TextFacts:
    """What the tokenizer of a foreign model must be.

    kind: which rules of reading text and which special tokens ("clip", "siglip", "bert", "gpt2", "llama", "qwen2",
      "any").
    embedding_rows: of the token embedding; the tokenizer must not have more tokens.
    start_id, end_id, pad_id: as the foreign config says, None where it does not; start_id=-1: texts have no start token.
    """

    kind: str
    context_length: int
    embedding_rows: int
    start_id: int | None = None
    end_id: int | None = None
    pad_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Described:
    """A foreign model in bvl's terms.

    preprocess: None without an image tower. text: None without anything that reads text.
    tasks: name -> {"type": "bvl.tasks....", ...} as config.json has them, for what the model can do.
    heads: shapes of parameters of tasks ("heads/mlm/...") that the table fills.
    """

    model: DualEncoderConfig
    preprocess: Preprocess | None
    text: TextFacts | None
    tasks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module of ours and the module of theirs whose (first) outputs the proof compares.

    ours: path below the model, "image/stack/block_0". how: "nchw" where theirs has channels before rows and columns.
    skip: tokens that only theirs has in front.
    """

    ours: str
    theirs: str
    how: Literal["same", "nchw"] = "same"
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Tower:
    """A part of a foreign model as the proof runs it.

    run: (peer, inputs) -> outputs (torch tensors) by the names that ours has: "embed", "pooled", "tokens", "logits".
      Inputs are torch tensors: of an image tower "pixels" [b, 3, h, w], normalised; of a text tower "tokens" and "mask"
      [b, t]; of a decoder "tokens" and "mask", and "pixels" where it sees images.
    sizes: further image sizes (height, width) that theirs takes as well.
    """

    name: Literal["image", "text", "decoder"]
    layers: tuple[Layer, ...]
    run: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    sizes: tuple[tuple[int, int], ...] = ()


class Family:
    """One foreign class. Every method reads the model's config on our side and the foreign config on theirs.

    name: of the foreign class or layout. weights_file, config_file: what an export writes.
    """

    name: ClassVar[str]
    library: ClassVar[Library]
    weights_file: ClassVar[str] = "model.safetensors"
    config_file: ClassVar[str] = "config.json"

    def accepts(self, source: Source) -> bool:
        """Whether the folder holds a model of this family."""
        raise NotImplementedError

    def describe(self, source: Source) -> Described:
        """The model in bvl's terms; raises ConversionError naming an option that bvl does not reproduce."""
        raise NotImplementedError

    def tensors(self, source: Source) -> Tensors:
        """The folder's weights, not loaded yet, under the names that `table` uses whatever version wrote them."""
        return source.tensors()

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        """Which parameter is which tensor."""
        raise NotImplementedError

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        """The folder's model as its own library loads it: a torch module in float32 that does not train."""
        raise NotImplementedError

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        """How the proof runs the peer, tower by tower."""
        raise NotImplementedError

    def scale_and_bias(self, peer: Any) -> tuple[float, float] | None:
        """(scale, bias) of the logits of a dual encoder; None where there are none."""
        return None

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        """The foreign config of a model of ours; raises ConversionError naming the option that prevents it."""
        raise ConversionError(f"bvl does not write {self.name}")

    def placed(self, foreign: Mapping[str, Any], folder: Path, *, hub_id: str | None) -> dict[str, Any]:
        """The foreign config where it says in which folder it lies; hub_id: what it names instead.

        Raises ConversionError for a hub_id that has no use.
        """
        if hub_id is not None:
            raise ConversionError(f"hub_id={hub_id!r}: the config of {self.name} names no other model")
        return dict(foreign)

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        """Write what stands beside weights and config: tokenizer and preprocessing as the library reads them."""
        raise NotImplementedError

    def how_to_load(self, folder_name: str) -> str:
        """Lines of Python, for the model card."""
        raise NotImplementedError

    def notes(self, foreign: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """Further paragraphs of the model card, such as what to do after the folder is moved."""
        return ()


def expect(foreign: Mapping[str, Any], options: Mapping[str, tuple[Any, ...]], *, where: str) -> None:
    """Raise ConversionError unless each option that the foreign config gives has one of the values bvl reproduces.

    options: name -> values; an absent option counts as the first of them.
    """
    for name, known in options.items():
        value = foreign.get(name, known[0])
        if value not in known:
            raise ConversionError(
                f"{where}: {name}={value!r} is not reproduced by bvl; known: {', '.join(map(repr, known))}"
            )

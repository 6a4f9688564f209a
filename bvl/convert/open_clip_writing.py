"""bvl's dual encoders as open_clip's configs, and the files that stand beside them."""

from __future__ import annotations

from typing import Any

from bvl.config import Config
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError


def foreign(config: Config, tokenizer: Tokenizer, *, custom: bool) -> dict[str, Any]:
    raise ConversionError("x")

"""The sources of the PyTorch side joined into the one file that an export brings along."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
# Each file uses only names of those before it, but for annotations.
ORDER = (
    "errors images text sentences controls features layers vit resnet hybrid text_towers decoder_layers decoder "
    "constraints search beam region_encoder region_decoder network prompts embedding locating writing model"
).split()
RULE = "# " + "-" * 78
INTRODUCTION = '''"""A vision-language model in plain PyTorch, exported from bvl.

    from bvl_model import load
    m = load("DIR")                        # the folder that this file lies in
    m.embed_images(["a.png"])              # also embed_texts, classify, caption, describe, ground, segment, detect, heat_maps
    m(pixels, tokens, mask)                # logits, with gradients: Model is an nn.Module, see Network

It needs torch, numpy, pillow, tokenizers and safetensors. Parameters have bvl's names with "." for "/", and the leaves
that torch's own layers have: `weight` for `kernel` (of affine maps transposed to [out, in], of convolutions
[out, in, h, w]) and for the `scale` of norms.
"""
'''


@functools.cache
def bundled() -> str:
    """The text of bvl_model.py."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    sections = []
    for name in ORDER:
        text = (SOURCE / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines: list[str | None] = list(text.splitlines())
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and _top(node.module) not in ("bvl", "__future__"):
                names.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
            if _stays_behind(node):
                lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        body = "\n".join(line for line in lines if line is not None).strip("\n")
        heading = "\n".join(f"# {line}".rstrip() for line in ast.get_docstring(tree).splitlines())
        sections.append(f"{RULE}\n{heading}\n{RULE}\n\n\n{body}\n")
    names["typing"].discard("TYPE_CHECKING")
    froms = [
        f"from {module} import {', '.join(sorted(found, key=_order))}" for module, found in names.items()
    ]
    # As formatters have it: the standard library, then the rest, each with its plain imports first.
    imports = []
    for ours in (True, False):
        for some in (plain, froms):
            imports += sorted(
                line for line in some if (_top(line.split()[1]) in sys.stdlib_module_names) == ours
            )
        imports.append("")
    return "\n".join([INTRODUCTION, "from __future__ import annotations\n", *imports, "\n\n".join(sections)])


def _top(module: str) -> str:
    return module.split(".")[0]


def _order(name: str) -> tuple[bool, bool, str]:
    """Constants, then classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def _stays_behind(node: ast.stmt) -> bool:
    """Docstrings of files become headings, and imports are collected; what only a type checker reads has none."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return docstring or checking or isinstance(node, ast.Import | ast.ImportFrom)

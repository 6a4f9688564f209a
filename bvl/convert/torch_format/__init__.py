"""Export to one file of plain PyTorch beside weights, tokenizer and preprocessing, for colleagues without JAX.

`source/` is the PyTorch side. It is read as text and never imported here, so that bvl works without torch.
"""

from bvl.convert.torch_format.compare import compare_torch
from bvl.convert.torch_format.export import export_torch

__all__ = ["compare_torch", "export_torch"]

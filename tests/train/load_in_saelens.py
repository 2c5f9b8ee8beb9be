"""What SAELens makes of an SAE folder: run by test_saelens_installed.py, in a Python where sae-lens is installed.

Arguments: the SAE's folder, a safetensors file with ``x`` and ``f``, and where to put ``encode`` and ``forward`` of x
and ``decode`` of f. tcsae need not be installed there.
"""

from __future__ import annotations

import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

folder, given, answer = sys.argv[1:]
tensors = load_file(given)
sae = SAE.load_from_disk(folder)
with torch.no_grad():
    found = {
        "encode": sae.encode(tensors["x"]),
        "decode": sae.decode(tensors["f"]),
        "forward": sae(tensors["x"]),
    }
# which class it took the folder for, and whether our metadata came through
about = {
    "architecture": sae.cfg.architecture(),
    "hook_name": str(sae.cfg.metadata.hook_name),
    "arm": str(sae.cfg.metadata.tcsae["arm"]),
}
save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer, metadata=about)

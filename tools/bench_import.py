"""Time and host memory of taking over a model of 304 million parameters, without the proof.

    python tools/bench_import.py

A Dinov2 of size L with random weights is saved by transformers; then a fresh process each runs `bvl.load("hf:DIR")` and
`bvl convert hf:DIR OUT --no-check`. Memory is the peak resident set of the process, libraries included, as a multiple of
the file's size; asked are at most 2.5 times and 60 s.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bvl.convert.peers import import_peer

MAKE = """
import sys
from bvl.convert.peers import import_peer
transformers = import_peer("transformers", what="this tool")
config = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)
transformers.Dinov2Model(config).save_pretrained(sys.argv[1])
transformers.BitImageProcessor().save_pretrained(sys.argv[1])
"""
LOAD = "import sys, bvl; bvl.load('hf:' + sys.argv[1])"
CONVERT = "import sys; from bvl.cli import main; sys.exit(main(['convert', 'hf:' + sys.argv[1], sys.argv[2], '--no-check']))"
# The last line that a measured process prints.
PEAK = "\nimport re; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"


def run(code: str, *args: str) -> tuple[float, float]:
    """(seconds, peak bytes) of a fresh Python process."""
    start = time.monotonic()
    code = code.replace("sys.exit(", "(") + PEAK
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - start, 1024 * float(done.stdout.split()[-1])


def main() -> None:
    import_peer("transformers", what="this tool")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dinov2"
        subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True, capture_output=True)
        size = (folder / "model.safetensors").stat().st_size
        print(f"file: {size / 2**30:.2f} GiB")
        for name, code in (("bvl.load", LOAD), ("bvl convert --no-check", CONVERT)):
            seconds, peak = run(code, str(folder), str(Path(scratch) / "run"))
            print(f"{name}: {seconds:.0f} s, {peak / 2**30:.2f} GiB = {peak / size:.2f}x the file")


if __name__ == "__main__":
    main()

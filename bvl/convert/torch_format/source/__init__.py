"""The PyTorch side: read as text and joined by `bundle.py`, never imported by bvl."""

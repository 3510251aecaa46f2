"""Weights packed as GGUF blocks: block formats, codecs, the mixes' per-tensor rules, and the `.gguf` file."""

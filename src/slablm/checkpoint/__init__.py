"""Files: safetensors shards, digests, the guard, saving and inspecting a checkpoint, and the transformers plug-in.

What `FORMAT.md` promises is kept here. `hf` is the only file that touches transformers' quantizer interface.

May import: `runtime`, `packing`, `methods`, `system`.
"""

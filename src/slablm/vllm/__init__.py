"""The plug-in for vLLM, which is no dependency: vLLM finds it by its entry point, `slablm.vllm.plugin:register`.

`quantization` answers vLLM's questions about a checkpoint, `linear` and `embedding` hold the layers.

May import: `checkpoint`, `runtime` and all that stands above them; and vLLM.
"""

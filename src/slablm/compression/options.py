"""What a run does besides the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from slablm.checkpoint.save import MAX_SHARD_SIZE
from slablm.system.distributed import ALONE, World


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides the numbers.

    Attributes:
        dtype: type the model is calibrated in, as for `slablm.dense.loading.load`.
        device: compute device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code from the hub.
        overwrite: replace a model, or files of the same names, that the target holds.
        resume: continue an unfinished run.
        max_memory: bytes of RAM for the calibration activations of one rank; None for as much as they take.
        max_shard_size: bytes of tensors per file of the result.
        mostly_dense: go on where most of the blocks' weights cannot be compressed.
        world: the ranks that compress together; the compute device is the world's then.
    """

    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None
    max_shard_size: int = MAX_SHARD_SIZE
    mostly_dense: bool = False
    world: World = ALONE

    @property
    def compute_device(self) -> str:
        """Of this rank."""
        return self.device if self.world.size == 1 else self.world.device

"""Random packed weights for the kernel tests."""

import torch
from hypothesis import strategies as st

from slablm.methods import Decomposition
from slablm.methods.symbols import SymbolWeight
from slablm.packing import PackedSpec, pack
from slablm.packing.symbols import pack_symbols
from slablm.runtime.kernels import reference

FIXED_POINT_STEPS = 8191  # 14 bits: largest magnitude of a block of 64 inputs


def random_packed(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = spec.out_features, spec.in_features
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask.scatter_(1, torch.rand(m, n, generator=generator).topk(spec.kept, dim=1).indices, True)
    decomposition = Decomposition(
        mask=mask,
        values=torch.randn(m, spec.kept, generator=generator),
        left=torch.rand(m, spec.rank, generator=generator) + 0.1,
        right=torch.rand(spec.rank, n, generator=generator),
        signs=torch.rand(m, n, generator=generator) < 0.5 if spec.signs else None,
    )
    return pack(decomposition, spec.value_dtype)


@st.composite
def specs(draw, largest_width=300):
    n = draw(st.integers(1, largest_width))
    signs = draw(st.booleans())
    return PackedSpec(
        out_features=draw(st.integers(1, 40)),
        in_features=n,
        kept=draw(st.integers(1, n)),
        rank=draw(st.integers(0, 4)),
        signs=signs,
        value_dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
    )


def error_bound(weight, inputs):
    """Largest possible error of each output, [t, m]: float32 sums, and half a step for fixed-point inputs."""
    dense = reference.unpack(weight).double()
    bound = 1e-5 * inputs.double().abs() @ dense.abs().T
    if weight.scales is not None:
        kept, _ = weight.masks(0, weight.out_features)
        steps = _largest_of_block(inputs) @ (dense.abs() * kept).T
        for left, right in zip(weight.left.T, weight.right[:, : weight.in_features], strict=True):
            steps += _largest_of_block(inputs * right) @ (~kept).double().T * left.double().abs()
        bound += 0.51 / FIXED_POINT_STEPS * steps
    return bound + 1e-12


def _largest_of_block(inputs):
    n = inputs.shape[1]
    blocks = torch.nn.functional.pad(inputs.double().abs(), (0, -n % 64)).unflatten(1, (-1, 64))
    return blocks.amax(dim=2, keepdim=True).expand_as(blocks).flatten(1)[:, :n]


def random_symbols(m, n, bits, rotation=None, seed=0):
    """A weight in symbols, packed; every ninth row has scale 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (m, n), generator=generator, dtype=torch.uint8)
    scales = torch.rand(m, generator=generator).half() + 0.1
    scales[8::9] = 0
    levels = torch.randint(-128, 128, (2**bits,), generator=generator, dtype=torch.int8)
    return pack_symbols(SymbolWeight(codes, scales, levels, rotation))

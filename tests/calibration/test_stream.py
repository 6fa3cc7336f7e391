import pytest
import torch

from slablm.calibration import stream


@pytest.mark.parametrize(
    ("windows", "tokens", "expected"),
    [
        (3, 20, [(w, 0) for w in range(3)]),  # shorter than a piece
        (2, 128, [(0, 0), (0, 64), (1, 0), (1, 64)]),
        (2, 150, [(0, 0), (0, 64), (1, 0), (1, 64)]),  # what is left over is not used
        (5, 128, [(0, 0), (0, 64), (1, 0), (2, 0), (2, 64), (3, 64), (4, 0)]),  # from all over the windows
    ],
)
def test_pieces(monkeypatch, windows, tokens, expected):
    monkeypatch.setattr(stream, "PIECES", 7)
    monkeypatch.setattr(stream, "PIECE_TOKENS", 64)
    ids = torch.arange(windows * tokens).view(windows, tokens)
    pieces = stream._pieces(ids)
    assert [divmod(int(piece[0]), tokens) for piece in pieces] == expected
    assert all(torch.equal(piece, torch.arange(int(piece[0]), int(piece[0]) + len(piece))) for piece in pieces)
    assert pieces.shape[1] == min(64, tokens)


def test_differentiable_in_the_weights_given(tiny_model):
    """A block with other weights gives what it would give with them inside, and itself stays as it is."""
    from slablm import CompressionConfig
    from slablm.compression.store import BlockStore
    from slablm.system.distributed import ALONE

    blocks, windows = tiny_model.model.layers, torch.arange(60).view(2, 30)
    config = CompressionConfig(refine=True)
    calibration = stream.Calibration(tiny_model, blocks, windows, config, BlockStore(), ALONE)
    layer = blocks[1].mlp.up_proj
    before, other = layer.weight.detach().clone(), torch.randn_like(layer.weight, requires_grad=True)
    output = calibration.run_with(1, {layer: other}, calibration.pieces[1])
    (gradient,) = torch.autograd.grad(output.square().sum(), [other])
    assert gradient.abs().sum() > 0
    assert torch.equal(layer.weight, before)
    layer.weight.data = other.detach()
    assert torch.equal(calibration.dense_outputs(1)[1], output)

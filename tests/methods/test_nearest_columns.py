import torch
from hypothesis import given

from slablm.methods.nearest_columns import nearest_columns
from tests.methods.blocks import blocks, check_settled


@given(blocks)
def test_every_entry_becomes_the_nearest_value(arguments):
    before = [part if part is None else part.clone() for part in arguments]
    check_settled(arguments, *nearest_columns(*arguments))
    assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_of_equally_near_values_it_is_the_smaller_level_and_the_background():
    current, one = torch.tensor([[-2.0]]), torch.ones(1)
    # 2 lies between the levels 1 and 3; then as far from the level as from the background.
    for levels, right, expected in (([1.0, 3.0], 9.0, 1.0), ([1.0], 3.0, 3.0)):
        columns, errors = nearest_columns(
            current, None, one[None], one, one, right * one, one[None], one.long() - 1, torch.tensor(levels)
        )
        assert columns.item() == -expected
        assert errors.item() == expected - 2

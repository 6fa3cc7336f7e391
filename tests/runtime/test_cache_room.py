"""Room in caches: layers show what concatenation would have made, and nobody writes where somebody else reads."""

import copy
import gc
from threading import Thread

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from slablm.runtime import cache_room
from slablm.runtime.cache_room import known_room, make_room
from slablm.runtime.kernels import native
from tests.runtime.test_token_path import (
    assert_alike,
    assert_caches_alike,
    compared,
    fed,
    gone_on,
    model_of,
    model_on_path,
    tokens_of,
)

needs_library = pytest.mark.skipif(isinstance(native.load(), str), reason="no compiled kernels")
BEGINNING = 5


def room_of(layer):
    if known_room(layer) is None:
        make_room([layer])
    return known_room(layer)


class Pair:
    """A layer of a cache that has room, and one that grows by concatenation; both get the same tokens."""

    def __init__(self, window=None, tokens=BEGINNING):
        kind, arguments = (DynamicLayer, ()) if window is None else (DynamicSlidingWindowLayer, (window,))
        self.layer, self.plain, self.window = kind(*arguments), kind(*arguments), window
        self.generator = torch.Generator().manual_seed(0)
        given = self.random(tokens)
        self.layer.update(*given)
        self.plain.update(*given)

    def random(self, tokens=1):
        return [torch.randn(2, 3, tokens, 4, generator=self.generator) for _ in range(2)]

    def add(self, tokens=1):
        """One after the other, as the path of a token does. Returns the room."""
        for _ in range(tokens):
            keys, values = self.random()
            room = room_of(self.layer)
            room.keys[:, :, room.slot], room.values[:, :, room.slot] = keys[:, :, 0], values[:, :, 0]
            count = self.layer.keys.shape[2] + 1
            room.show(self.layer, count if self.window is None else min(count, self.window - 1))
            self.plain.update(keys, values)
            self.check()
        return room

    def check(self):
        assert torch.equal(self.layer.keys, self.plain.keys)
        assert torch.equal(self.layer.values, self.plain.values)

    def copied(self, way):
        """A pair that goes on with other tokens."""
        other = copy.copy(self)
        other.layer, other.plain = way(self.layer), copy.deepcopy(self.plain)
        other.generator = torch.Generator().manual_seed(1)
        return other


@pytest.mark.parametrize("window", [None, 2, 8, 100])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_it_shows_what_concatenation_makes(window, tokens):
    Pair(window, tokens).add(250)


@pytest.mark.parametrize("window", [None, 8])
def test_tokens_are_moved_only_when_there_is_no_more_room(window):
    pair, places = Pair(window), []
    for _ in range(400):
        room = pair.add()
        places.append((room.keys.data_ptr(), room.values.data_ptr()))
        for shown, whole in ((pair.layer.keys, room.keys), (pair.layer.values, room.values)):
            assert shown.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert whole.shape[2] <= 2 * max(64, shown.shape[2])
    moves = [i for i in range(1, 400) if places[i] != places[i - 1]]
    assert moves[0] == 64
    # Half as much again each time; a window always moves the few tokens that it has.
    assert len(moves) <= (5 if window is None else 6)


def test_a_layer_is_as_it_was_until_the_token_is_shown():
    """The block may still have to run itself."""
    pair = Pair()
    for _ in range(3):
        keys, values = pair.layer.keys, pair.layer.values
        room = room_of(pair.layer)
        room.keys[:, :, room.slot], room.values[:, :, room.slot] = torch.nan, torch.nan
        assert pair.layer.keys is keys
        assert pair.layer.values is values
        pair.check()
        new = pair.random()
        pair.layer.update(*new)
        pair.plain.update(*new)
        pair.add(2)


CHANGES = {
    "cropped": lambda tensor: tensor[:, :, :-2],
    "reordered": lambda tensor: tensor.index_select(0, torch.tensor([1, 0])),
    "expanded": lambda tensor: tensor[:1].expand(2, -1, -1, -1),
    "cloned": torch.Tensor.clone,
    "a view of the same": lambda tensor: tensor[:],
    "of another type": torch.Tensor.double,
}


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["both", "keys", "values"])
def test_other_tensors_get_room_of_their_own(window, change, which):
    both = which == "both" or change == "cropped"  # there are always as many keys as values
    names = ("keys", "values") if both else (which,)
    pair = Pair(window)
    room = pair.add(10)
    kept = {name: getattr(pair.layer, name) for name in names}
    before = {name: tensor.clone() for name, tensor in kept.items()}
    for layer in (pair.layer, pair.plain):
        for name in names:
            setattr(layer, name, CHANGES[change](getattr(layer, name)))
    assert known_room(pair.layer) is None
    assert pair.add(3) is not room
    assert all(torch.equal(kept[name], before[name]) for name in names)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("first", [0, 1])
def test_copies_do_not_share_a_slot(way, first):
    pair = Pair()
    room = pair.add(10)
    pairs = [pair, pair.copied(way)]
    assert known_room(pairs[1].layer) is None
    for i in range(6):
        pairs[(first + i) % 2].add(1 + i // 2)
        for each in pairs:
            each.check()
    assert known_room(pair.layer) is room


def test_what_somebody_has_kept_stays():
    pair, kept = Pair(), []
    for _ in range(100):
        pair.add()
        kept.append((pair.layer.keys, pair.plain.keys))
        if len(kept) % 10 == 0:
            pair.layer.crop(-4)
            pair.plain.crop(-4)
    assert all(torch.equal(*tensors) for tensors in kept)


def test_room_goes_with_its_layer():
    gc.collect()
    before, pair = len(cache_room._ROOMS), Pair()
    pair.add(3)
    assert len(cache_room._ROOMS) == before + 1
    del pair
    gc.collect()
    assert len(cache_room._ROOMS) == before


@needs_library
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_what_generate_does_to_caches(family, way):
    """Beams reorder them, guesses are cropped from them."""
    model, tokens = model_on_path(family), tokens_of(1)[:, [1, 2, 3, 1, 2]]
    arguments = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, "attention_mask": tokens * 0 + 1}
    given, own, taken = compared(lambda: model.generate(tokens, **arguments, **way))
    assert torch.equal(given, own)
    assert taken > 0


@needs_library
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sequences_that_part(family):
    """A cache and its copy go on with other tokens in turns; then two of them are taken back, and that is copied."""
    model, tokens = model_on_path(family, sliding_window=32), tokens_of(3)

    def run():
        caches = [DynamicCache(config=model.config)]
        logits = [fed(model, tokens[:1, :9], caches[0])]
        caches += [copy.deepcopy(caches[0])]
        for i in range(9, 12):
            logits += [fed(model, tokens[k : k + 1, i : i + 1], cache) for k, cache in enumerate(caches)]
        caches[0].crop(-2)
        caches += [copy.deepcopy(caches[0])]
        logits += [fed(model, tokens[2:, 12:], cache, prompt=0) for cache in caches]
        return torch.cat(logits, dim=1), caches

    (logits, caches), (own_logits, own_caches), taken = compared(run)
    assert taken == 2 * (4 + 6 + 15)
    assert_alike(logits, own_logits)
    for cache, own in zip(caches, own_caches, strict=True):
        assert_caches_alike(cache, own)


@needs_library
def test_a_cache_that_knows_no_windows_and_began_in_inference_mode():
    model, tokens = model_on_path("mistral"), tokens_of()

    def run():
        cache = DynamicCache()
        with torch.inference_mode():
            logits = fed(model, tokens[:, :9], cache)
        return torch.cat([logits, fed(model, tokens[:, 9:], cache, prompt=0)], dim=1)

    logits, own, taken = compared(run)
    assert taken == 2 * 12
    assert_alike(logits, own)


OTHER_CACHES = {
    "an empty one": lambda model: fed(model, tokens_of(2, 1)),
    "none": lambda model: model(tokens_of(2, 1), use_cache=False).logits,
    "a static one": lambda model: fed(model, tokens_of(), StaticCache(config=model.config, max_cache_len=32)),
}


@needs_library
@pytest.mark.parametrize("other", OTHER_CACHES)
def test_other_caches_are_left_to_the_block(other):
    model = model_on_path(num_hidden_layers=1)
    given, own, taken = compared(lambda: OTHER_CACHES[other](model))
    assert torch.equal(given, own)
    assert taken == 0


def random_mask(*shape):
    return torch.randn(*shape, 1, 9, generator=torch.Generator().manual_seed(0))


MASKS = {
    "of one row": (random_mask(1, 1) > 0, True),
    "of every sequence": (random_mask(2, 1) > 0, True),
    "with gaps": ((random_mask(2, 4) > 0)[:, :1], True),
    "of every head": (random_mask(2, 4) > 0, False),
    "of numbers": (random_mask(2, 1), False),
}


@needs_library
@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_callers_make(mask):
    model, cache, (given_mask, readable) = model_on_path(num_hidden_layers=1), DynamicCache(), MASKS[mask]
    fed(model, tokens_of(2, 8), cache, prompt=8)
    given, own, taken = gone_on(cache, lambda cache: fed(model, tokens_of(2, 1), cache, attention_mask=given_mask))
    assert_alike(given, own)
    assert taken == readable


@needs_library
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 32}])
def test_caches_that_do_not_fit_are_refused(changes):
    """Of two sequences, and for the last two of another model. The kernels would read and write elsewhere."""
    model, other, cache = model_on_path(head_dim=16), model_of(**({"head_dim": 16} | changes)), DynamicCache()
    fed(other, tokens_of(2, 5), cache)
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors"):
        fed(model, tokens_of(2 if changes else 1, 1), cache)


@needs_library
def test_threads_generate_beside_each_other():
    model, tokens = model_on_path(), tokens_of(4)
    expected, results = [fed(model, row) for row in tokens[:, None]], [None] * 4

    def work(i):
        results[i] = fed(model, tokens[i : i + 1])

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))

"""The bytes of one layer: what is written is read back, whatever is resized or fails in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ctxopt.pages.rows import Stretch
from hf_ctxopt.pages.storage import LayerStorage, page_bytes, unique_bytes

HEADS, KEY_DIM, VALUE_DIM, PAGE = 2, 3, 5, 4


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K `(heads, count, key_dim)` and V `(heads, count, value_dim)`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, count, KEY_DIM, generator=draw), torch.randn(HEADS, count, VALUE_DIM, generator=draw)


def filled(capacity: int) -> tuple[LayerStorage, torch.Tensor, torch.Tensor]:
    """A storage whose every slot is written, and what was written."""
    keys, values = tokens(capacity * PAGE)
    storage = LayerStorage(keys[None], values[None], PAGE, capacity)
    storage.write(keys, values, 0)
    return storage, keys, values


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th allocation from now on raises."""
    original, count = torch.Tensor.new_zeros, [0]

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == number:
            raise torch.OutOfMemoryError("no memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_zeros", allocate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_and_dtype_come_from_the_first_states(dtype: torch.dtype) -> None:
    keys, values = (part[None].to(dtype) for part in tokens(1))
    storage = LayerStorage(keys, values, PAGE, 6)
    assert storage.keys.shape == (HEADS, 6, PAGE, KEY_DIM)
    assert storage.values.shape == (HEADS, 6, PAGE, VALUE_DIM)
    assert storage.keys.dtype == storage.values.dtype == dtype
    expected = PAGE * HEADS * (KEY_DIM + VALUE_DIM) * dtype.itemsize
    assert storage.page_bytes == page_bytes(keys, values, PAGE) == expected
    assert unique_bytes([storage.keys, storage.values]) == 6 * expected


def test_unwritten_slots_are_zero_not_whatever_was_there() -> None:
    keys, values = tokens(1)
    storage = LayerStorage(keys[None], values[None], PAGE, 50)
    assert not storage.keys.any()
    assert not storage.values.any()


def test_a_stretch_across_pages_is_read_as_a_view() -> None:
    storage, keys, values = filled(3)
    found_keys, found_values = storage.read(Stretch(slot=3, token=0, length=7))
    assert torch.equal(found_keys, keys[:, 3:10])
    assert torch.equal(found_values, values[:, 3:10])
    assert found_keys.untyped_storage().data_ptr() == storage.keys.untyped_storage().data_ptr()
    storage.write(keys[:, :1] + 1, values[:, :1] + 1, 3)
    assert torch.equal(found_keys[:, 0], keys[:, 0] + 1)


def test_writing_touches_no_other_slot() -> None:
    storage, keys, values = filled(3)
    new_keys, new_values = tokens(5, seed=1)
    storage.write(new_keys, new_values, 2)
    everything = Stretch(0, 0, 12)
    found_keys, found_values = storage.read(everything)
    assert torch.equal(found_keys, torch.cat([keys[:, :2], new_keys, keys[:, 7:]], dim=1))
    assert torch.equal(found_values, torch.cat([values[:, :2], new_values, values[:, 7:]], dim=1))


def test_gather_copies_slots_per_row() -> None:
    storage, keys, values = filled(3)
    slots = torch.tensor([[0, 11, 5], [7, 7, 0]])
    found_keys, found_values = storage.gather(slots)
    assert found_keys.shape == (2, HEADS, 3, KEY_DIM)
    assert found_values.shape == (2, HEADS, 3, VALUE_DIM)
    for row in range(2):
        assert torch.equal(found_keys[row], keys[:, slots[row]])
        assert torch.equal(found_values[row], values[:, slots[row]])


def test_gather_from_a_storage_without_pages() -> None:
    """A batch of which only padding was fed yet has dense columns and no page; masks hide them."""
    keys, values = tokens(1)
    storage = LayerStorage(keys[None], values[None], PAGE, 0)
    found_keys, found_values = storage.gather(torch.zeros(2, 3, dtype=torch.long))
    assert (found_keys.shape, found_values.shape) == ((2, HEADS, 3, KEY_DIM), (2, HEADS, 3, VALUE_DIM))
    assert not found_keys.any()
    assert not found_values.any()


def test_copied_pages_are_equal_byte_for_byte_and_their_sources_unchanged() -> None:
    storage, keys, values = filled(4)
    storage.copy_pages([(1, 3), (0, 2)])
    paged_keys, paged_values = keys.view(HEADS, 4, PAGE, -1), values.view(HEADS, 4, PAGE, -1)
    assert torch.equal(storage.keys, paged_keys[:, [0, 1, 0, 1]])
    assert torch.equal(storage.values, paged_values[:, [0, 1, 0, 1]])


@pytest.mark.parametrize("capacity", [0, 1, 3, 4, 9])
def test_resizing_keeps_the_pages_that_remain(capacity: int) -> None:
    storage, keys, values = filled(4)
    storage.resize(capacity)
    kept = min(4, capacity)
    assert storage.capacity == capacity
    assert torch.equal(storage.keys[:, :kept], keys.view(HEADS, 4, PAGE, -1)[:, :kept])
    assert torch.equal(storage.values[:, :kept], values.view(HEADS, 4, PAGE, -1)[:, :kept])
    assert not storage.keys[:, kept:].any()


def test_compacting_moves_the_listed_pages_to_the_front_and_frees_the_rest() -> None:
    storage, keys, values = filled(5)
    storage.keys, storage.values = storage.compacted([1, 4], 3)
    assert torch.equal(storage.keys[:, :2], keys.view(HEADS, 5, PAGE, -1)[:, [1, 4]])
    assert torch.equal(storage.values[:, :2], values.view(HEADS, 5, PAGE, -1)[:, [1, 4]])
    assert unique_bytes([storage.keys, storage.values]) == 3 * storage.page_bytes


@pytest.mark.parametrize("number", [1, 2])
def test_a_resize_that_fails_changes_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, keys, values = filled(2)
    fail_at(monkeypatch, number)
    with pytest.raises(torch.OutOfMemoryError):
        storage.resize(6)
    assert storage.keys.shape[1] == storage.values.shape[1] == 2
    assert torch.equal(storage.keys.flatten(1, 2), keys)
    assert torch.equal(storage.values.flatten(1, 2), values)


def test_bytes_of_a_shared_storage_count_once() -> None:
    whole = torch.zeros(10, 10)
    assert unique_bytes([whole, whole[3:], whole.t()]) == 400
    assert unique_bytes([whole, torch.zeros(5)]) == 420
    assert unique_bytes([]) == 0


def test_append_writes_the_last_token_and_reads_the_stretch() -> None:
    storage, keys, values = filled(4)
    new = torch.full((1, HEADS, 1, KEY_DIM), 7.0, requires_grad=True), torch.full((1, HEADS, 1, VALUE_DIM), 8.0)
    held = Stretch(PAGE + 1, 0, PAGE + 2)
    read = storage.append(*new, held)
    keys[:, 2 * PAGE + 2], values[:, 2 * PAGE + 2] = 7.0, 8.0
    for found, written, kept in zip(read, (keys, values), storage.read(held), strict=True):
        assert torch.equal(found[0], written[:, PAGE + 1 : 2 * PAGE + 3])
        assert torch.equal(found[0], kept)
        assert not found.requires_grad
    assert torch.equal(storage.read(Stretch(0, 0, 4 * PAGE))[0], keys)  # nothing else was written


def test_append_where_values_have_no_channels() -> None:
    keys, values = torch.randn(1, HEADS, 1, KEY_DIM), torch.zeros(1, HEADS, 1, 0)
    storage = LayerStorage(keys, values, PAGE, 2)
    read = storage.append(keys, values, Stretch(0, 0, PAGE + 1))
    assert [tuple(states.shape) for states in read] == [(1, HEADS, PAGE + 1, dim) for dim in (KEY_DIM, 0)]
    assert torch.equal(read[0][:, :, -1:], keys)

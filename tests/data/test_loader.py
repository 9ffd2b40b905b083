import numpy as np
import pytest

from tcq.data import loader

IMAGES = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)


def ids(count, **options):
    indices = np.arange(3, 48)
    stream = loader.batches(IMAGES, indices, batch_size=8, seed=1, **options)
    batches = [next(stream) for _ in range(count)]
    for batch in batches:
        np.testing.assert_array_equal(batch["index"], batch["image"][..., 0, 0, 0])
    return [batch["index"] for batch in batches]


def test_each_epoch_shows_every_training_image_once_in_another_order():
    flat = np.concatenate([b.ravel() for b in ids(90)])[: 45 * 16].reshape(16, 45)
    np.testing.assert_array_equal(np.sort(flat, axis=1), np.tile(np.arange(3, 48), (16, 1)))
    assert len({tuple(row) for row in flat}) == 16


def test_resuming_gives_the_same_batches():
    whole = ids(12)
    for start in (0, 1, 7):
        for expected, got in zip(whole[start:], ids(12 - start, first_step=start), strict=True):
            np.testing.assert_array_equal(expected, got)


@pytest.mark.parametrize(("devices", "processes"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_the_global_batch_does_not_depend_on_devices_and_processes(devices, processes):
    whole = ids(4)
    parts = [ids(4, num_devices=devices, process=p, num_processes=processes) for p in range(processes)]
    for step in range(4):
        assert parts[0][step].shape == (devices, 8 // devices // processes)
        np.testing.assert_array_equal(np.concatenate([p[step].ravel() for p in parts]), whole[step].ravel())


def test_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by 1 processes x 3 devices"):
        ids(1, num_devices=3)

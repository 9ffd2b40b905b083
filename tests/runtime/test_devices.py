import jax
import jax.numpy as jnp
import numpy as np

from tcq.runtime import devices


def test_batches_arrive_in_order_and_on_the_devices():
    batches = [{"index": np.full((8, 2), i, np.int32)} for i in range(5)]
    results = list(devices.prefetch(iter(batches)))
    assert [int(b["index"][3, 1]) for b in results] == [0, 1, 2, 3, 4]
    assert len(results[0]["index"].addressable_shards) == 8


def test_a_checksum_depends_on_every_bit_and_its_place():
    a = jnp.arange(8.0)
    trees = (a, a[::-1], a.at[0].set(-0.0))
    sums = [set(devices.checksums(devices.replicate(x)).values()) for x in trees]
    assert all(len(s) == 1 for s in sums) and len(set.union(*sums)) == 3


def test_rows_are_mapped_in_padded_batches():
    seen = []

    def double(scale, rows):
        seen.append(rows["x"].shape)
        return {"y": rows["x"] * scale}

    run = devices.pmap_rows(double)
    rows = {"x": np.arange(37, dtype=np.float32)}
    for size in (1, 3, 64):
        result = devices.map_in_batches(run, 2.0, rows, size)
        np.testing.assert_array_equal(result["y"], 2 * rows["x"])
    assert seen == [(1,), (3,), (37,)]  # one shape for each batch size, whatever the number of devices


def test_fetched_arrays_are_copies():
    x = devices.replicate({"a": np.arange(3.0)})
    fetched = devices.fetch(x)
    jax.tree.map(lambda a: a.delete(), x)
    np.testing.assert_array_equal(fetched["a"], np.arange(3.0))


def test_arrays_that_are_placed_stay_where_they_are(run, monkeypatch):
    from tcq import encode

    encoder = encode.load(run)
    transferred, put = [], jax.device_put

    def counted(x, *arguments, **options):
        transferred.append(np.size(x))
        return put(x, *arguments, **options)

    monkeypatch.setattr(jax, "device_put", counted)
    again = devices.place(encoder.variables)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(encoder.variables), strict=True))
    encode.encode(encoder, np.zeros((3, 8, 8, 3), np.uint8))
    assert not transferred  # a search does not send the weights again

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcq.models import vit

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def features(images, train=False, rngs=None, **attributes):
    model = vit.ViT(**(SMALL | attributes))
    params = model.init(jax.random.key(0), images)
    return model.apply(params, images, train=train, rngs=rngs), params


@pytest.fixture
def images():
    return jnp.asarray(np.random.RandomState(0).rand(3, 8, 8, 3), jnp.float32)


@pytest.mark.parametrize("pooling", vit.POOLINGS)
@pytest.mark.parametrize("positions", vit.POSITIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(images, pooling, positions, dtype):
    x, params = features(images, pooling=pooling, positions=positions, dtype=jnp.dtype(dtype))
    assert x.shape == (3, 64 if pooling == "flat" else 16) and x.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full, _ = features(images, pooling=pooling, positions=positions)
    np.testing.assert_allclose(x, full, atol=0.1)


def test_an_image_does_not_see_its_neighbours(images):
    alone, _ = features(images[1:2], pooling="cls")
    together, _ = features(images, pooling="cls")
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_positions_matter_and_every_patch_is_seen(images):
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    for positions in vit.POSITIONS:
        a, _ = features(images, pooling="mean", positions=positions)
        b, _ = features(swapped, pooling="mean", positions=positions)
        assert float(jnp.abs(a - b).max()) > 1e-3
    model = vit.ViT(**SMALL)
    params = model.init(jax.random.key(0), images)
    seen = jax.grad(lambda x: jnp.sum(model.apply(params, x) ** 2))(images)
    assert (np.abs(seen).reshape(3, 2, 4, 2, 4, 3).max(axis=(2, 4, 5)) > 0).all()


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_dropout_and_stochastic_depth_act_only_in_training(images, rate):
    quiet, _ = features(images, **{rate: 0.5})
    plain, _ = features(images)
    np.testing.assert_array_equal(quiet, plain)
    a, _ = features(images, train=True, rngs={"dropout": jax.random.key(1)}, **{rate: 0.5})
    b, _ = features(images, train=True, rngs={"dropout": jax.random.key(2)}, **{rate: 0.5})
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_stochastic_depth_keeps_the_expectation():
    y = vit.stochastic_depth(jnp.ones((4000, 1, 2)), 0.25, jax.random.key(0))
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1.3333)}
    assert abs(float(y.mean()) - 1) < 0.05
    np.testing.assert_array_equal(y[..., 0], y[..., 1])


def test_the_first_block_is_never_dropped_and_the_last_at_the_given_rate(images):
    model = vit.ViT(**SMALL, drop_path=0.999)
    params = model.init(jax.random.key(0), images)
    run = jax.jit(lambda p: model.apply(p, images, train=True, rngs={"dropout": jax.random.key(0)}))

    def without(block):
        zero = jax.tree.map(jnp.zeros_like, params["params"][block])
        return {"params": {**params["params"], block: zero}}

    assert float(jnp.abs(run(params) - run(without("block_0"))).max()) > 1e-3
    np.testing.assert_array_equal(run(params), run(without("block_1")))


@pytest.mark.whole
def test_scan_and_remat_change_neither_parameters_nor_results(images):
    shape = SMALL | {"depth": 3, "layer_scale": True, "registers": 2, "dropout": 0.2, "drop_path": 0.4}
    params = vit.ViT(**shape).init(jax.random.key(0), images)

    def run(**options):
        model = vit.ViT(**shape, **options)
        jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0), images))

        def loss(params):
            x = model.apply(params, images, train=True, rngs={"dropout": jax.random.key(1)})
            return jnp.sum(jnp.sin(x)), x

        louder = jax.tree.map(lambda p: p + 0.1, params)  # layer scale begins near zero
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, has_aux=True))(louder))

    plain = run()
    for options in ({"scan": True}, {"remat": True}, {"scan": True, "remat": True}):
        for a, b in zip(plain, run(**options), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5, err_msg=str(options))


@pytest.mark.whole
def test_remat_stores_less_and_scan_compiles_one_block():
    images = jnp.ones((64, 32, 32, 3))

    def program(**options):
        model = vit.ViT(**(SMALL | {"depth": 8}), **options)
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, images, train=True) ** 2))).lower(params)

    loop = program(scan=True)
    assert len(loop.as_text()) < 0.6 * len(program().as_text())
    memory = [p.compile().memory_analysis().temp_size_in_bytes for p in (loop, program(scan=True, remat=True))]
    assert memory[1] < 0.5 * memory[0]
    assert program(remat=True).as_text().count("dot_general") > 1.2 * program().as_text().count("dot_general")


def test_extra_tokens_are_seen_but_not_pooled(images):
    for pooling in ("cls", "mean", "flat", "attention"):
        model = vit.ViT(**SMALL, pooling=pooling, class_token=True, registers=3)
        params = model.init(jax.random.key(0), images)["params"]
        assert params["cls"].shape == (1, 1, 16) and params["registers"].shape == (1, 3, 16)
        x = model.apply({"params": params}, images)
        assert x.shape == (3, 64 if pooling == "flat" else 16)
        moved = model.apply({"params": params | {"registers": params["registers"] + 1}}, images)
        assert float(jnp.abs(x - moved).max()) > 1e-5
    without_blocks = {
        k: params[k] for k in ("embed", "positions", "norm")
    }  # without blocks the class token does not reach the patches
    alone = vit.ViT(**(SMALL | {"depth": 0}), pooling="mean")
    both = alone.clone(class_token=True)
    np.testing.assert_array_equal(
        alone.apply({"params": without_blocks}, images),
        both.apply({"params": without_blocks | {"cls": params["cls"] + 9}}, images),
    )


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_convolutional_stem_gives_a_vector_for_each_patch(images, patch):
    x, params = features(images, patch=patch, stem="conv", pooling="flat")
    assert x.shape == (3, (8 // patch) ** 2 * 16)
    stem = params["params"]["stem"]
    channels = [stem[f"conv_{i}"]["kernel"].shape[-1] for i in range(patch.bit_length() - 1)]
    assert channels[-1] == 16 and all(b == 2 * a for a, b in zip(channels, channels[1:], strict=False))
    assert "embed" not in params["params"] and "out" in stem


def test_the_stem_is_that_of_convolutions_by_hand(images):
    _, params = features(images, stem="conv")
    stem, x = params["params"]["stem"], np.asarray(images, np.float64)
    for i in range(2):
        kernel = np.asarray(stem[f"conv_{i}"]["kernel"], np.float64)
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        side = x.shape[1] // 2
        x = np.zeros((3, side, side, kernel.shape[-1]))
        for r in range(side):
            for c in range(side):
                x[:, r, c] = np.einsum("nabi,abio->no", padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3], kernel)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = np.maximum(x * np.asarray(stem[f"norm_{i}"]["scale"]) + np.asarray(stem[f"norm_{i}"]["bias"]), 0)
    x = x @ np.asarray(stem["out"]["kernel"])[0, 0] + np.asarray(stem["out"]["bias"])
    ours = vit.ConvStem(16, 4, 1e-6, jnp.float32).apply({"params": stem}, images)
    np.testing.assert_allclose(ours, x, atol=1e-4)

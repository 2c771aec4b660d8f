"""Flipout on the TFP face: what the estimator is, and the layer's own seed."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import tfp_layers
import torch
from tfp_layers import RANDOM_BIAS, built, make, own_sample
from torch import Tensor

import fastbconv as fb
from fastbconv import noise
from fastbconv.layers import tfp
from fastbconv.layers.tfp_variables import to_operator

FLIPOUT = [name for name in tfp_layers.NAMES if name.endswith("Flipout")]
FUNCTIONS = pytest.mark.parametrize("function", [tfp.posterior_sample, own_sample])
SEED = torch.tensor([5, 1])


# --- the estimator --------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("name", FLIPOUT)
def test_the_mean_is_never_flipped(name: str, function: Any) -> None:
    """Without scale every call is the mean convolution."""
    layer, x = built(name, kernel_posterior_tensor_fn=function)
    with torch.no_grad():
        layer.kernel_posterior_untransformed_scale.fill_(-60.0)
    with fb.mean_weights(layer):
        want = layer(x)
    for _ in range(2):
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@FUNCTIONS
@pytest.mark.parametrize("name", FLIPOUT)
def test_every_row_has_a_kernel_of_its_own(name: str, function: Any) -> None:
    """Row n is the map with the kernel loc + delta * r[n] t[n]^T."""
    layer, x = built(name, kernel_posterior_tensor_fn=function)
    output = layer(x, seed=SEED)
    delta = layer.kernel_posterior_affine_tensor
    sign_input = noise.random_signs(SEED, (len(x), x.shape[-1]), stream="sign_input")
    sign_output = noise.random_signs(SEED, (len(x), 4), stream="sign_output")
    for n, row in enumerate(x):
        signs = sign_input[n][:, None] * sign_output[n]
        kernel = to_operator(layer.kernel_posterior_loc + delta * signs)
        image = layer._to_operators(row[None])
        want = layer._from_operators(layer._plain(image, kernel)) + layer.bias_posterior_loc
        torch.testing.assert_close(output[n : n + 1], want, rtol=1e-5, atol=1e-5)


def test_signs_of_a_dense_input_with_many_axes() -> None:
    """The rows are the flattened leading axes."""
    layer = make("DenseFlipout")
    x = torch.randn(2, 3, 5, 6)
    output = layer(x, seed=SEED)
    flat = layer(x.reshape(30, 6), seed=SEED)
    torch.testing.assert_close(output, flat.reshape(2, 3, 5, 4))
    assert not torch.allclose(layer(x[:, :1].expand(2, 3, 5, 6), seed=SEED), output)


@FUNCTIONS
@pytest.mark.parametrize("name", FLIPOUT[:-1])
def test_signs_are_constant_over_space(name: str, function: Any) -> None:
    layer, x = built(name, kernel_posterior_tensor_fn=function, **RANDOM_BIAS)
    constant = torch.randn(len(x), *[1] * layer.rank, x.shape[-1]).expand_as(x)
    output = layer(constant).flatten(1, -2)
    torch.testing.assert_close(output, output[:, :1].expand_as(output), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLIPOUT)
def test_marginals_are_those_of_one_draw_and_rows_are_uncorrelated(name: str) -> None:
    layer, x = built(name, bias_posterior_fn=None)
    x = x[:1].expand(2, *x.shape[1:])  # the same row twice
    other = tfp_layers.twin(
        layer, tfp_layers.stem_of(name) + "Reparameterization", bias_posterior_fn=None
    )
    draws = 2000
    torch.set_num_threads(1)
    with torch.no_grad():
        flipout = torch.stack([layer(x, seed=n) for n in range(draws)]).double().flatten(2)
        shared = torch.stack([other(x, seed=n) for n in range(draws)]).double().flatten(2)
        with fb.mean_weights(layer):
            mean = layer(x).double().flatten(1)
    variance = shared.var(0)
    assert ((flipout.mean(0) - mean).abs() / (variance / draws).sqrt()).max() < 5
    assert ((flipout.var(0) - variance).abs() / (variance * (4 / draws) ** 0.5)).max() < 5
    assert torch.equal(shared[:, 0], shared[:, 1])
    first, second = (flipout[:, row] - mean[row] for row in (0, 1))
    correlation = (first * second).mean(0) / variance[0]
    # Both are sums over channels of one normal draw, with other signs: the product's variance is
    # up to three times that of independent normals.
    assert correlation.abs().max() < 5 * (3 / draws) ** 0.5


# --- the layer's own seed -------------------------------------------------------------------------


def _calls(layer: Any, x: Tensor, count: int = 3) -> list[Tensor]:
    return [layer(x) for _ in range(count)]


@FUNCTIONS
@pytest.mark.parametrize("name", FLIPOUT)
def test_a_seed_of_the_layers_own(name: str, function: Any) -> None:
    """Its sequence of draws is the layer's: no global seed governs it, and none is touched."""
    options = {"kernel_posterior_tensor_fn": function, **RANDOM_BIAS}
    layer, x = built(name, seed=7, **options)
    state = torch.get_rng_state()
    first = _calls(layer, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(99)
    for seed, equal in ((7, True), (8, False), (None, False)):
        again = tfp_layers.twin(layer, name, seed=seed, **options)
        assert torch.equal(torch.stack(_calls(again, x)), torch.stack(first)) is equal
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(type(layer).from_config(layer.get_config(by_reference=True)))
    copies[-1].load_state_dict(layer.state_dict())
    for clone in copies:  # a copy begins the sequence anew
        assert torch.equal(torch.stack(_calls(clone, x)), torch.stack(first))
    assert "seed" not in " ".join(layer.state_dict())
    # A seed given to the call comes first, and does not advance the sequence.
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x, seed=4), layer(x, seed=4))
    assert torch.equal(clone(x), first[0])


def test_contexts_come_before_the_layers_own_seed() -> None:
    layer, x = built("Convolution2DFlipout", seed=7)
    first = layer(x)
    layer = copy.deepcopy(layer)
    with fb.fixed_sample(layer, 2):
        assert torch.equal(layer(x), layer(x))
    with fb.mean_weights(layer):
        layer(x)
    assert torch.equal(layer(x), first)


def test_what_repeats_a_call_refuses_the_layers_own_seed() -> None:
    """A repetition would draw the next seed of the sequence: other noise than the first run's."""
    layer, x = built("Convolution2DFlipout", seed=7)
    for use_reentrant in (False, True):
        with pytest.raises(NotImplementedError, match=r"checkpoint.* got 7 .*layer\(x, seed="):
            torch.utils.checkpoint.checkpoint(
                layer, x.requires_grad_(), use_reentrant=use_reentrant
            )
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="seed: expected None under"):
        run(x)
    with pytest.raises(NotImplementedError, match=r"torch\.export .* got 7"):
        torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(run(x, seed=SEED), layer(x, seed=SEED))
    want = layer(x, seed=SEED)
    got = torch.utils.checkpoint.checkpoint(layer, x, seed=SEED, use_reentrant=False)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("seed", "error"), [("7", TypeError), (1.5, TypeError), (True, TypeError), (2**64, ValueError)]
)
def test_the_seed_is_checked(seed: Any, error: type[Exception]) -> None:
    for name in ("DenseFlipout", "Convolution1DFlipout"):
        with pytest.raises(error, match=r"seed: expected an integer.* got"):
            make(name, seed=seed)
    with pytest.raises(TypeError, match=r"seed: expected one of the keywords .*Flipout"):
        make("DenseReparameterization", seed=7)


def test_seed_in_configuration_and_repr() -> None:
    layer = make("DenseFlipout", seed=np.int64(7))
    config = json.loads(json.dumps(layer.get_config()))
    assert list(config)[-1] == "seed"
    assert tfp.DenseFlipout.from_config(config).seed == 7
    assert tfp.DenseFlipout.from_config({**config, "seed": None}).seed is None
    assert "seed=7" in repr(layer)
    assert "seed" not in repr(make("DenseFlipout"))

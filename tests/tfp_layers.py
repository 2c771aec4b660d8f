"""One small problem for each layer of the TFP face, and functions of a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbconv.layers import tfp

SPACES: dict[str, tuple[int, ...]] = {
    "Convolution1D": (7,),
    "Convolution2D": (6, 5),
    "Convolution3D": (4, 5, 4),
    "Dense": (),
}
ESTIMATORS = ("Reparameterization", "Flipout", "LocalReparameterization")
NAMES = [stem + estimator for stem in SPACES for estimator in ESTIMATORS]
AFFINE = [name for name in NAMES if not name.endswith("DReparameterization") and "seR" not in name]
CONVOLUTIONS = [name for name in NAMES if not name.startswith("Dense")]
RANDOM_BIAS: dict[str, Any] = {
    "bias_posterior_fn": tfp.default_mean_field_normal_fn(),
    "bias_prior_fn": tfp.default_multivariate_normal_fn,
}


def stem_of(name: str) -> str:
    """``Convolution2DFlipout`` -> ``Convolution2D``."""
    return next(stem for stem in SPACES if name.startswith(stem))


def make(name: str, /, **options: Any) -> Any:
    """A layer of four units or filters with a window of two."""
    window = {} if name.startswith("Dense") else {"kernel_size": 2}
    return getattr(tfp, name)(4, **window, **options)


def image(name: str, rows: int = 3, channels: int = 3) -> Tensor:
    """An input of that layer, channels last."""
    return torch.randn(rows, *SPACES[stem_of(name)], channels)


def built(name: str, /, **options: Any) -> tuple[Any, Tensor]:
    """A built layer and an input."""
    layer, x = make(name, **options), image(name)
    if options.get("data_format") == "channels_first":
        x = x.movedim(-1, 1)
    x = x.to(layer.dtype)
    layer.build(tuple(x.shape))
    return layer, x


def twin(layer: Any, name: str, /, **options: Any) -> Any:
    """Another layer with the same variables."""
    other = make(name, **options)
    other.build((None, *SPACES[stem_of(name)], layer.kernel_posterior_loc.shape[-2]))
    other.set_weights(layer.get_weights())
    return other


def plain_normal(dtype: Any, shape: Any, name: Any, trainable: Any, add: Any) -> Any:
    """A posterior of the user's own: the default one, as torch's plain Normal."""
    loc, scale = tfp.default_loc_scale_fn()(dtype, shape, name, trainable, add)
    return torch.distributions.Normal(loc, scale, validate_args=False)


def laplace(dtype: Any, shape: Any, name: Any, trainable: Any, add: Any) -> Any:
    """A posterior that is not normal."""
    loc, scale = tfp.default_loc_scale_fn()(dtype, shape, name, trainable, add)
    base = torch.distributions.Laplace(loc, scale, validate_args=False)
    return torch.distributions.Independent(base, len(shape), validate_args=False)


def own_sample(distribution: Any) -> Tensor:
    """A tensor function of the user's own."""
    return distribution.sample()


def gradients(layer: Any, x: Tensor, **call: Any) -> list[Tensor]:
    """Output and every gradient of sum(output ** 2)."""
    x = x.detach().requires_grad_()
    output = layer(x, **call)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.trainable_weights])]

"""The TFP face: layers of ``tfp.layers`` with their documented arguments, order and defaults.

Recorded behaviour of TFP that is deliberately not followed:

* Layers of equal shape start from equal values there (one set of numbers per shape), so that a
  trainable prior starts at KL 0. Here every variable is drawn independently.
* The default divergence of plain elementwise distributions is an unsummed tensor there, and a mix
  with Independent ones has no KL. Here both give the sum.
* ``losses`` are computed in the call there and keep its values. Here divergences are computed when
  they are read: they follow the variables, and nothing is held.
* The ``seed`` of a Flipout layer seeds its signs only there, and its perturbations follow the
  global seed. Here it seeds all noise of the layer.
* Flipout and local reparameterisation take a plain elementwise Normal as well as an Independent
  one. A row of zeros gives finite gradients with the latter, where TFP gives NaN.
* A dilated layer remembers the size of its first input there, and a second ``build`` adds more
  variables. Here inputs may change their size, and building again does nothing.
* Values and shapes are checked in the constructor here, some at build or in the call there;
  filters=0 and 0 input channels are ValueErrors. bfloat16 works. A float16 layer computes through
  float32.
* Configurations hold marshalled byte code there, which fails on loading; here they are JSON.
* ``dtype`` is a torch dtype, and ``mean`` and ``stddev`` of a distribution are properties, as
  everywhere in PyTorch.
"""

from __future__ import annotations

from .tfp_channels_last import ChannelsLast
from .tfp_config import register_function
from .tfp_conv import (
    Convolution1DReparameterization,
    Convolution2DReparameterization,
    Convolution3DReparameterization,
)
from .tfp_dense import DenseReparameterization
from .tfp_distribution_classes import Deterministic
from .tfp_distributions import (
    default_loc_scale_fn,
    default_mean_field_normal_fn,
    default_multivariate_normal_fn,
    kl_divergence,
    posterior_mean,
    posterior_sample,
)
from .tfp_flipout import (
    Convolution1DFlipout,
    Convolution2DFlipout,
    Convolution3DFlipout,
    DenseFlipout,
)
from .tfp_local import (
    Convolution1DLocalReparameterization,
    Convolution2DLocalReparameterization,
    Convolution3DLocalReparameterization,
    DenseLocalReparameterization,
)
from .tfp_variables import apply_constraints

__all__ = [
    "ChannelsLast",
    "Convolution1DFlipout",
    "Convolution1DLocalReparameterization",
    "Convolution1DReparameterization",
    "Convolution2DFlipout",
    "Convolution2DLocalReparameterization",
    "Convolution2DReparameterization",
    "Convolution3DFlipout",
    "Convolution3DLocalReparameterization",
    "Convolution3DReparameterization",
    "DenseFlipout",
    "DenseLocalReparameterization",
    "DenseReparameterization",
    "Deterministic",
    "apply_constraints",
    "default_loc_scale_fn",
    "default_mean_field_normal_fn",
    "default_multivariate_normal_fn",
    "kl_divergence",
    "posterior_mean",
    "posterior_sample",
    "register_function",
]

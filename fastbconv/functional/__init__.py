"""Stateless Bayesian layers: check, normalise, choose a kernel, call.

Every function is pure: noise is a function of ``seed`` and of element numbers, backward regenerates
it, and nothing is kept between calls.
"""

from fastbconv.activations import ActivationLike as ActivationLike

from .conv1d import bayes_conv1d
from .conv2d import bayes_conv2d
from .conv3d import bayes_conv3d
from .conv_transpose2d import bayes_conv_transpose2d
from .linear import bayes_linear
from .posterior import kl_normal, sample_posterior

__all__ = [
    "bayes_conv1d",
    "bayes_conv2d",
    "bayes_conv3d",
    "bayes_conv_transpose2d",
    "bayes_linear",
    "kl_normal",
    "sample_posterior",
]

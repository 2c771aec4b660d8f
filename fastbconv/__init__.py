"""fastbconv: Bayesian convolutions for PyTorch at the cost of deterministic ones."""

from . import activations, functional, noise
from ._native import FastbconvBuildError, build_info
from ._version import __version__
from .kl import ScaleMixture
from .layers.conv import BayesConv2d
from .layers.linear import BayesLinear
from .models import (
    build,
    collect_kl,
    fixed_sample,
    kl_loss,
    losses,
    mean_weights,
    param_groups,
    regularization_loss,
)
from .selection import algorithm

__all__ = [
    "BayesConv2d",
    "BayesLinear",
    "FastbconvBuildError",
    "ScaleMixture",
    "__version__",
    "activations",
    "algorithm",
    "build",
    "build_info",
    "collect_kl",
    "fixed_sample",
    "functional",
    "kl_loss",
    "losses",
    "mean_weights",
    "noise",
    "param_groups",
    "regularization_loss",
]

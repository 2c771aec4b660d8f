"""fastbconv: Bayesian convolutions for PyTorch at the cost of deterministic ones."""

from . import (
    activations,
    constraints,
    functional,
    initializers,
    likelihoods,
    noise,
    regularizers,
)
from ._native import FastbconvBuildError, build_info
from ._version import __version__
from .convert import convert
from .deterministic import to_deterministic
from .grouped import grouped
from .kl import ScaleMixture
from .layers.conv import BayesConv1d, BayesConv2d, BayesConv3d
from .layers.conv_transpose import BayesConvTranspose2d
from .layers.lazy import (
    LazyBayesConv1d,
    LazyBayesConv2d,
    LazyBayesConv3d,
    LazyBayesConvTranspose2d,
    LazyBayesLinear,
)
from .layers.linear import BayesLinear
from .layers.tfp import (
    ChannelsLast,
    Convolution1DFlipout,
    Convolution1DLocalReparameterization,
    Convolution1DReparameterization,
    Convolution2DFlipout,
    Convolution2DLocalReparameterization,
    Convolution2DReparameterization,
    Convolution3DFlipout,
    Convolution3DLocalReparameterization,
    Convolution3DReparameterization,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    apply_constraints,
    default_loc_scale_fn,
    default_mean_field_normal_fn,
    default_multivariate_normal_fn,
    posterior_mean,
    posterior_sample,
    register_function,
)
from .models import (
    build,
    collect_kl,
    fixed_sample,
    kl_loss,
    losses,
    mean_weights,
    regularization_loss,
)
from .optimizers import check_optimizer, param_groups
from .prediction import Prediction, predict
from .prune import prune
from .selection import algorithm, explain
from .summary import summary
from .weight_samples import weight_samples

__all__ = [
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesConvTranspose2d",
    "BayesLinear",
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
    "FastbconvBuildError",
    "LazyBayesConv1d",
    "LazyBayesConv2d",
    "LazyBayesConv3d",
    "LazyBayesConvTranspose2d",
    "LazyBayesLinear",
    "Prediction",
    "ScaleMixture",
    "__version__",
    "activations",
    "algorithm",
    "apply_constraints",
    "build",
    "build_info",
    "check_optimizer",
    "collect_kl",
    "constraints",
    "convert",
    "default_loc_scale_fn",
    "default_mean_field_normal_fn",
    "default_multivariate_normal_fn",
    "explain",
    "fixed_sample",
    "functional",
    "grouped",
    "initializers",
    "kl_loss",
    "likelihoods",
    "losses",
    "mean_weights",
    "noise",
    "param_groups",
    "posterior_mean",
    "posterior_sample",
    "predict",
    "prune",
    "register_function",
    "regularization_loss",
    "regularizers",
    "summary",
    "to_deterministic",
    "weight_samples",
]

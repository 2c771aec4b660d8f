"""Local reparameterisation on the TFP face: the pre-activation is drawn, entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from fastbconv import estimators, noise

from .tfp_affine import AffineEstimator
from .tfp_conv import VariationalConv
from .tfp_dense import VariationalDense
from .tfp_distribution_classes import SeededNormal, reparameterized
from .tfp_sampling import Call


class LocalReparameterization(AffineEstimator):
    """z = conv(x, loc) + e * sqrt(conv(x^2, scale^2)); see ``fastbconv.estimators``."""

    _estimator = "local"

    def _affine_distribution(self, loc: Tensor, scale: Tensor, x: Tensor) -> Distribution:
        moments = estimators.local_moments(self._plain, self._to_operators(x), loc, scale)
        mean, deviation = map(self._from_operators, moments)
        return reparameterized(SeededNormal(mean, deviation, validate_args=False))

    def _give_affine_noise(self, distribution: Any, seed: Tensor) -> None:
        shape = distribution.loc.movedim(self._channel_axis, -1).shape

        def eps(number: int) -> Tensor:
            drawn = noise.standard_normal(seed, shape, sample=number, stream="local")
            return drawn.movedim(-1, self._channel_axis)

        distribution.eps_source = eps

    def _pre_activation(self, x: Tensor, loc: Tensor, drawn: Tensor, seed: Tensor) -> Tensor:
        del x, loc, seed
        return drawn

    def _remember(self, call: Call, inputs: Any, output: Tensor) -> None:
        super()._remember(call, inputs, output)
        if call.inputs is not None:
            call.version = _version(inputs)

    def _affine_of(self, last: Call) -> Distribution:
        inputs = None if last.inputs is None else last.inputs()
        if inputs is None:
            raise AttributeError(
                "kernel_posterior_affine: expected the input of the last call to be alive, since "
                f"the layer keeps no tensor of it, got none for layer {self.name!r}; keep a "
                "reference to the tensor that the layer is called with (not kept under "
                "torch.compile)"
            )
        if _version(inputs) != last.version:
            raise AttributeError(
                "kernel_posterior_affine: expected the input of the last call as it was, got one "
                f"that was changed in place since, for layer {self.name!r}; call the layer with a "
                "copy, layer(x.clone()), and keep a reference to that"
            )
        x = self._checked_input(inputs).to(torch.promote_types(self._dtype, torch.float32))
        return self._affine_distribution(*self._kernel_normal(), x)


def _version(inputs: Any) -> int | None:
    """The count of a tensor's changes in place; inference tensors and arrays keep none."""
    if not isinstance(inputs, Tensor) or inputs.is_inference():
        return None
    return inputs._version


class DenseLocalReparameterization(LocalReparameterization, VariationalDense):
    r"""Linear map whose pre-activation is drawn, instead of its kernel: ``tfp.layers``'s layer.

    .. code-block:: text

        z      = kernel_posterior_tensor_fn(N(x @ loc, x^2 @ scale^2))   by default mean + std * eps
        output = activation(z + bias)

    Exact: z is distributed as with a kernel drawn for every row. D. P. Kingma, T. Salimans,
    M. Welling, "Variational dropout and the local reparameterization trick", NeurIPS 2015
    (arXiv:1506.02557). A row of zeros has finite gradients.

    After a call ``kernel_posterior_tensor`` is None, ``kernel_posterior_affine`` is the normal of z
    and ``kernel_posterior_affine_tensor`` is z; both are made again from the present variables and
    the last input, which has to be alive and unchanged. A divergence function gets None as its
    sample.

    Args:
        units: as in ``DenseReparameterization``, like all that follows. The kernel's posterior has
            to be an elementwise normal.

    Shape:
        as in ``DenseReparameterization``.

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction; in the call TypeError
            where the kernel's posterior is not normal, ValueError where it has another shape.

    Example:
        >>> import torch
        >>> tuple(DenseLocalReparameterization(10)(torch.randn(4, 7)).shape)
        (4, 10)
    """


class Convolution2DLocalReparameterization(LocalReparameterization, VariationalConv):
    r"""2D convolution whose pre-activation is drawn, instead of its kernel.

    .. code-block:: text

        z      = conv2d(x, loc) + eps * sqrt(conv2d(x^2, scale^2))        eps as z
        output = activation(z + bias)

    Every entry of z has the right mean and variance, but the entries are independent, while those
    of a convolution are not: neighbouring pixels share weights. Covariances between pixels are
    dropped. It is another objective, not an estimator of the same ELBO with less variance; for that
    take ``Convolution2DFlipout``. ``tfp.layers`` has no such layer. The source, for linear maps, is
    that of ``DenseLocalReparameterization`` (arXiv:1506.02557).

    Args:
        filters: as in ``Convolution2DReparameterization``, like all that follows. The kernel's
            posterior has to be an elementwise normal; ``kernel_posterior_tensor_fn`` receives the
            normal of z, as in ``DenseLocalReparameterization``.

    Shape:
        as in ``Convolution2DReparameterization``.

    Raises:
        ValueError, TypeError: as in ``DenseLocalReparameterization``.

    Example:
        >>> import torch
        >>> layer = Convolution2DLocalReparameterization(8, kernel_size=3)
        >>> tuple(layer(torch.randn(2, 6, 6, 3)).shape)
        (2, 4, 4, 8)
    """

    rank = 2
    _short_name = "Conv2DLocalReparameterization"


class Convolution1DLocalReparameterization(LocalReparameterization, VariationalConv):
    r"""1D convolution whose pre-activation is drawn; see ``Convolution2DLocalReparameterization``.

    Right marginals, but no covariances between positions: another objective, not an estimator of
    the same ELBO with less variance.

    Args:
        filters: as in ``Convolution1DReparameterization``, like all that follows.

    Shape:
        as in ``Convolution1DReparameterization``.

    Raises:
        ValueError, TypeError: as in ``DenseLocalReparameterization``.

    Example:
        >>> import torch
        >>> layer = Convolution1DLocalReparameterization(8, kernel_size=5)
        >>> tuple(layer(torch.randn(2, 16, 3)).shape)
        (2, 12, 8)
    """

    rank = 1
    _short_name = "Conv1DLocalReparameterization"


class Convolution3DLocalReparameterization(LocalReparameterization, VariationalConv):
    r"""3D convolution whose pre-activation is drawn; see ``Convolution2DLocalReparameterization``.

    Right marginals, but no covariances between voxels: another objective, not an estimator of the
    same ELBO with less variance.

    Args:
        filters: as in ``Convolution3DReparameterization``, like all that follows.

    Shape:
        as in ``Convolution3DReparameterization``.

    Raises:
        ValueError, TypeError: as in ``DenseLocalReparameterization``.

    Example:
        >>> import torch
        >>> layer = Convolution3DLocalReparameterization(4, kernel_size=2)
        >>> tuple(layer(torch.randn(2, 4, 6, 6, 3)).shape)
        (2, 3, 5, 5, 4)
    """

    rank = 3
    _short_name = "Conv3DLocalReparameterization"

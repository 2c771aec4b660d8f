"""Flipout on the TFP face: a kernel of its own for every row, from sign flips of one draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from fastbconv import estimators, noise
from fastbconv.contexts import in_checkpoint

from . import tfp_arguments as arguments
from ._base import _rank_seed
from .tfp_affine import AffineEstimator
from .tfp_conv import VariationalConv
from .tfp_dense import VariationalDense
from .tfp_distribution_classes import SeededNormal, reparameterized
from .tfp_sampling import Call, give_noise
from .tfp_variables import from_operator, to_operator


class Flipout(AffineEstimator):
    """z = conv(x, loc) + t * conv(x * r, delta), delta = scale * eps; see ``fastbconv.estimators``.

    ``seed`` seeds a generator of the layer's own, from which each call draws its noise; it is no
    part of the layer's state, so that a copy begins the sequence anew.
    """

    _estimator = "flipout"
    _options = (*arguments.LAYER_OPTIONS, "seed")
    seed: int | None
    _generator: torch.Generator | None

    def _read_options(self, options: dict[str, Any]) -> None:
        super()._read_options(options)
        self.seed = arguments.optional_seed("seed", options.get("seed"))
        self._generator = None

    def _fresh_seed(self, device: torch.device) -> Tensor:
        if self.seed is None or device.type == "meta":
            return super()._fresh_seed(device)
        if torch.compiler.is_compiling() or in_checkpoint():
            raise NotImplementedError(
                "seed: expected None under torch.compile, torch.export and activation "
                f"checkpointing, which do not know a generator of the layer's own, got {self.seed} "
                f"for layer {self.name!r}; pass the seed of each call, layer(x, seed=...)"
            )
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return _rank_seed(self._generator, device)

    def _affine_distribution(self, loc: Tensor, scale: Tensor, x: Tensor | None) -> Distribution:
        del loc, x
        scale = from_operator(scale)
        base = SeededNormal(torch.zeros_like(scale), scale, validate_args=False)
        return reparameterized(Independent(base, scale.dim(), validate_args=False))

    def _give_affine_noise(self, distribution: Any, seed: Tensor) -> None:
        give_noise(distribution, "kernel", seed)

    def _pre_activation(self, x: Tensor, loc: Tensor, drawn: Tensor, seed: Tensor) -> Tensor:
        image, delta = self._to_operators(x), to_operator(drawn)
        rows = image.shape[:1] if self.rank else image.shape[:-1]
        signs = self._signs(seed, rows, loc.shape[1], loc.shape[0])
        # One sign for each row and channel: constant over space.
        signs = (sign.to(x.dtype).reshape(*sign.shape, *[1] * self.rank) for sign in signs)
        return self._from_operators(estimators.flipout(self._plain, image, loc, delta, *signs))

    def _signs(
        self, seed: Tensor, rows: Sequence[int], channels: int, filters: int
    ) -> tuple[Tensor, Tensor]:
        """The signs of a call: (*rows, channels) of its input, (*rows, filters) of its output."""
        return (
            noise.random_signs(seed, (*rows, channels), stream="sign_input"),
            noise.random_signs(seed, (*rows, filters), stream="sign_output"),
        )

    def _affine_of(self, last: Call) -> Distribution:
        return self._affine_distribution(*self._kernel_normal(), None)

    def get_config(self, *, by_reference: bool = False) -> dict[str, Any]:
        """As for the other layers; ``seed`` is the last key."""
        return {**super().get_config(by_reference=by_reference), "seed": self.seed}

    def _repr_options(self) -> list[str]:
        return super()._repr_options() + ([] if self.seed is None else [f"seed={self.seed}"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generator": None}


class Convolution2DFlipout(Flipout, VariationalConv):
    r"""2D convolution with Flipout: every row sees a kernel of its own.

    .. code-block:: text

        delta  = kernel_posterior_tensor_fn(N(0, scale^2))        by default scale * eps
        output = activation(conv2d(x, loc) + t * conv2d(x * r, delta) + bias)

    r and t are random signs, one for each row and channel of input and output, constant over space.
    The outputs are distributed as those of ``Convolution2DReparameterization``, and are nearly
    uncorrelated between rows: gradients have less variance. In one and two dimensions the cost is
    about that of one convolution where images have ten pixels or more, else that of two.
    The mean is never flipped. Y. Wen et al., "Flipout", ICLR 2018 (arXiv:1803.04386).

    After a call ``kernel_posterior_tensor`` is None, ``kernel_posterior_affine`` is N(0, scale^2)
    and ``kernel_posterior_affine_tensor`` is delta. A divergence function gets None as its sample.

    Args:
        filters: as in ``Convolution2DReparameterization``, like all that follows but ``seed``. The
            kernel's posterior has to be an elementwise normal.
        seed: an integer seeds a generator of the layer's own, from which every call draws its
            noise, so that the layer's sequence of draws depends on no global seed. A ``seed=``
            given to the call comes first. None: PyTorch's generator. The generator is no part of
            the layer's state: a copy (deepcopy, pickle) and a layer restored from a state_dict
            begin the sequence anew. torch.compile, torch.export and activation checkpointing do
            not know it, and raise: pass ``seed=`` to the call there.

    Shape:
        as in ``Convolution2DReparameterization``.

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction; in the call TypeError
            where the kernel's posterior is not normal, ValueError where it has another shape.
        NotImplementedError: in the call, a ``seed`` of the layer's own where none can be used.

    Example:
        >>> import torch
        >>> layer = Convolution2DFlipout(8, kernel_size=3, seed=7)
        >>> tuple(layer(torch.randn(2, 6, 6, 3)).shape)
        (2, 4, 4, 8)
    """

    rank = 2
    _short_name = "Conv2DFlipout"


class Convolution1DFlipout(Flipout, VariationalConv):
    r"""1D convolution with Flipout; see ``Convolution2DFlipout``.

    Args:
        filters: as in ``Convolution1DReparameterization``, like all that follows but ``seed``.
        seed: as in ``Convolution2DFlipout``.

    Shape:
        as in ``Convolution1DReparameterization``.

    Raises:
        ValueError, TypeError: as in ``Convolution2DFlipout``.

    Example:
        >>> import torch
        >>> tuple(Convolution1DFlipout(8, kernel_size=5)(torch.randn(2, 16, 3)).shape)
        (2, 12, 8)
    """

    rank = 1
    _short_name = "Conv1DFlipout"


class Convolution3DFlipout(Flipout, VariationalConv):
    r"""3D convolution with Flipout; see ``Convolution2DFlipout``.

    Args:
        filters: as in ``Convolution3DReparameterization``, like all that follows but ``seed``.
        seed: as in ``Convolution2DFlipout``.

    Shape:
        as in ``Convolution3DReparameterization``.

    Raises:
        ValueError, TypeError: as in ``Convolution2DFlipout``.

    Example:
        >>> import torch
        >>> tuple(Convolution3DFlipout(4, kernel_size=2)(torch.randn(2, 4, 6, 6, 3)).shape)
        (2, 3, 5, 5, 4)
    """

    rank = 3
    _short_name = "Conv3DFlipout"


class DenseFlipout(Flipout, VariationalDense):
    r"""Linear map with Flipout: ``activation(x @ loc + t * ((x * r) @ delta) + bias)``.

    r and t have the full shapes of input and output; see ``Convolution2DFlipout``.

    Args:
        units: as in ``DenseReparameterization``, like all that follows but ``seed``.
        seed: as in ``Convolution2DFlipout``.

    Shape:
        as in ``DenseReparameterization``.

    Raises:
        ValueError, TypeError: as in ``Convolution2DFlipout``.

    Example:
        >>> import torch
        >>> tuple(DenseFlipout(10)(torch.randn(4, 7)).shape)
        (4, 10)
    """

"""Problems as short strings, and the grids that tests and benchmarks run over.

``n2c3h9w7_k5r3s3_p1_relu`` is 2 images of 3 x 9 x 7, 5 filters of 3 x 3, padding 1, relu. Tokens
after the extents, in any order:

    st2 st2x1        stride                       p1 p1x2 p1x0x2x3   padding; (h, w); (t, b, l, r)
    same             TensorFlow's padding         d2 d2x1            dilation
    g3               groups                       m2                 num_samples
    share            share_input                  nob / bb           no bias / Bayesian bias
    cl               channels_last input          any other word     activation
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastbconv as fb
from fastbconv import _arguments
from fastbconv.testing import ConvArguments


@dataclass(frozen=True)
class Problem:
    """One convolution, without data."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: object = 0
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    num_samples: int = 1
    share_input: bool = False
    bias: str = "point"  # none, point, bayes
    activation: str = "linear"
    channels_last: bool = False

    def pads(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        return _arguments.resolve_padding(
            _arguments.padding_form(self.padding),
            (self.H, self.W),
            (self.R, self.S),
            self.stride,
            self.dilation,
        )

    def arguments(
        self, dtype: torch.dtype = torch.float32, *, integer: bool = False, seed: int = 3
    ) -> ConvArguments:
        """Random data: small integers, without scale, or normals that keep sums of order one."""
        generator = torch.Generator().manual_seed(seed)
        parameter = torch.float64 if dtype == torch.float64 else torch.float32
        fan_in = self.C // self.groups * self.R * self.S
        shape = (self.K, self.C // self.groups, self.R, self.S)

        def make(size: tuple[int, ...], scale: float, to: torch.dtype) -> Tensor:
            if integer:
                return torch.randint(-3, 4, size, generator=generator).to(to)
            return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(to)

        image = make((self.N, self.C, self.H, self.W), 1.0, dtype)
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        weight = make(shape, fan_in**-0.5, parameter)
        rho = None if integer else make(shape, 0.5, parameter) - 2.0
        bias = None if self.bias == "none" else make((self.K,), 0.5, parameter)
        bias_rho = make((self.K,), 0.5, parameter) - 2.0 if self.bias == "bayes" else None
        return ConvArguments(
            image,
            weight,
            rho,
            bias,
            None if integer else bias_rho,
            torch.tensor([0x243F6A8885A308D3, 7], dtype=torch.int64),
            self.stride,
            self.pads(),
            self.dilation,
            self.groups,
            self.activation,
            self.num_samples,
            self.share_input,
        )


_HEAD = re.compile(r"n(\d+)c(\d+)h(\d+)w(\d+)_k(\d+)r(\d+)s(\d+)$")
_NUMBERS = re.compile(r"(st|p|d|g|m)(\d+(?:x\d+)*)$")


def parse(name: str) -> Problem:
    """The problem of a string, for example ``n1c2h5w5_k3r3s3_st2_same_gelu``."""
    parts = name.split("_")
    head = _HEAD.match("_".join(parts[:2]))
    if head is None:
        raise ValueError(f"problem: expected n.c.h.w._k.r.s., got {name!r}")
    problem = Problem(*map(int, head.groups()))
    words = []
    for token in parts[2:]:
        numbers = _NUMBERS.match(token)
        if numbers is not None:
            values = tuple(map(int, numbers.group(2).split("x")))
            problem = replace(problem, **_field(numbers.group(1), values))
        elif token in _FLAGS:
            problem = replace(problem, **_FLAGS[token])
        else:
            words.append(token)
    return replace(problem, activation="_".join(words) or "linear")


_FLAGS = {
    "same": {"padding": "same"},
    "share": {"share_input": True},
    "nob": {"bias": "none"},
    "bb": {"bias": "bayes"},
    "cl": {"channels_last": True},
}


def _field(token: str, values: tuple[int, ...]) -> dict[str, object]:
    pair = values * 2 if len(values) == 1 else values
    if token == "p":
        return {"padding": pair if len(pair) == 2 else (pair[:2], pair[2:])}
    if token in ("g", "m"):
        return {{"g": "groups", "m": "num_samples"}[token]: values[0]}
    return {{"st": "stride", "d": "dilation"}[token]: pair}


def call(a: ConvArguments, **options: object):
    """fastbconv.functional.bayes_conv2d of these arguments."""
    top, bottom, left, right = a.padding
    return fb.functional.bayes_conv2d(
        a.input,
        a.weight,
        a.weight_rho,
        a.bias,
        a.bias_rho,
        stride=a.stride,
        padding=((top, bottom), (left, right)),
        dilation=a.dilation,
        groups=a.groups,
        activation=a.activation,
        num_samples=a.num_samples,
        share_input=a.share_input,
        seed=a.seed,
        **options,
    )


# Channels and filters around the tiles of 16 and 64, primes, 1; every feature once.
SMALL = (
    "n1c1h1w1_k1r1s1",
    "n2c3h9w7_k5r3s3_p1_relu",
    "n2c3h9w7_k5r3s3_p1_cl_relu",
    "n3c1h11w5_k7r5s3_same_tanh",
    "n2c17h8w8_k16r3s3_p1_bb",
    "n2c16h7w9_k17r3s3_same_cl_bb",
    "n1c15h6w6_k15r1s1_nob",
    "n2c64h5w5_k63r3s3_p1",
    "n1c63h4w6_k65r3s3_p1_cl",
    "n2c65h4w4_k64r1s1_cl_nob",
    "n2c6h8w9_k9r3s3_g3_p1_bb",
    "n2c8h9w9_k8r3s3_g8_same_st2",
    "n2c33h9w8_k33r3s3_g33_p1_cl_tanh",
    "n2c48h13w7_k48r3s5_g48_same_m2_share_cl_bb",
    "n3c20h7w7_k40r5s5_g20_same_cl_relu",
    "n2c27h9w10_k18r3s3_g9_st2_p1_m2_cl",
    "n2c3h10w13_k4r4s2_st3x2_p1x0x2x3",
    "n2c3h12w11_k4r3s3_d2x3_same",
    "n2c5h9w8_k3r3s5_st2_d2_p2x3",
    "n4c3h7w7_k5r3s3_p1_m2_bb",
    "n4c3h7w7_k5r3s3_p1_m4_cl",
    "n2c3h7w7_k5r3s3_p1_m3_share_bb",
    "n2c3h8w8_k5r3s3_p1_m2_share_cl",
    "n2c3h3w3_k4r5s5_p1x1",
)

# Without the single number: PyTorch's error there is a matter of luck, and no yardstick.
RATIO = SMALL[1:]

# Same extents, every fused activation of the torch face.
ACTIVATIONS = tuple(
    name for name in fb.activations.names() if name not in ("softmax", "log_softmax")
)

# [N, H, C, K, k] of the speed table: forward and backward, square images and filters.
SPEED = (
    (128, 28, 1, 32, 5),
    (64, 32, 3, 64, 3),
    (64, 32, 64, 64, 3),
    (64, 16, 128, 128, 3),
    (64, 8, 256, 256, 3),
    (64, 4, 512, 512, 3),
    (16, 56, 64, 64, 3),
    (16, 14, 256, 256, 3),
    (16, 7, 512, 512, 3),
    (16, 56, 64, 256, 1),
    (1, 32, 64, 64, 3),
    (1, 8, 256, 256, 3),
)

"""The layers of the kernel table, with the floors that were computed for them before any run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One convolution: N, C, H (= W), K, filter, stride, padding; floors of an H200, calculated.

    Attributes:
        name: in the tables.
        mma_us: its multiply-adds at 790 TFLOP/s.
        hbm_us: its input, output and bfloat16 weight once at 4.3 TB/s.
        sample_us: its share of a sampling launch.
        unfused_us: the thirteen weight-side kernels of a layer written by hand.
    """

    name: str
    N: int
    C: int
    H: int
    K: int
    k: int
    stride: int
    padding: int
    mma_us: float
    hbm_us: float
    sample_us: float
    unfused_us: float

    @property
    def P(self) -> int:
        """Output rows."""
        return (self.H + 2 * self.padding - self.k) // self.stride + 1

    @property
    def pixels(self) -> int:
        """Output pixels M."""
        return self.N * self.P * self.P

    @property
    def weights(self) -> int:
        """Weights n."""
        return self.K * self.C * self.k**2

    @property
    def flop(self) -> int:
        """Of a forward pass."""
        return 2 * self.pixels * self.weights

    @property
    def image_bytes(self) -> int:
        """Input and output in bfloat16."""
        return 2 * (self.N * self.C * self.H**2 + self.pixels * self.K)


LAYERS = (
    Layer("R18 128 stem 3>64 @32", 128, 3, 32, 64, 3, 1, 1, 0.6, 4.1, 0.0, 26),
    Layer("R18 128 64>64 @32", 128, 64, 32, 64, 3, 1, 1, 12.2, 7.8, 0.1, 26),
    Layer("R18 128 128>128 @16", 128, 128, 16, 128, 3, 1, 1, 12.2, 4.0, 0.3, 26),
    Layer("R18 128 256>256 @8", 128, 256, 8, 256, 3, 1, 1, 12.2, 2.2, 1.4, 26),
    Layer("R18 128 512>512 @4", 128, 512, 4, 512, 3, 1, 1, 12.2, 2.1, 5.5, 68),
    Layer("R18 8 512>512 @4", 8, 512, 4, 512, 3, 1, 1, 0.8, 1.2, 5.5, 68),
    Layer("LeNet 256 1>6 5x5 @28", 256, 1, 28, 6, 5, 1, 2, 0.1, 0.7, 0.0, 26),
    Layer("LeNet 256 6>16 5x5 @10", 256, 6, 14, 16, 5, 1, 0, 0.2, 0.3, 0.0, 26),
    Layer("R18 1024 64>64 @32", 1024, 64, 32, 64, 3, 1, 1, 98, 62, 0.1, 26),
    Layer("R18 1024 512>512 @4", 1024, 512, 4, 512, 3, 1, 1, 98, 9, 5.5, 68),
    Layer("R50 64 stem 7x7 @112", 64, 3, 224, 64, 7, 2, 3, 19, 28, 0.0, 26),
    Layer("R50 64 1x1 64>256 @56", 64, 64, 56, 256, 1, 1, 0, 8, 30, 0.0, 26),
    Layer("R50 64 3x3 256>256 @14", 64, 256, 14, 256, 3, 1, 1, 19, 3, 1.4, 26),
    Layer("R50 64 1x1 512>2048 @7", 64, 512, 7, 2048, 1, 1, 0, 8, 4, 2.5, 30),
    Layer("R50 64 3x3 512>512 @7", 64, 512, 7, 512, 3, 1, 1, 19, 3, 5.5, 68),
)
TINY_LAYERS = (Layer("tiny 3>4 @6", 2, 3, 6, 4, 3, 1, 1, 1.0, 1.0, 1.0, 1.0),)

# Weights of the convolutions of a ResNet-18 for 32 x 32 images, and of a ResNet-50, with its last
# linear map: (K, C, k, k).
RESNET18 = (
    ((64, 3, 3, 3),)
    + 4 * ((64, 64, 3, 3),)
    + ((128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1))
    + 2 * ((128, 128, 3, 3),)
    + ((256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1))
    + 2 * ((256, 256, 3, 3),)
    + ((512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1))
    + 2 * ((512, 512, 3, 3),)
)


def _bottlenecks() -> tuple[tuple[int, int, int, int], ...]:
    found = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                found.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return tuple(found)


RESNET50 = _bottlenecks()

"""Predictions and goals as data, written down before anything ran on a GPU.

None of these numbers was measured by this project on a GPU, but the two ceilings, which are what a
card of that kind gave. "calculated" counts bytes, operations and machine instructions and divides
by the ceilings; "estimated" has an assumption in it that a measurement should replace: 2 us for a
kernel launch in a stream, 1 to 1.5 us in a graph, 5 to 8 us of host time for an operation of
PyTorch, cuDNN at 60 % of the matrix ceiling. A miss of over 20 % is flagged: it wants a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import Layer

MISS = 0.2
COPY = 4.3e12  # bytes per second, read and written
MATMUL = 790e12  # flop per second, bf16, random data, 8192 cubed
CUDNN = 0.6  # share of the matrix ceiling: estimated
MMA_SYNC = 0.625  # of what wgmma reaches: estimated
GAP = 1.25e-6  # between two kernels of a graph: estimated
START_UP = 2.5e-6  # of the cooperative one-pass kernel: estimated


@dataclass(frozen=True)
class Prediction:
    """A number and where it comes from."""

    value: float
    source: str


PREDICTED: dict[str, Prediction] = {
    "facts/copy": Prediction(COPY, "an H200's device-to-device copy of 8.6 GB"),
    "facts/matmul": Prediction(MATMUL, "an H200's 8192^3 bf16 product, 770 to 800 TFLOP/s"),
    "kernels/sample 1M": Prediction(2.3e-6 + GAP, "calculated: 10 B a weight, and a gap"),
    "kernels/sample 11M": Prediction(26e-6, "calculated: 10 B a weight at 4.3 TB/s"),
    "kernels/sample 25M": Prediction(58e-6, "calculated: 10 B a weight at 4.3 TB/s"),
    "kernels/sample list resnet18": Prediction(26e-6, "calculated: one launch for all layers"),
    "kernels/sample list resnet50": Prediction(55e-6, "calculated: two launches for all layers"),
    "kernels/backward 1M": Prediction(4.7e-6 + GAP, "calculated: 20 B a weight, and a gap"),
    "kernels/backward 11M": Prediction(52e-6, "calculated: 20 B a weight at 4.3 TB/s"),
    "kernels/backward 25M": Prediction(116e-6, "calculated: 20 B a weight at 4.3 TB/s"),
    "kernels/backward list resnet18": Prediction(52e-6, "calculated: one launch for all layers"),
    "kernels/backward list resnet50": Prediction(109e-6, "calculated: two launches"),
    # Ratios to the deterministic network.
    "models/resnet18 128 graph forward/ours": Prediction(1.09, "calculated, det estimated"),
    "models/resnet18 128 graph step/ours": Prediction(1.09, "calculated, det estimated"),
    "models/resnet18 512 graph forward/ours": Prediction(1.02, "calculated, det estimated"),
    "models/resnet18 512 graph step/ours": Prediction(1.02, "calculated, det estimated"),
    "models/resnet50 64 graph forward/ours": Prediction(1.04, "calculated, det estimated"),
    "models/resnet50 64 graph step/ours": Prediction(1.04, "calculated, det estimated"),
    "models/resnet50 256 graph forward/ours": Prediction(1.01, "calculated, det estimated"),
    "models/resnet50 256 graph step/ours": Prediction(1.01, "calculated, det estimated"),
    "models/lenet 256 graph forward/ours": Prediction(1.3, "estimated: one more launch"),
    "models/lenet 256 graph step/ours": Prediction(1.3, "estimated: one more launch"),
    "models/resnet18 128 eager forward/ours": Prediction(1.05, "estimated: 20 nodes, 10 us each"),
    # Seconds of the deterministic network.
    "models/resnet18 128 graph forward/det": Prediction(320e-6, "floors / 0.6: estimated"),
    "models/resnet18 512 graph forward/det": Prediction(1280e-6, "floors / 0.6: estimated"),
    "models/resnet50 64 graph forward/det": Prediction(1500e-6, "floors / 0.6: estimated"),
    "models/resnet50 256 graph forward/det": Prediction(5990e-6, "floors / 0.6: estimated"),
    # Times slower than ours.
    "models/resnet18 128 graph forward/unfused": Prediction(2.4, "124 B a weight: calculated"),
    "models/resnet18 128 graph step/unfused": Prediction(2.1, "292 B a weight: calculated"),
    "models/resnet18 512 graph forward/unfused": Prediction(1.4, "124 B a weight: calculated"),
    "models/resnet18 512 graph step/unfused": Prediction(1.3, "292 B a weight: calculated"),
    "models/resnet50 64 graph forward/unfused": Prediction(1.9, "124 B a weight: calculated"),
    "models/resnet50 64 graph step/unfused": Prediction(1.7, "292 B a weight: calculated"),
    "models/resnet50 256 graph forward/unfused": Prediction(1.2, "124 B a weight: calculated"),
    "models/resnet50 256 graph step/unfused": Prediction(1.2, "292 B a weight: calculated"),
    "models/lenet 256 eager forward/unfused": Prediction(8.0, "launches: estimated"),
    "models/resnet18 128 eager forward/unfused": Prediction(5.5, "15 operations a layer"),
    "models/resnet18 128 eager forward/bayesian-torch": Prediction(14.0, "38 operations a layer"),
    "samples/32 draws/unfused": Prediction(20.0, "estimated"),
    "samples/32 draws/det": Prediction(4.0, "estimated"),
    "samples/per example 64>64 @32": Prediction(1.2, "noise hidden by half: estimated"),
    "samples/per example 128>128 @16": Prediction(2.4, "28 us of noise, 12 us of products"),
    "samples/per example 256>256 @8": Prediction(9.0, "111 us of noise, 12 us of products"),
}


def conv_seconds(layer: Layer, variant: str) -> Prediction:
    """What a convolution of the kernel table should take."""
    det = max(layer.mma_us, layer.hbm_us) * 1e-6 / CUDNN
    if variant == "cudnn-relu":
        return Prediction(det, "floor / 0.6: estimated")
    if variant == "det":
        return Prediction(det + GAP, "floor / 0.6 and a launch for relu: estimated")
    if variant == "auto":
        return Prediction(
            det + layer.sample_us * 1e-6 + GAP, "floor / 0.6 and the sampling launch: estimated"
        )
    slower = MMA_SYNC if layer.mma_us > layer.hbm_us else 1.0
    return Prediction(det / slower + START_UP, "mma.sync at 62 % of wgmma, start-up: estimated")


def compare(prediction: Prediction | None, measured: float | None) -> dict[str, Any]:
    """Prediction beside measurement; ``miss`` is measured / predicted - 1."""
    if prediction is None or measured is None:
        return {}
    miss = measured / prediction.value - 1
    return {
        "predicted": prediction.value,
        "prediction source": prediction.source,
        "miss": round(miss, 3),
        "flag": abs(miss) > MISS,
    }

"""Which kernel serves a call, and whose noise a rank draws."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import fastbconv as fb
from fastbconv import noise, ops
from fastbconv.reference import suggested_memory_format
from fastbconv.testing import assert_same

X, W = torch.zeros(2, 16, 9, 9), torch.zeros(8, 16, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 3])
def test_explain_chooses_one_available_kernel_per_direction(dtype, stride: int) -> None:
    weight = W.double() if dtype == torch.float64 else W
    rows = fb.explain(X.to(dtype), weight, stride=stride, padding="same")
    for direction in ("fprop", "dgrad", "wgrad"):
        chosen = [row for row in rows if row.direction == direction and row.chosen]
        assert len(chosen) == 1
        assert chosen[0].available
    assert all(row.reason for row in rows if not row.available)


def test_explain_reads_no_values() -> None:
    assert fb.explain(X.to("meta"), W.to("meta")) == fb.explain(X, W)
    with pytest.raises(ValueError, match="input: expected 16 channels"):
        fb.explain(X[:, :3], W)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected a positive integer, got 0"),
        ({"num_samples": 3}, "num_samples: expected a divisor of the 2 input rows, got 3"),
        ({"groups": 0}, "groups: expected a positive integer, got 0"),
        ({"stride": 0}, "stride: expected a positive integer, got 0"),
        ({"dilation": 9}, "input: expected a padded size of at least 18"),
    ],
)
def test_explain_checks_what_the_convolution_checks(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fb.explain(X, W, **options)
    with pytest.raises(ValueError, match="input: expected shape"):
        fb.explain(X[0, 0], W)


@pytest.mark.parametrize("device", ["gpu", "mps", 0, "cpu0", 1.5])
def test_explain_names_the_devices_it_knows(device) -> None:
    with pytest.raises(ValueError, match=f"device: expected cpu or cuda, got '{device}'"):
        fb.explain(X, W, device=device)


def test_explain_goes_by_the_kind_of_a_device(monkeypatch) -> None:
    seen = []
    native = SimpleNamespace(
        explain_conv=lambda *shapes, **options: seen.append(options.get("device")) or []
    )
    monkeypatch.setattr("fastbconv._native.load", lambda: native)
    monkeypatch.setitem(ops._state, "cuda", True)
    for device in ("cpu", torch.device("cpu"), None, "cuda", "cuda:0", torch.device("cuda", 1)):
        fb.explain(X, W, device=device)
    assert seen == [None] * 3 + ["cuda"] * 3


def test_explain_takes_a_layer() -> None:
    layer = fb.BayesConv2d(16, 8, 3, stride=2, padding=((1, 0), (2, 1)), groups=2)
    own = {"stride": 2, "padding": ((1, 0), (2, 1)), "groups": 2}
    assert fb.explain(layer, X) == fb.explain(X, layer.weight, **own)
    reflected = fb.BayesConv2d(16, 8, 3, padding=1, padding_mode="reflect")
    padded = torch.zeros(2, 16, 11, 11)
    assert fb.explain(reflected, X) == fb.explain(padded, reflected.weight)
    with pytest.raises(ValueError, match="expected none beside a layer, which has its own"):
        fb.explain(layer, X, stride=2)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear; pass explain\("):
        fb.explain(torch.nn.Linear(3, 4), X)
    with pytest.raises(TypeError, match=r"weight: expected a tensor, got .*BayesConv2d"):
        fb.explain(X, layer)


@pytest.mark.parametrize(("channels", "filters"), [(1, 1), (1, 2), (2, 2)])
def test_narrow_groups_are_direct(channels: int, filters: int) -> None:
    """With vectors over the channels of all groups. The baseline's hold too few; with AVX2 the
    library is faster at depthwise filters of 3 x 3, but for their gradient."""
    x = torch.zeros(2, 32 * channels, 9, 9).contiguous(memory_format=torch.channels_last)
    rows = fb.explain(x, torch.zeros(32 * filters, channels, 3, 3), padding=1, groups=32)
    isa = fb.build_info()["isa"]
    by_library = {"fprop", "dgrad"} if isa == "avx2" and channels == filters == 1 else set()
    if isa == "baseline":
        by_library = {"fprop", "dgrad", "wgrad"}
    assert {row.direction: row.algorithm for row in rows if row.chosen} == {
        direction: "library" if direction in by_library else "direct"
        for direction in ("fprop", "dgrad", "wgrad")
    }


@pytest.mark.parametrize("estimator", ["flipout", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 64])
def test_explain_knows_the_estimators(estimator: str, dtype: torch.dtype, channels: int) -> None:
    """What is named as chosen gives the bits of 'auto'."""
    layer = fb.BayesConv2d(channels, 64, 3, padding=1, estimator=estimator)
    x = torch.randn(4, channels, 20, 20).to(dtype)
    rows = fb.explain(layer, x)
    chosen = {row.direction: row.algorithm for row in rows if row.chosen}
    assert set(chosen) == {"fprop", "dgrad", "wgrad"}
    assert set(chosen.values()) <= {"direct", "winograd2", "winograd2x4"}
    output = layer(x, seed=1)
    with fb.algorithm(chosen["fprop"]):
        assert torch.equal(layer(x, seed=1), output)
    if dtype == torch.float32:  # in 16 bits all may round alike
        with fb.algorithm("library"):
            assert not torch.equal(layer(x, seed=1), output)
    assert fb.explain(x, layer.weight, padding=1, estimator=estimator) == rows
    if ops.has_kernel("bconv2d", "cuda"):
        on_gpu = fb.explain(x, layer.weight, padding=1, estimator=estimator, device="cuda")
        assert {row.algorithm for row in on_gpu if row.available} == {"library"}
    with pytest.raises(ValueError, match="estimator: expected one of"):
        fb.explain(x, layer.weight, estimator="mean")


def test_explain_takes_layers_of_the_other_face() -> None:
    x = torch.randn(2, 9, 9, 16)
    for layer in (
        fb.Convolution2DReparameterization(8, 3, strides=2, padding="same"),
        fb.Convolution2DFlipout(8, 3, strides=2, padding="same"),
        fb.Convolution2DLocalReparameterization(8, 3, 2, "same", data_format="channels_first"),
    ):
        estimator, first = layer._estimator, layer.data_format == "channels_first"
        image = x.movedim(-1, 1)
        given = image.contiguous() if first else x
        want = fb.explain(
            given if first else image, W, stride=2, padding="same", estimator=estimator
        )
        assert fb.explain(layer, given) == want


def _estimated(layer: torch.nn.Module) -> str:
    return getattr(layer, "estimator", None) or layer._estimator


@pytest.mark.parametrize(
    "kind", [fb.BayesConv1d, fb.Convolution1DReparameterization, fb.Convolution1DFlipout]
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_explain_sees_one_dimension_as_a_row(kind: type[torch.nn.Module], padding: str) -> None:
    torch_face = kind is fb.BayesConv1d
    x = torch.randn(2, 64, 33) if torch_face else torch.randn(2, 33, 64)
    image = x if torch_face else x.movedim(-1, 1)
    layer = kind(64, 64, 3, 2, padding) if torch_face else kind(64, 3, 2, padding)
    weight, estimator = torch.zeros(64, 64, 1, 3), _estimated(layer)
    options = {"stride": (1, 2), "padding": padding, "estimator": estimator}
    assert fb.explain(layer, x) == fb.explain(image.unsqueeze(2), weight, **options)


@pytest.mark.parametrize("kind", [fb.BayesLinear, fb.DenseReparameterization, fb.DenseFlipout])
def test_explain_sees_a_linear_map_as_a_pixel(kind: type[torch.nn.Module]) -> None:
    layer = kind(7, 5) if kind is fb.BayesLinear else kind(5)
    weight, estimator = torch.zeros(5, 7, 1, 1), _estimated(layer)
    for lead in ((4,), (2, 3)):
        want = fb.explain(torch.zeros(math.prod(lead), 7, 1, 1), weight, estimator=estimator)
        assert fb.explain(layer, torch.randn(*lead, 7)) == want


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fb.BayesConv3d(2, 4, 3), (1, 2, 4, 4, 4)),
        (fb.BayesConvTranspose2d(2, 4, 3, estimator="flipout"), (1, 2, 4, 4)),
        (fb.Convolution3DFlipout(8, 3), (1, 4, 4, 4, 2)),
    ],
)
def test_explain_says_what_is_composed(layer: torch.nn.Module, shape, monkeypatch) -> None:
    rows = fb.explain(layer, torch.randn(shape))
    assert {row.algorithm for row in rows if row.chosen} == {"library"}
    assert len(rows) == 15
    assert all(row.available == row.chosen and row.reason for row in rows)
    with fb.algorithm("direct"), pytest.raises(NotImplementedError):
        layer(torch.randn(shape))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "refused by name" in fb.explain(layer, torch.randn(shape))[0].reason
    monkeypatch.setattr(fb.ops, "available", lambda: False)
    assert {row.algorithm for row in fb.explain(layer, torch.randn(shape))} == {"reference"}


@pytest.mark.parametrize("rank", [2, 3])
def test_a_composed_call_obeys_the_choice(rank: int) -> None:
    x, w = torch.randn(2, 3, *[5] * rank), torch.randn(4, 3, *[3] * rank)
    conv = fb.functional.bayes_conv2d if rank == 2 else fb.functional.bayes_conv3d
    estimator = "flipout" if rank == 2 else "reparameterization"
    with fb.algorithm("library"):
        conv(x, w, w, estimator=estimator)
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(NotImplementedError, match="deterministic algorithms were asked"):
                conv(x, w, w, estimator=estimator)
        finally:
            torch.use_deterministic_algorithms(False)
    for name in ("direct", "winograd2", "winograd2x4", "winograd4") if rank == 3 else ():
        with fb.algorithm(name), pytest.raises(NotImplementedError, match=f"got '{name}'"):
            conv(x, w, w)


def test_explain_prints_as_a_table() -> None:
    lines = repr(fb.explain(X, W)).splitlines()
    assert len(lines) == len(fb.explain(X, W))
    assert sum(" chosen" in line for line in lines) == 3
    assert all(line.startswith(("fprop ", "dgrad ", "wgrad ")) for line in lines)


def test_algorithm_checks_and_prints_its_arguments() -> None:
    for value in ("no", 0, None):
        with pytest.raises(TypeError, match="keep_weight: expected True or False, got"):
            fb.algorithm("auto", keep_weight=value)
    with fb.algorithm("direct", keep_weight=True) as chosen:
        assert repr(chosen) == "fastbconv.algorithm('direct', keep_weight=True)"


def test_explain_reads_the_layout_as_the_operator_does(monkeypatch) -> None:
    """A slice of a channels_last image is channels_last, though it is not dense."""
    seen = []
    native = SimpleNamespace(explain_conv=lambda *shapes, **options: seen.append(options) or [])
    monkeypatch.setattr("fastbconv._native.load", lambda: native)
    image = X.contiguous(memory_format=torch.channels_last)
    for x in (X, image, image[:, :, ::2], image[:, :, :, :1].expand(2, 16, 9, 9)):
        fb.explain(x, W)
        assert seen[-1]["channels_last"] == (suggested_memory_format(x) == torch.channels_last)


def test_the_library_is_published_after_its_fakes(monkeypatch) -> None:
    published = []
    monkeypatch.setattr(ops, "_state", {})
    monkeypatch.setattr("fastbconv._native.load", object)
    monkeypatch.setattr(
        torch.library, "register_fake", lambda *_: published.append(dict(ops._state))
    )
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: ops.available(), range(4)))
    assert published == [{}] * len(ops._fakes.FAKES)


def test_sixteen_bit_convolutions_that_pytorch_gets_wrong() -> None:
    """pytorch/pytorch issues 163347 and 169688: never handed to PyTorch."""
    for x, w, stride in (
        (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 1),
        (torch.ones(1, 24, 16, 16), torch.ones(3, 24, 3, 3), 3),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            y = fb.functional.bayes_conv2d(x.to(dtype), w, None, stride=stride)
            assert_same(y, torch.full_like(y, w[0].sum().item()))


def _as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)


def test_ranks_draw_different_noise_from_equal_generators(monkeypatch) -> None:
    layer, x = fb.BayesConv2d(16, 4, 3), torch.randn(1, 16, 5, 5)
    outputs = []
    for rank in range(2):
        _as_rank(monkeypatch, rank)
        assert noise.rank_offset() == rank << 48
        torch.manual_seed(5)
        outputs.append(layer(x))
    assert not torch.equal(*outputs)
    given = []
    for rank in range(2):
        _as_rank(monkeypatch, rank)
        given.append(layer(x, seed=3))
    assert_same(*given)


def test_ranks_share_their_noise_on_request(monkeypatch) -> None:
    _as_rank(monkeypatch, 3)
    with noise.data_parallel_group(None):
        assert noise.rank_offset() == 0
    assert noise.rank_offset() == 3 << 48
    monkeypatch.undo()
    assert noise.rank_offset() == 0


def test_a_sampled_kl_belongs_to_the_draw_of_its_rank(monkeypatch) -> None:
    layer = fb.BayesConv2d(16, 4, 3, prior=fb.ScaleMixture(0.5, 1.0, 0.1))
    _as_rank(monkeypatch, 2)
    torch.manual_seed(5)
    seed = noise.draw_seed()
    torch.manual_seed(5)
    layer(torch.zeros(1, 16, 5, 5))
    assert_same(layer._last_draw[0], seed + torch.tensor([0, 2 << 48]))


LAYERS: list[tuple[torch.nn.Module, tuple[int, ...]]] = [
    (fb.BayesConv1d(3, 4, 3), (2, 3, 8)),
    (fb.BayesConv2d(3, 4, 3), (2, 3, 8, 8)),
    (fb.BayesConv3d(3, 4, 3), (2, 3, 5, 5, 5)),
    (fb.BayesConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
    (fb.BayesLinear(3, 4), (2, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_explain_refuses_what_the_layer_refuses(layer: torch.nn.Module, shape) -> None:
    x = torch.randn(shape)
    wrong = [torch.cat([x, x], 1), torch.tensor(1.0), x.double(), x.int(), None]
    if not isinstance(layer, fb.BayesLinear):
        wrong.append(x[None, None])
    if not isinstance(layer, (fb.BayesLinear, fb.BayesConvTranspose2d)):
        wrong.append(x[..., :2])
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as called:
            layer(value)
        with pytest.raises(called.type) as explained:
            fb.explain(layer, value)
        assert str(explained.value) == str(called.value)
    with pytest.raises(ValueError, match="expected a divisor of the 2 input rows, got 3"):
        fb.explain(layer, x, num_samples=3)
    assert fb.explain(layer, x, num_samples=2)
    assert fb.explain(layer, x, num_samples=3, share_input=True)
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got 'foo'"):
        fb.explain(layer, x, device="foo")
    assert fb.explain(layer, x.to("meta")) == fb.explain(layer, x)


def test_explain_wants_a_layer_with_a_shape() -> None:
    for lazy in (
        fb.LazyBayesConv2d(4, 3),
        fb.LazyBayesConvTranspose2d(4, 3),
        fb.LazyBayesLinear(4),
    ):
        with pytest.raises(ValueError, match=r"expected a layer whose shape is known, got .*Lazy"):
            fb.explain(lazy, torch.randn(2, 3, 8, 8))


def test_explain_tells_what_autocast_runs() -> None:
    layer, x = fb.BayesConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fb.explain(layer, x) == fb.explain(layer, x.bfloat16())

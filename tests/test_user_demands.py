"""What users of Bayesian layers ask for most, theme by theme; details are tested elsewhere.

The themes, in the order of how often they come up in the issues of other libraries: the scale of
the KL, saving and loading, NaN, cost, prediction, freezing, mixed precision, arguments, several
devices, conversion, dependencies, learning at all, int8, other priors.
"""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import noise

ROOT = Path(__file__).resolve().parents[1]


def make_model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        fb.BayesConv2d(3, 8, 3, padding=1, activation="relu", **options),
        nn.BatchNorm2d(8),
        fb.BayesConv2d(8, 8, 3, stride=2, bayesian_bias=True, **options),
        nn.Flatten(),
        fb.BayesLinear(72, 5, **options),
    )


def make_images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))


def test_kl_scaling_and_reduction() -> None:
    """The plain sum over all layers, each once, over n_data; batch and forwards do not matter."""
    model = make_model()
    expected = 0.0
    for layer in fb.models.bayesian_layers(model):
        parts = [(layer.weight, layer.weight_scale), (layer.bias, layer.bias_scale)]
        for loc, scale in parts[: 2 if layer.bias_rho is not None else 1]:
            posterior = torch.distributions.Normal(loc.double(), scale.double())
            prior = torch.distributions.Normal(0.0, 1.0)
            expected += torch.distributions.kl_divergence(posterior, prior).sum().item()
    for rows, passes in ((1, 1), (4, 3)):
        with fb.collect_kl(model) as kl:
            for _ in range(passes):
                model(make_images(rows + 1))
        assert kl.sum().item() == pytest.approx(expected, rel=1e-6)
        assert fb.kl_loss(model).item() == pytest.approx(expected, rel=1e-6)
    scaled = fb.kl_loss(model, n_data=50_000, beta=0.1).item()
    assert scaled == pytest.approx(0.1 * expected / 50_000, rel=1e-6)


def test_saving_loading_and_reuse_in_another_process(tmp_path: Path) -> None:
    """Means and scales and nothing else; the file holds no code; the other process agrees."""
    model = make_model().eval()
    ours = {"weight", "weight_rho", "bias", "bias_rho"}
    for layer in fb.models.bayesian_layers(model):
        assert layer.state_dict().keys() <= ours
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model(make_images())[0], tmp_path / "unused.pt")
    with fb.fixed_sample(model, 3):
        expected = model(make_images())
    program = (
        "import torch, fastbconv as fb, test_user_demands as t\n"
        "model = t.make_model().eval()\n"
        "torch.nn.init.zeros_(model[0].weight)\n"
        f"state = torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True)\n"
        "model.load_state_dict(state, strict=True)\n"
        "with fb.fixed_sample(model, 3):\n"
        f"    torch.save(model(t.make_images()), {str(tmp_path / 'output.pt')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)
    layer = fb.BayesConv2d(3, 8, 3)
    missing = layer.load_state_dict(nn.Conv2d(3, 8, 3).state_dict(), strict=False)
    assert missing.missing_keys == ["weight_rho"]
    assert not missing.unexpected_keys


@pytest.mark.parametrize("rho", [-200.0, -104.0, -30.0, 0.0, 30.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_or_inf_in_loss_or_kl(dtype: torch.dtype, rho: float) -> None:
    model = make_model()
    model = model.double() if dtype == torch.float64 else model
    for layer in fb.models.bayesian_layers(model):
        nn.init.constant_(layer.weight_rho, rho)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(make_images().to(torch.float64 if dtype == torch.float64 else torch.float32))
    loss = output.double().tanh().sum() + fb.kl_loss(model, n_data=100)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_speed_and_memory_of_training() -> None:
    """Saved for backward: input, output, parameters and 16 bytes. Speed: benchmarks/."""
    layer = fb.BayesConv2d(16, 16, 3, padding=1, activation="relu")
    images = torch.randn(2, 16, 8, 8)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(images)
    known = {images.data_ptr(), output.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    others = [t for t in saved if t.numel() and t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in others) == 16


def test_slow_or_awkward_monte_carlo_inference() -> None:
    """All samples in one call: mean, variance and entropies, no graph, modes as they were."""
    model = make_model().train()
    found = fb.predict(model, make_images(), num_samples=8)
    assert found.mean.shape == (4, 5)
    torch.testing.assert_close(found.mean.sum(1).float(), torch.ones(4))
    assert (found.mutual_information <= found.entropy).all()
    assert not found.mean.requires_grad
    assert model.training
    model.eval()
    separate = torch.zeros(4, 5, dtype=torch.float64)
    with torch.no_grad():
        for sample in range(8):
            with fb.fixed_sample(model, 0, sample=sample):
                separate += model(make_images()).double().softmax(1) / 8
    torch.testing.assert_close(found.mean, separate, rtol=1e-5, atol=1e-6)


def test_eval_and_freezing() -> None:
    """A seed for a call, one function for a block, the means; train() and eval() draw alike."""
    model, images = make_model().eval(), make_images()
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model[0](images, seed=1), model[0](images, seed=1))
    with fb.fixed_sample(model, 1):
        assert torch.equal(model(images), model(images))
    with fb.mean_weights(model):
        assert torch.equal(model(images), model(images))
    frozen = make_model(eval_mode="mean").eval()
    assert torch.equal(frozen(images), frozen(images))
    assert not torch.equal(frozen.train()(images), frozen(images))


def test_mixed_precision() -> None:
    """Products in the low dtype, parameters, noise, KL and gradients in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        model, images = make_model(), make_images()
        with torch.autocast("cpu", dtype=dtype), fb.collect_kl(model) as kl:
            output = model(images)
        assert output.dtype == dtype
        assert kl.sum().dtype == torch.float32
        (output.float().square().mean() + kl.sum() / 100).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_arguments_of_convolutions() -> None:
    """Every argument of torch's layers, by position and name: bayesian-torch mixed two up."""
    pairs = [
        (fb.BayesConv1d, nn.Conv1d),
        (fb.BayesConv2d, nn.Conv2d),
        (fb.BayesConv3d, nn.Conv3d),
        (fb.BayesConvTranspose2d, nn.ConvTranspose2d),
        (fb.BayesLinear, nn.Linear),
    ]
    for ours, torchs in pairs:
        names = [*inspect.signature(torchs).parameters]
        assert [*inspect.signature(ours).parameters][: len(names)] == names
    arguments = (4, 8, (3, 2), (2, 1), (1, 0), (1, 2), 2, True, "circular")
    layer, expected = fb.BayesConv2d(*arguments), nn.Conv2d(*arguments)
    layer.load_state_dict(expected.state_dict(), strict=False)
    images = torch.randn(2, 4, 9, 7)
    with fb.mean_weights(layer):
        torch.testing.assert_close(layer(images), expected(images))


def test_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to broadcast or unused, other noise on every rank; see test_distributed.py."""
    model = make_model()
    assert not [*model[0].buffers()]
    model(make_images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    outputs = []
    for rank in range(3):
        monkeypatch.setattr(noise, "rank_offset", lambda rank=rank: rank << 48)
        torch.manual_seed(5)
        outputs.append(model[0](make_images()))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_converting_an_existing_model() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Flatten())
    plain.append(nn.Linear(128, 5))
    model = fb.convert(plain)
    images = make_images()
    with fb.mean_weights(model):
        torch.testing.assert_close(model(images), plain(images))
    back = fb.to_deterministic(model)
    assert torch.equal(back(images), plain(images))
    assert repr(back) == repr(plain)


def test_framework_rot() -> None:
    """What must be installed: torch and four small packages; no upper limits."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    names = re.findall(r'"([^"]+)"', found[1])
    assert names == ["torch>=2.11", "numpy", "ninja", "pybind11", "filelock"]


def test_it_learns_and_the_scales_neither_collapse_nor_explode() -> None:
    """Two classes of noisy stripes: every layer has a posterior, the loss is the ELBO."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 2
    images = 0.7 * torch.randn(256, 1, 8, 8)
    images[labels == 0, :, ::2] += 0.5
    images[labels == 1, :, :, ::2] += 0.5
    model = nn.Sequential(
        fb.BayesConv2d(1, 8, 3, activation="relu"),
        nn.Flatten(),
        fb.BayesLinear(288, 2),
    )
    first = [layer.weight_scale.mean().item() for layer in fb.models.bayesian_layers(model)]
    for layer, scale in zip(fb.models.bayesian_layers(model), first, strict=True):
        assert scale == pytest.approx(0.1 / math.sqrt(layer.weight[0].numel()), rel=1e-4)
    optimizer = torch.optim.Adam(fb.param_groups(model, lr=1e-2))
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels) + fb.kl_loss(model, n_data=len(images) * 20)
        loss.backward()
        optimizer.step()
    accuracy = (fb.predict(model, images, num_samples=8).mean.argmax(1) == labels).float().mean()
    assert accuracy > 0.95
    for layer in fb.models.bayesian_layers(model):
        assert 1e-3 < layer.weight_scale.median() < 0.6  # softplus(0) = 0.69 is what decay leads to


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own quantisation
def test_int8_inference() -> None:
    """Through the means: what is left of a Bayesian network is one that PyTorch can quantise."""
    model = nn.Sequential(fb.BayesLinear(64, 32), nn.ReLU(), fb.BayesLinear(32, 5))
    plain = fb.to_deterministic(model)
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    rows = torch.randn(16, 64)
    torch.testing.assert_close(quantised(rows), plain(rows), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "prior",
    [
        (0.5, 2.0),
        (torch.zeros(8, 1, 1, 1), torch.full((8, 1, 1, 1), 0.3)),
        fb.ScaleMixture(0.25, 1.0, 0.1),
        lambda: torch.distributions.Laplace(0.0, 0.5),
    ],
    ids=["numbers", "tensors", "mixture", "distribution"],
)
def test_other_priors(prior: Any) -> None:
    layer = fb.BayesConv2d(3, 8, 3, prior=prior)
    layer(make_images()).sum().backward()
    layer.zero_grad()
    kl = layer.kl_loss()
    kl.backward()
    assert torch.isfinite(kl)
    assert kl > 0
    assert layer.weight.grad.abs().sum() > 0
    assert layer.weight_rho.grad.abs().sum() > 0

"""Constraints with Keras's names, and the names in the functions and layers of the TFP face."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbconv as fb
from fastbconv import constraints, initializers, regularizers
from fastbconv.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm

NAMES = {
    "max_norm": ("MaxNorm", {"max_value": 2, "axis": 0}),
    "min_max_norm": ("MinMaxNorm", {"min_value": 0.0, "max_value": 1.0, "rate": 1.0, "axis": 0}),
    "non_neg": ("NonNeg", {}),
    "unit_norm": ("UnitNorm", {"axis": 0}),
}


def kernel() -> Tensor:
    return torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def norm(w: Tensor, axis: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(w, dim=axis, keepdim=True)


def test_values() -> None:
    w = torch.tensor([[3.0, -0.3], [4.0, 0.4]])  # norms of the columns: 5 and 0.5
    cases: dict[Any, list[list[float]]] = {
        NonNeg(): [[3.0, 0.0], [4.0, 0.4]],
        UnitNorm(): [[0.6, -0.6], [0.8, 0.8]],
        UnitNorm(axis=-1): [[0.99504, -0.0995], [0.99504, 0.0995]],
        MaxNorm(): [[1.2, -0.3], [1.6, 0.4]],
        MaxNorm(0.25): [[0.15, -0.15], [0.2, 0.2]],
        MinMaxNorm(): [[0.6, -0.3], [0.8, 0.4]],
        MinMaxNorm(1.0, 2.0): [[1.2, -0.6], [1.6, 0.8]],
        MinMaxNorm(1.0, 2.0, rate=0.5): [[2.1, -0.45], [2.8, 0.6]],
    }
    for constraint, expected in cases.items():
        torch.testing.assert_close(constraint(w), torch.tensor(expected), atol=2e-5, rtol=1e-5)
        half = constraint(w.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), torch.tensor(expected), atol=0.01, rtol=0.01)
    assert torch.equal(UnitNorm()(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("axis", [0, -1, 2, (0, 1, 2), [0, 1]])
def test_axes_of_a_kernel(axis: Any) -> None:
    """(*window, C, filters): the default norm is over the height, as in Keras."""
    w = kernel()
    axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    before = norm(w, axes)
    for constraint, expected in (
        (UnitNorm(axis), torch.ones_like(before)),
        (MaxNorm(1.5, axis), before.clamp(max=1.5)),
        (MinMaxNorm(1.0, 2.0, 0.25, axis), 0.75 * before + 0.25 * before.clamp(1.0, 2.0)),
    ):
        after = constraint(w)
        torch.testing.assert_close(norm(after, axes), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(after / w, (expected / before).expand_as(w), rtol=1e-5, atol=0)
    assert torch.equal(UnitNorm()(w), UnitNorm(0)(w))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_configurations(name: str) -> None:
    kind, config = NAMES[name]
    made = constraints.get(name)
    assert type(made).__name__ == kind
    assert made == constraints.get(kind) == constraints.get(name.replace("_", ""))
    assert made == constraints.get({"class_name": kind, "config": config}) == type(made)()
    written = json.loads(json.dumps(constraints.serialize(made)))
    assert written == {"class_name": kind, "config": config}
    assert constraints.get(written) == made


def test_other_forms_and_messages() -> None:
    assert constraints.get(None) is None
    assert constraints.get(torch.relu) is torch.relu
    several = json.loads(json.dumps(constraints.serialize(MaxNorm(axis=(0, 1)))))
    assert constraints.get(several) == MaxNorm(axis=[0, 1])
    assert repr(MaxNorm(axis=(0, 1))) == "MaxNorm(max_value=2.0, axis=[0, 1])"
    for given, kind, message in (
        ("positive", ValueError, "c: expected one of 'max_norm', .*, 'unit_norm', got 'positive'"),
        (1.0, TypeError, "c: expected None, a name, .* callable w -> w, got float"),
        (
            {"class_name": "UnitNorm", "config": {"axis": "0"}},
            TypeError,
            "c, UnitNorm: axis: .*'0'",
        ),
        ({"class_name": "MaxNorm", "config": {"max_value": -1}}, ValueError, "max_value: .* -1"),
    ):
        with pytest.raises(kind, match=message):
            constraints.get(given, "c")
    for call, kind, message in (
        (lambda: UnitNorm(()), TypeError, "axis: expected an integer or a sequence"),
        (lambda: UnitNorm(2)(torch.ones(2, 3)), ValueError, r"axis: .* shape \(2, 3\), got 2"),
        (lambda: MinMaxNorm(2, 1), ValueError, "max_value: .* of at least 2, got 1"),
        (lambda: MinMaxNorm(rate=1.5), ValueError, "rate: expected a number from 0 to 1, got 1.5"),
    ):
        with pytest.raises(kind, match=message):
            call()


# --- in the functions and layers of the TFP face --------------------------------------------------

FACTORIES = (fb.default_mean_field_normal_fn, fb.default_loc_scale_fn)


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_functions_take_names(factory: Any) -> None:
    make = factory(
        loc_initializer="zeros",
        untransformed_scale_initializer={"class_name": "Constant", "config": {"value": -4.0}},
        loc_regularizer="l2",
        untransformed_scale_regularizer={"class_name": "L1", "config": {"l1": 0.5}},
        loc_constraint="non_neg",
        untransformed_scale_constraint=MaxNorm,
    )
    assert make.loc_initializer == initializers.Zeros()
    assert make.untransformed_scale_initializer == initializers.Constant(-4.0)
    assert make.loc_regularizer == regularizers.l2()
    assert make.untransformed_scale_regularizer == regularizers.l1(0.5)
    assert make.loc_constraint == NonNeg()
    assert make.untransformed_scale_constraint == MaxNorm()
    default = factory()
    assert default.loc_initializer == initializers.RandomNormal(0.0, 0.1)
    assert default.untransformed_scale_initializer == initializers.RandomNormal(-3.0, 0.1)
    assert default.loc_regularizer is default.loc_constraint is None


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("part", ["loc", "untransformed_scale"])
@pytest.mark.parametrize(
    ("field", "given", "kind"),
    [
        ("initializer", "zeroes", ValueError),
        ("initializer", 0, TypeError),
        ("initializer", "", ValueError),
        ("regularizer", "l3", TypeError),
        ("regularizer", 0.1, ValueError),
        ("constraint", "positive", ValueError),
        ("constraint", 0, TypeError),
    ],
)
def test_mistakes_are_found_at_once(
    factory: Any, part: str, field: str, given: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{part}_{field}: expected .*, got "):
        factory(**{f"{part}_{field}": given})


def test_layers_with_names() -> None:
    posterior = fb.default_mean_field_normal_fn(
        loc_initializer="zeros", loc_regularizer="l2", loc_constraint="non_neg"
    )
    layer = fb.Convolution2DReparameterization(4, 3, kernel_posterior_fn=posterior)
    layer.build((None, 5, 5, 2))
    assert not layer.kernel_posterior_loc.any()
    with torch.no_grad():
        layer.kernel_posterior_loc.normal_()
    penalty = 0.01 * layer.kernel_posterior_loc.detach().square().sum()
    torch.testing.assert_close(fb.regularization_loss(layer).detach(), penalty)
    fb.apply_constraints(layer)
    assert (layer.kernel_posterior_loc >= 0).all()
    again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert again.get_config() == layer.get_config()
    assert again.kernel_posterior_fn.loc_constraint == NonNeg()


def test_variables_of_equal_shape_differ() -> None:
    posterior = fb.default_mean_field_normal_fn(loc_initializer="he_uniform")
    layers = [fb.DenseReparameterization(8, kernel_posterior_fn=posterior) for _ in range(2)]
    for layer in layers:
        layer.build((None, 6))
    first, second = (layer.kernel_posterior_loc for layer in layers)
    assert first.abs().max().item() <= 1.0
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", initializers.CLASSES)
def test_every_initialiser_in_a_configuration(kind: Any) -> None:
    posterior = fb.default_mean_field_normal_fn(loc_initializer=kind)
    layer = fb.DenseReparameterization(3, kernel_posterior_fn=posterior)
    again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert again.kernel_posterior_fn.loc_initializer == kind()
    again.build((None, 3))
    assert again.kernel_posterior_loc.shape == (3, 3)


@pytest.mark.parametrize(
    "constraint", [MaxNorm(3.0, (0, 1)), MinMaxNorm(0.5, 1.5, 0.5, -1), NonNeg(), UnitNorm(1)]
)
def test_every_constraint_in_a_configuration(constraint: Any) -> None:
    posterior = fb.default_mean_field_normal_fn(untransformed_scale_constraint=constraint)
    layer = fb.DenseReparameterization(3, kernel_prior_fn=posterior)
    again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert again.kernel_prior_fn.untransformed_scale_constraint == constraint


class Halves(initializers.Constant):
    """A user's class: its configuration must not be that of the class it comes from."""


def test_a_subclass_is_no_built_in() -> None:
    posterior = fb.default_mean_field_normal_fn(loc_initializer=Halves(0.5))
    layer = fb.DenseReparameterization(3, kernel_posterior_fn=posterior)
    with pytest.raises(ValueError, match="kernel_posterior_fn, loc_initializer: expected a"):
        layer.get_config()
    clone = type(layer).from_config(layer.get_config(by_reference=True))
    assert clone.kernel_posterior_fn.loc_initializer is posterior.loc_initializer


def test_add_variable_takes_names() -> None:
    """As Keras does: a function of a user's own may name them."""

    def prior(dtype: Any, shape: Any, name: str, trainable: bool, add: Any) -> Any:
        loc = add(
            name=f"{name}_loc",
            shape=shape,
            initializer="ones",
            regularizer="l1",
            constraint="unit_norm",
            dtype=dtype,
            trainable=trainable,
        )
        return torch.distributions.Normal(loc, 1.0)

    layer = fb.DenseReparameterization(2, kernel_prior_fn=prior)
    layer.build((None, 4))
    assert torch.equal(layer.kernel_prior_loc, torch.ones(4, 2))
    torch.testing.assert_close(fb.regularization_loss(layer).detach(), torch.tensor(0.08))
    fb.apply_constraints(layer)
    torch.testing.assert_close(layer.kernel_prior_loc.detach(), torch.full((4, 2), 0.5))
    layer = fb.DenseReparameterization(
        2, kernel_prior_fn=lambda *given: given[-1](name="w", initializer="none")
    )
    with pytest.raises(ValueError, match="initializer of w: expected one of"):
        layer.build((None, 4))
    assert not layer.built

"""Operators inside torch.func transforms: grad, vjp, vmap, and any nesting of them.

A C++ autograd function is refused there, so the same operators are wrapped once more in Python
``autograd.Function`` classes with ``setup_context`` and ``vmap``. Nothing here knows what an
operator computes: each is described by an :class:`Operator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .estimators import LOCAL

Tensors = tuple[Tensor | None, ...]
Options = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """A differentiable operator and its backward, as functions of tensors and options.

    Attributes:
        name: without its namespace.
        forward: (tensors, options) -> outputs.
        backward: (gradients of the differentiable outputs, tensors, extra, options, output_mask) ->
            gradients of the differentiable tensors; unwanted ones are anything.
        differentiable: positions of the tensors that have a gradient.
        num_differentiable_outputs: the outputs after these have none.
        extra: (outputs, options) -> further tensors that backward needs.
        single: whether the operator returns one tensor and not a tuple.
    """

    name: str
    forward: Callable[[Tensors, Options], tuple[Tensor, ...]]
    backward: Callable[[Tensors, Tensors, Tensors, Options, list[bool]], tuple[Tensor, ...]]
    differentiable: tuple[int, ...]
    num_differentiable_outputs: int
    extra: Callable[[tuple[Tensor, ...], Options], Tensors] = lambda outputs, options: ()
    single: bool = False


def build(
    op: Callable[[str], Any], from_pre_activation: Callable[[int], bool]
) -> dict[str, Callable[[Tensors, Options], Any]]:
    """The differentiable operators for use while a torch.func transform is active.

    Args:
        op: looks an operator up by name, loading the library if need be.
        from_pre_activation: whether backward of an activation needs the pre-activation.
    """

    def conv_forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        keep = options["save_pre_activation"] or from_pre_activation(options["activation"])
        return op("bconv2d")(*tensors, **{**options, "save_pre_activation": keep})

    def conv_extra(outputs: tuple[Tensor, ...], options: Options) -> Tensors:
        output, _, pre_activation, weight = outputs
        saved = pre_activation if from_pre_activation(options["activation"]) else output
        kept = weight if options["keep_weight"] else None
        return (None if options["activation"] == 0 else saved, kept)

    def conv_backward(
        grads: Tensors, tensors: Tensors, extra: Tensors, options: Options, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        rest = _without(options, "keep_weight", "save_pre_activation")
        arguments = (*grads, tensors[0], *extra, *tensors[1:])
        return op("bconv2d_backward")(*arguments, **rest, output_mask=mask)

    def affine_forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        keep = options["save_pre_activation"] or from_pre_activation(options["activation"])
        return op("bconv2d_affine")(*tensors, **{**options, "save_pre_activation": keep})

    def affine_extra(outputs: tuple[Tensor, ...], options: Options) -> Tensors:
        output, _, pre_activation, deviation = outputs
        saved = pre_activation if from_pre_activation(options["activation"]) else output
        kept = deviation if options["estimator"] == LOCAL else None
        return (None if options["activation"] == 0 else saved, kept)

    def affine_backward(
        grads: Tensors, tensors: Tensors, extra: Tensors, options: Options, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        rest = _without(options, "save_pre_activation")
        arguments = (*grads, tensors[0], *extra, *tensors[1:])
        return op("bconv2d_affine_backward")(*arguments, **rest, output_mask=mask)

    def sample_backward(
        grads: Tensors, tensors: Tensors, extra: Tensors, options: Options, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        rest = _without(options, "with_kl", "dtype")
        grad_kl = grads[1] if options["with_kl"] else None
        arguments = (grads[0], grad_kl, *tensors)
        return op("sample_posterior_backward")(*arguments, **rest, output_mask=mask)

    operators = (
        Operator(
            "bconv2d", conv_forward, conv_backward, (0, 1, 2, 3, 4, 6, 7, 8, 9), 2, conv_extra
        ),
        Operator(
            "bconv2d_affine",
            affine_forward,
            affine_backward,
            (0, 1, 2, 3, 4, 6, 7, 8, 9),
            2,
            affine_extra,
        ),
        Operator(
            "sample_posterior",
            lambda tensors, options: op("sample_posterior")(*tensors, **options),
            sample_backward,
            (0, 1, 3, 4),
            2,
        ),
        Operator(
            "kl_normal",
            lambda tensors, options: (op("kl_normal")(*tensors, **options),),
            lambda grads, tensors, extra, options, mask: op("kl_normal_backward")(
                *grads, *tensors, **options, output_mask=mask
            ),
            (0, 1, 2, 3),
            1,
            single=True,
        ),
    )
    return {operator.name: _transformable(operator) for operator in operators}


def _without(options: Options, *names: str) -> Options:
    return {name: value for name, value in options.items() if name not in names}


def _transformable(operator: Operator) -> Callable[[Tensors, Options], Any]:
    """``operator.forward`` for use while a torch.func transform is active."""
    function = _make_function(operator, _make_backward_function(operator))

    def call(tensors: Tensors, options: Options) -> Any:
        outputs = function.apply(options, *tensors)
        return outputs[0] if operator.single else outputs

    return call


def _make_backward_function(operator: Operator) -> type[torch.autograd.Function]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(
            options: Options,
            mask: tuple[bool, ...],
            counts: tuple[int, int],
            *tensors: Tensor | None,
        ) -> tuple[Tensor, ...]:
            grads, rest = tensors[: counts[0]], tensors[counts[0] :]
            return operator.backward(
                grads, rest[: counts[1]], rest[counts[1] :], options, list(mask)
            )

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(
                f"fastbconv::{operator.name}_backward: expected a first derivative, got a second "
                "one; double backward is not implemented, use algorithm 'reference' for it"
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> None:
            _refuse_forward_mode(f"{operator.name}_backward")

        @staticmethod
        def vmap(
            info: Any,
            in_dims: tuple[int | None, ...],
            options: Options,
            mask: tuple[bool, ...],
            counts: tuple[int, int],
            *tensors: Tensor | None,
        ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
            def one(slices: Tensors) -> tuple[Tensor, ...]:
                return Backward.apply(options, mask, counts, *slices)

            return _loop(one, info.batch_size, in_dims[3:], tensors)

    Backward.__name__ = Backward.__qualname__ = f"{operator.name}_backward"
    return Backward


def _make_function(
    operator: Operator, backward_function: type[torch.autograd.Function]
) -> type[torch.autograd.Function]:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
            return operator.forward(tensors, options)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.options = inputs[0]
            ctx.num_tensors = len(inputs) - 1
            ctx.save_for_backward(*inputs[1:], *operator.extra(output, inputs[0]))
            ctx.mark_non_differentiable(*output[operator.num_differentiable_outputs :])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            count = operator.num_differentiable_outputs
            mask = tuple(ctx.needs_input_grad[1 + i] for i in operator.differentiable)
            wanted = backward_function.apply(
                ctx.options, mask, (count, ctx.num_tensors), *grads[:count], *ctx.saved_tensors
            )
            by_tensor: list[Tensor | None] = [None] * ctx.num_tensors
            for position, needed, grad in zip(operator.differentiable, mask, wanted, strict=True):
                if needed:
                    by_tensor[position] = grad
            return (None, *by_tensor)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> None:
            _refuse_forward_mode(operator.name)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], options: Options, *tensors: Tensor | None
        ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
            def one(slices: Tensors) -> tuple[Tensor, ...]:
                return Forward.apply(options, *slices)

            return _loop(one, info.batch_size, in_dims[1:], tensors)

    Forward.__name__ = Forward.__qualname__ = operator.name
    return Forward


def _refuse_forward_mode(name: str) -> None:
    raise NotImplementedError(
        f"fastbconv::{name}: expected reverse-mode differentiation, got a dual tensor; "
        "forward-mode derivatives are not implemented, use torch.autograd.grad or torch.func.grad"
    )


def _loop(
    call: Callable[[Tensors], tuple[Tensor, ...]],
    batch_size: int,
    in_dims: Sequence[int | None],
    tensors: Tensors,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call per element of the mapped dimension.

    Noise is a function of the seed: elements with equal seeds share it, and a mapped (B, 2) seed
    means B draws, whatever ``randomness`` says.
    """
    rows = []
    for index in range(batch_size):
        slices = tuple(
            tensor if tensor is None or dim is None else tensor.select(dim, index)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        )
        rows.append(call(slices))
    outputs = tuple(_stack(list(column)) for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)


def _stack(parts: list[Tensor]) -> Tensor:
    """torch.stack that keeps images channels_last where they are."""
    first = parts[0]
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not first.is_contiguous():
        stacked = torch.stack([part.permute(0, 2, 3, 1) for part in parts])
        return stacked.permute(0, 1, 4, 2, 3)
    return torch.stack(parts)

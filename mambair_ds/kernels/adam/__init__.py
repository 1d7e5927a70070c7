"""Adam and the running mean of the weights, every number read and written once.

For every element, with the gradient g (plus weight_decay · weight, unless that is decoupled):

    m += (1 - β1) (g - m)        v += (1 - β2) (g² - v)
    weight -= lr · m / (1 - β1^t) / (√(v / (1 - β2^t)) + eps)
    mean += (1 - decay) (weight - mean)

as torch.optim.Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019) and the published trainer's mean have it.
"""

from dataclasses import dataclass

from torch import Tensor

from mambair_ds.kernels import load_backend

_FILES = {"reference": "reference", "triton": "triton"}


@dataclass(frozen=True)
class Rule:
    """What a step does, but for its tensors."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    """Whether weight decay shrinks the weights themselves (AdamW) instead of adding to the gradient."""
    decay: float
    """Weight of the past in the mean."""


@dataclass(frozen=True)
class Tensors:
    """Lists of equal length; the tensors at a place have one shape, are contiguous and float32."""

    weights: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    means: list[Tensor]
    """Empty if there is no mean."""
    steps: list[Tensor]
    """Steps taken, (); at one place of a call as many as at any other."""


def adam_step(tensors: Tensors, rule: Rule, skipped: Tensor | None, backend: str | None = None) -> None:
    """Take a step in place.

    Args:
        tensors: on one device.
        rule: the step's numbers.
        skipped: () float32 on that device, 1.0 to change nothing and 0.0 to step, as yet unread; None steps.
        backend: "reference" (any device; PyTorch's own step, then the mean) or "triton" (with means alone); None
            takes "triton" where it runs.
    """
    if tensors.weights:
        backend = backend if tensors.means else "reference"  # PyTorch's own has nothing left to gain
        load_backend("adam", _FILES, tensors.weights[0].device.type, backend).adam_step(tensors, rule, skipped)

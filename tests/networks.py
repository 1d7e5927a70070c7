"""What tests of networks share: the recorded numbers, a small network, and control over its routes."""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mambair_ds.models import build_model
from mambair_ds.models.state_space import Router

REFERENCE = Path(__file__).parent / "data" / "reference"


def published():
    """The published configurations: variants by name, and their state dicts as [key, shape, dtype]."""
    return json.loads(gzip.decompress((REFERENCE / "variants.json.gz").read_bytes()))


def reference(name):
    return np.load(REFERENCE / f"{name}.npz")


def tiny_network(**changes):
    """A description of a network that runs in milliseconds: two stages of two layers, windows of 4."""
    network = {
        "type": "MambaIRv2Light",
        "upscale": 2,
        "embed_dim": 12,
        "d_state": 4,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
        "inner_rank": 4,
        "num_tokens": 8,
        "mlp_ratio": 1.0,
        "upsampler": "pixelshuffledirect",
    }
    return network | changes


def build_tiny(seed=0, **changes):
    """The tiny network with weights large enough for every part of it to matter."""
    torch.manual_seed(seed)
    model = build_model(tiny_network(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "selectiveScan" not in name:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.add_(torch.randn_like(parameter) / fan_in**0.5)
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def recorded_routes(model, inject=None):
    """Collect the class of each token, a (B, n) tensor a layer, that the model decides on.

    With `inject`, (layers, B, n), the model goes on with those classes instead of its own.
    """
    decided = []

    def recorder(layer, router):
        def decide(scores, noise):
            decided.append(Router.decide(router, scores, noise))
            return decided[-1] if inject is None else inject[layer]

        return decide

    for layer, router in enumerate(routers(model)):
        router.decide = recorder(layer, router)
    try:
        yield decided
    finally:
        for router in routers(model):
            del router.decide

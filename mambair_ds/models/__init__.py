"""The networks by the name that the published ``network_g.type`` gives them."""

from collections.abc import Mapping
from typing import Any

from mambair_ds.config import NetworkConfig
from mambair_ds.models.feedforward import ConvFFN, GatedMLP
from mambair_ds.models.mambairv2 import MambaIRv2

_FEED_FORWARD = {"MambaIRv2": ConvFFN, "MambaIRv2Light": GatedMLP}


def build_model(network: Mapping[str, Any] | NetworkConfig, scan_backend: str | None = None) -> MambaIRv2:
    """Build a network from its description, with freshly drawn weights (torch's global generator).

    Args:
        network: the published ``network_g`` mapping, `type` included, or the `NetworkConfig` made of it.
        scan_backend: backend of `mambair_ds.kernels.selective_scan`; None chooses by device.

    Raises:
        pydantic.ValidationError: an unknown, missing or wrong key of a mapping.
    """
    config = network if isinstance(network, NetworkConfig) else NetworkConfig.model_validate(dict(network))
    return MambaIRv2(config, _FEED_FORWARD[config.type], scan_backend)

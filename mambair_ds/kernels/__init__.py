"""The operators that PyTorch lacks, one folder each, and the one place that picks an operator's backend.

Every operator has a `reference` (slow, obvious, any device), a CPU backend named `torch`, and a `triton` one; they agree with one
another and are interchangeable. Importing this package loads neither numba nor triton: a backend's file is imported on its first use.
"""

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def choose_backend(operator: str, device_type: str) -> str:
    """The backend that `operator` runs on for tensors of `device_type` ("cpu", "cuda", ...); decided and logged once per pair."""
    backend = {"cpu": "torch", "cuda": "triton"}.get(device_type, "reference")
    logger.info("%s on %s: %s backend", operator, device_type, backend)
    return backend

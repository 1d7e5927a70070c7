"""The selective scan's CPU backends: published numbers, gradients, exact reproducibility, and refusals."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_inputs import NAMES, assert_matches_reference, make_inputs, make_route, run
from torch import Tensor

from mambair_ds.kernels.selective_scan import selective_scan

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
RECIPES = {case: recipe for case, recipe in json.loads((REFERENCE / "scan.json").read_text()).items() if case[0] == "B"}


def recorded_inputs(case: str) -> tuple[list[Tensor], Tensor]:
    """The inputs of a recorded case, channels last, and the gradient of y; drawn in the order of scan.json's recipe."""
    batch, channels, length, states = (int(part[1:]) for part in case.split("_"))
    generator = np.random.Generator(np.random.PCG64(RECIPES[case]["seed"]))
    normal = generator.standard_normal
    u, delta = normal((batch, channels, length)), 0.5 * normal((batch, channels, length))
    A = -np.exp(np.log(np.arange(1, states + 1))[None] + 0.05 * normal((channels, states)))
    B, C = normal((batch, states, length)), normal((batch, states, length))
    D = 1 + 0.05 * normal(channels)
    dt = np.exp(generator.random(channels) * (np.log(0.1) - np.log(0.001)) + np.log(0.001))
    bias = dt + np.log(-np.expm1(-dt))
    grad_y = normal((batch, channels, length))
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in (u, delta, A, B, C, D, bias, grad_y)]
    u, delta, A, B, C, D, bias, grad_y = (x.transpose(1, 2).contiguous() if x.ndim == 3 else x for x in tensors)
    return [u, delta, A, B, C, D, bias], grad_y


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_values_and_gradients_equal_the_recorded_ones(case: str, backend: str) -> None:
    inputs, grad_y = recorded_inputs(case)
    recorded = np.load(REFERENCE / f"scan_{case}.npz")
    inputs = [x.requires_grad_() for x in inputs]
    y = selective_scan(*inputs, backend=backend)
    gradients = torch.autograd.grad(y, inputs, grad_y)
    for name, value in zip(("y", *(f"d{name}" for name in NAMES[:7])), (y.detach(), *gradients), strict=True):
        actual = (value.transpose(1, 2) if value.ndim == 3 else value).contiguous().double().numpy()
        scale = recorded[f"{name}_l2"] / np.sqrt(actual.size)
        if name in recorded:
            expected = recorded[name]
        else:
            actual, expected = actual.reshape(-1)[::97], recorded[f"{name}_flat_s97"]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_reference_gradients_equal_finite_differences() -> None:
    inputs = [x.double().requires_grad_() for x in make_inputs(2, 3, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, backend="reference"), inputs)
    prompt, order = make_route(2, 3, 2)
    inputs.append(prompt.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(*x[:7], prompt=x[7], order=order, backend="reference"), inputs
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_order_says_which_token_comes_when_and_the_prompt_goes_by_position(backend: str) -> None:
    u, delta, A, B, C, D, bias = make_inputs(2, 40, 6, 4)
    prompt, order = make_route(2, 40, 4)
    y = selective_scan(u, delta, A, B, C, D, bias, prompt=prompt, order=order, backend=backend)
    for sample in range(2):
        u_, delta_, B_, C_ = (x[sample, order[sample]][None] for x in (u, delta, B, C))
        sorted_y = selective_scan(u_, delta_, A, B_, C_ + prompt[sample], D, bias, backend=backend)
        assert torch.equal(y[sample, order[sample]], sorted_y[0])


@pytest.mark.parametrize("states", [5, 8, 16])
@pytest.mark.parametrize("channels", [1, 48, 87])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_gradients_equal_the_reference(length: int, channels: int, states: int) -> None:
    inputs = make_inputs(2, length, channels, states)
    assert_matches_reference(inputs, True, "torch", 1e-5)
    prompt, order = make_route(2, length, states)
    assert_matches_reference([*inputs, prompt], True, "torch", 1e-5, order)


def test_without_softplus() -> None:
    inputs = make_inputs(1, 70, 33, 5)
    inputs[1], inputs[6] = inputs[1].abs(), torch.zeros(33)
    assert_matches_reference(inputs, False, "torch", 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_leaving_out_D_or_bias_means_zero(backend: str) -> None:
    u, delta, A, B, C, D, bias = make_inputs(1, 9, 4, 3)
    zero = torch.zeros(4)
    expected = selective_scan(u, delta, A, B, C, zero, bias, backend=backend)
    assert torch.equal(selective_scan(u, delta, A, B, C, None, bias, backend=backend), expected)
    expected = selective_scan(u, delta, A, B, C, D, zero, backend=backend)
    assert torch.equal(selective_scan(u, delta, A, B, C, D, backend=backend), expected)


def test_extreme_steps_stay_finite_and_right() -> None:
    inputs = make_inputs(1, 40, 8, 4)
    inputs[1] = torch.linspace(-60, 60, 320).reshape(1, 40, 8)
    assert_matches_reference(inputs, True, "torch", 1e-5)


def test_bfloat16_in_and_out_with_a_float32_state() -> None:
    inputs = [x if x.ndim < 3 else x.bfloat16() for x in make_inputs(2, 100, 40, 8)]
    result = run(inputs, True, "torch")
    assert [result[name].dtype for name in ("y", "u", "delta", "B", "C")] == [torch.bfloat16] * 5
    assert [result[name].dtype for name in ("A", "D", "delta_bias")] == [torch.float32] * 3
    assert_matches_reference(inputs, True, "torch", 2**-8)


def test_strided_inputs_are_accepted() -> None:
    inputs = make_inputs(2, 20, 12, 4)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in inputs]
    assert not strided[0].is_contiguous()
    for name, value in run(strided, True, "torch").items():
        assert torch.equal(value, run(inputs, True, "torch")[name]), name


def test_results_do_not_depend_on_batch_threads_or_time() -> None:
    inputs = make_inputs(3, 200, 70, 8)
    prompt, order = make_route(3, 200, 8)
    inputs.append(prompt)
    threads = torch.get_num_threads()
    together = run(inputs, True, "torch", order)
    try:
        torch.set_num_threads(1)
        alone = run(inputs, True, "torch", order)
        torch.set_num_threads(5)
        crowded = run(inputs, True, "torch", order)
    finally:
        torch.set_num_threads(threads)
    for name in together:
        assert torch.equal(together[name], alone[name]), name
        assert torch.equal(together[name], crowded[name]), name

    grad_y = torch.randn(together["y"].shape, generator=torch.Generator().manual_seed(1))
    singles: list[tuple[Tensor, ...]] = []
    for i in range(3):
        sample = [x[i : i + 1] if x.ndim == 3 else x for x in inputs]
        sample = [x.detach().requires_grad_() for x in sample]
        y = selective_scan(*sample[:7], prompt=sample[7], order=order[i : i + 1], backend="torch")
        assert torch.equal(y, together["y"][i : i + 1])
        singles.append(torch.autograd.grad(y, sample, grad_y[i : i + 1]))
    for k, name in enumerate(NAMES):
        parts = [single[k] for single in singles]
        joined = torch.cat(parts) if inputs[k].ndim == 3 else parts[0] + parts[1] + parts[2]
        assert torch.equal(joined, together[name]), name


def test_operator_passes_torchs_own_checks() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 40, 6, 4)]
    selective_scan(*inputs, backend="torch")  # registers it
    prompt, order = make_route(2, 40, 4)
    for route in ((None, None), (prompt.requires_grad_(), order)):
        torch.library.opcheck(torch.ops.mambair_ds.selective_scan_cpu.default, (*inputs, *route, True))


def test_saved_memory_is_a_fraction_of_all_states() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(1, 1024, 32, 16)]
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(*inputs, backend="torch")
    assert sum(saved) - sum(x.numel() for x in inputs) <= 1024 * 32 * 16 / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(u=torch.zeros(2, 5)), r"u has shape \(2, 5\)"),
        (lambda x: x.update(u=torch.zeros(2, 0, 6)), r"u has shape \(2, 0, 6\)"),
        (lambda x: x.update(A=torch.zeros(6)), r"A has shape \(6,\)"),
        (lambda x: x.update(A=torch.zeros(7, 4)), r"A has shape \(7, 4\), expected \(6, 4\)"),
        (lambda x: x.update(delta=torch.zeros(2, 5, 7)), r"delta has shape \(2, 5, 7\), expected \(2, 5, 6\)"),
        (lambda x: x.update(B=torch.zeros(2, 4, 5)), r"B has shape \(2, 4, 5\), expected \(2, 5, 4\)"),
        (lambda x: x.update(C=torch.zeros(1, 5, 4)), r"C has shape \(1, 5, 4\), expected \(2, 5, 4\)"),
        (lambda x: x.update(D=torch.zeros(5)), r"D has shape \(5,\), expected \(6,\)"),
        (lambda x: x.update(delta_bias=torch.zeros(6, 1)), r"delta_bias has shape \(6, 1\), expected \(6,\)"),
        (lambda x: x.update(A=x["A"].bfloat16()), "A is torch.bfloat16, expected torch.float32"),
        (lambda x: x.update(u=x["u"].double()), "u is torch.float64"),
        (lambda x: x.update(C=x["C"].to("meta")), "C is on meta, but u on cpu"),
        (lambda x: x.update(prompt=torch.zeros(2, 5, 6)), r"prompt has shape \(2, 5, 6\), expected \(2, 5, 4\)"),
        (lambda x: x.update(prompt=torch.zeros(2, 5, 4).double()), "prompt is torch.float64"),
        (lambda x: x.update(order=torch.zeros(5)), r"order has shape \(5,\), expected \(2, 5\)"),
        (lambda x: x.update(order=torch.zeros(2, 5)), "order is torch.float32, expected torch.int64"),
        (lambda x: x.update(backend="cuda"), "no backend 'cuda'; there are reference, torch, triton, mamba_ssm"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments = dict(zip(NAMES, make_inputs(2, 5, 6, 4), strict=False))
    change(arguments)
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)


def test_missing_mamba_ssm_is_one_readable_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ImportError, match=r"needs the package mamba-ssm with its compiled CUDA scan"):
        selective_scan(*make_inputs(1, 2, 3, 4), backend="mamba_ssm")


def test_mamba_ssm_gets_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def published(u, delta, A, B, C, D, delta_bias, delta_softplus):  # type: ignore[no-untyped-def]
        """Stands in for the package's function: the same arguments, the sequence last."""
        assert all(x.is_contiguous() for x in (u, delta, B, C))
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
        return selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend="reference").transpose(1, 2)

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = published  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert_matches_reference(make_inputs(2, 7, 5, 3), True, "mamba_ssm", 1e-5)
    prompt, order = make_route(2, 7, 3)
    assert_matches_reference([*make_inputs(2, 7, 5, 3), prompt], True, "mamba_ssm", 1e-5, order)


@pytest.mark.gpu
def test_mamba_ssm_agrees_on_a_gpu() -> None:
    pytest.importorskip("selective_scan_cuda")
    assert_matches_reference([x.cuda() for x in make_inputs(2, 300, 48, 8)], True, "mamba_ssm", 1e-4)


def test_backends_load_on_first_use_and_the_choice_is_logged_once() -> None:
    script = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from mambair_ds.kernels.philox import NoiseKey, gumbel
from mambair_ds.kernels.selective_scan import selective_scan
assert not {"numba", "triton"} & set(sys.modules), "loaded too early"
own = "mambair_ds.kernels.selective_scan."
for _ in range(2):
    selective_scan(*[torch.ones(s) for s in ((1, 2, 3), (1, 2, 3), (3, 4), (1, 2, 4), (1, 2, 4))])
    gumbel(NoiseKey(0, torch.tensor([0])), 0, (1, 4), "cpu")
assert own + "cpu" in sys.modules and own + "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["selective_scan on cpu: torch backend", "philox on cpu: torch backend"]


def test_two_processes_can_compile_into_one_cache(tmp_path: Path) -> None:
    script = """
import torch
from mambair_ds.kernels.philox import NoiseKey, gumbel
for _ in range(2):
    print(gumbel(NoiseKey(3, torch.tensor([5])), 1, (1, 6), "cpu").tolist())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] and outputs[0]
    assert list(tmp_path.rglob("*.nbc")), "nothing was cached"
    after = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert after.stdout == outputs[0]


def test_kernels_run_where_no_cache_can_be_written(tmp_path: Path) -> None:
    script = """
import sys
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []  # as on a read-only file system without a home
import torch
from mambair_ds.kernels.philox import NoiseKey, gumbel
gumbel(NoiseKey(3, torch.tensor([5])), 1, (1, 6), "cpu")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_run_in_a_forked_child() -> None:
    inputs = make_inputs(2, 33, 40, 4)
    expected = selective_scan(*inputs, backend="torch")  # starts the threads, which a child does not inherit
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(selective_scan(*inputs, backend="torch"), expected) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

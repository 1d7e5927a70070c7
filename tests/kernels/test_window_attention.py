"""Window attention: both backends against a direct computation; the CPU one on any number of threads and windows."""

import pytest
import torch

from mambair_ds.kernels.window_attention import window_attention

# windows, tokens, heads, width, windows a picture, kinds
SHAPES = [(6, 16, 2, 5, 3, 4), (1, 4, 1, 1, 1, 1), (18, 36, 3, 12, 9, 2), (4, 64, 2, 29, 2, 4), (3, 9, 1, 33, 3, 1)]


def _inputs(windows, tokens, heads, width, per_picture, kinds, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    qkv = 2 * torch.randn(windows, tokens, 3, heads, width, generator=generator)
    bias = 2 * torch.randn(kinds, heads, tokens, tokens, generator=generator)
    kind = torch.randint(kinds, (per_picture,), generator=generator)
    grad = torch.randn(windows, tokens, heads * width, generator=generator)
    return qkv.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_(), kind, grad.to(dtype)


def _direct(qkv, bias, kind):
    outputs = []
    for window, (q, k, v) in enumerate(qkv.permute(0, 2, 3, 1, 4)):
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias[kind[window % len(kind)]]
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.stack(outputs)


def _run(function, qkv, bias, kind, grad):
    out = function(qkv, bias, kind)
    return [out.detach(), *torch.autograd.grad(out, (qkv, bias), grad)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, backend):
    ours = _run(lambda *x: window_attention(*x, backend=backend), *_inputs(*shape))
    exact = _run(_direct, *_inputs(*shape, dtype=torch.float64))
    for name, a, b in zip(("out", "grad_qkv", "grad_bias"), ours, exact, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert (a - b).norm() <= 2e-6 * b.norm(), name


def test_logits_far_apart_do_not_overflow():
    qkv, bias, kind, grad = _inputs(*SHAPES[0])
    qkv = (100 * qkv).detach().requires_grad_()
    ours = _run(window_attention, qkv, bias, kind, grad)
    assert all(x.isfinite().all() for x in ours)
    exact = _direct(qkv.double(), bias.double(), kind)
    assert (ours[0] - exact).norm() <= 1e-2 * exact.norm()  # logits of 1e5 have a rounding error of 1e-2


def test_equal_to_the_bit_on_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_run(window_attention, *_inputs(*SHAPES[2])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_picture_does_not_depend_on_its_batch():
    qkv, bias, kind, grad = _inputs(*SHAPES[2])
    out, grad_qkv, _ = _run(window_attention, qkv, bias, kind, grad)
    for part in (slice(0, 9), slice(9, 18)):
        alone = qkv[part].detach().requires_grad_()
        out_alone, grad_alone, _ = _run(window_attention, alone, bias, kind, grad[part])
        assert torch.equal(out_alone, out[part]) and torch.equal(grad_alone, grad_qkv[part])


def test_half_precision_comes_back_in_its_own_type():
    qkv, bias, kind, _ = _inputs(*SHAPES[0])
    exact = window_attention(qkv, bias, kind)
    out = window_attention(qkv.bfloat16(), bias, kind)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 2e-2 * exact.norm()


def test_wrong_arguments_are_refused():
    qkv, bias, kind, _ = _inputs(*SHAPES[0])
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        window_attention(qkv, bias, kind, backend="cuda")
    with pytest.raises(ValueError, match="do not fit"):
        window_attention(qkv, bias[:, :1], kind)
    with pytest.raises(ValueError, match="no multiple"):
        window_attention(qkv[:5], bias, kind)

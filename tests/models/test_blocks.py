"""The network's parts against their definitions, written out the long way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambair_ds.kernels.window_attention.reference import relative_position_index
from mambair_ds.models.attention import WindowAttention
from mambair_ds.models.feedforward import ConvFFN, GatedMLP
from mambair_ds.models.state_space import AttentiveStateSpace, Router, SelectiveScan


def _same(a, b, atol=1e-6):
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=0, atol=atol)


def test_relative_position_index():
    w = 5
    rpi = relative_position_index(w)
    for query, key in [(0, 0), (0, 24), (24, 0), (7, 13), (12, 12)]:
        down, across = query // w - key // w, query % w - key % w
        assert rpi[query, key] == (down + w - 1) * (2 * w - 1) + across + w - 1
    assert rpi.min() == 0 and rpi.max() == (2 * w - 1) ** 2 - 1


def _cut(x, w):
    """(B, H, W, C) into windows (B·H/w·W/w, w², C), row by row."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // w, w, width // w, w, channels)
    return x.transpose(2, 3).reshape(-1, w * w, channels)


def _swin_mask(height, width, w):
    """The nine regions that a roll by half a window brings together, and -100 between them, window by window."""
    regions = torch.zeros(1, height, width, 1)
    cuts = [slice(0, -w), slice(-w, -(w // 2)), slice(-(w // 2), None)]
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            regions[:, rows, columns] = 3 * i + j
    regions = _cut(regions, w)[..., 0]
    return -100.0 * (regions[:, :, None] != regions[:, None])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_with_bias_table_shift_and_mask(shifted, rows, columns):
    torch.manual_seed(0)
    w, heads, dim = 4, 3, 15
    attention = WindowAttention(dim, w, heads, shifted)
    nn.init.normal_(attention.relative_position_bias_table)
    qkv = torch.randn(2, rows * w, columns * w, 3 * dim)
    rpi = relative_position_index(w)
    windows = _cut(qkv.roll((-2, -2), (1, 2)) if shifted else qkv, w)
    q, k, v = windows.view(-1, w * w, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5
    logits = logits + attention.relative_position_bias_table[rpi].permute(2, 0, 1)
    if shifted:
        logits = logits + _swin_mask(rows * w, columns * w, w).repeat(2, 1, 1)[:, None]
    y = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    residual = torch.randn(2, rows * w, columns * w, dim)
    out = attention(qkv, residual) - residual
    _same(_cut(out.roll((-2, -2), (1, 2)) if shifted else out, w), y, atol=2e-6)


def _around(dim):
    """A norm with weights of its own, what goes around a block, and its scale."""
    norm = nn.LayerNorm(dim)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, torch.randn(2, 7, 8, dim), torch.randn(dim)


def test_conv_ffn():
    block = ConvFFN(6, 10, 5)
    x, (norm, skip, scale) = torch.randn(2, 7, 8, 6), _around(6)
    conv = block.dwconv["depthwise_conv"][0]
    h = F.gelu(block.fc1(norm(x)))
    mixed = F.conv2d(h.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2, groups=10).permute(0, 2, 3, 1)
    _same(block(x, norm, skip, scale), block.fc2(h + F.gelu(mixed)) + x + scale * skip)


def test_gated_mlp():
    block = GatedMLP(6, 10, 5)
    x, (norm, skip, scale) = torch.randn(2, 7, 8, 6), _around(6)
    x1, x2 = F.gelu(block.fc1(norm(x))).split(5, -1)
    x2 = F.layer_norm(x2, (5,), block.sg.norm.weight, block.sg.norm.bias).permute(0, 3, 1, 2)
    x2 = F.conv2d(x2, block.sg.conv.weight, block.sg.conv.bias, padding=2, groups=5).permute(0, 2, 3, 1)
    _same(block(x, norm, skip, scale), block.fc2(x1 * x2) + x + scale * skip)


def test_router_scores():
    torch.manual_seed(0)
    router, norm = Router(12, 5), nn.LayerNorm(12)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 9, 12)
    scores = F.linear(norm(x), router[0].weight, router[0].bias)
    scores = 0.5 * scores * (1 + torch.erf(scores / math.sqrt(2)))
    scores = F.linear(scores, router[2].weight, router[2].bias)
    _same(router(x, norm), scores)
    assert torch.equal(router.decide(router(x, norm), None), scores.argmax(-1))


def test_of_equal_classes_the_first_is_chosen():
    router = Router(3, 4)
    assert router.decide(torch.tensor([[[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 1.0, 5.0]]]), None).tolist() == [[1, 0]]


def test_selective_scan_parameters_against_the_recurrence():
    torch.manual_seed(0)
    dim, states, length = 20, 3, 11
    scan = SelectiveScan(dim, states, None)
    nn.init.normal_(scan.Ds)
    u, prompt = torch.randn(1, length, dim), torch.randn(1, length, states)
    order = torch.randperm(length)[None]
    sorted_u = u[:, order[0]]
    projected = sorted_u[0] @ scan.x_proj_weight[0].T
    raw, B, C = projected[:, :2], projected[:, 2:5], projected[:, 5:]  # rank of the step: ceil(20 / 16)
    step = F.softplus(raw @ scan.dt_projs_weight[0].T + scan.dt_projs_bias[0])
    A, h, y = -torch.exp(scan.A_logs), torch.zeros(dim, states), []
    for t in range(length):
        h = torch.exp(step[t, :, None] * A) * h + step[t, :, None] * B[t] * sorted_u[0, t, :, None]
        y.append((h * (C[t] + prompt[0, t])).sum(-1) + scan.Ds * sorted_u[0, t])
    _same(scan(u, prompt, order)[0, order[0]], torch.stack(y), atol=2e-6)


def test_prompts_stay_in_token_order_while_tokens_are_sorted():
    """The published network adds the prompt of the token at place k to the k-th token of the sorted sequence."""
    torch.manual_seed(0)
    module = AttentiveStateSpace(6, 6, 4, 3, 5, index=0, scan_backend=None).eval()
    x, embedding_a, norm = torch.randn(1, 3, 4, 6), torch.randn(3, 4), nn.LayerNorm(6)
    seen = []
    module.selectiveScan.register_forward_pre_hook(lambda _, args: seen.append(args))
    out = module(x, norm, embedding_a, None)
    (u, prompt, places), tokens = seen[0], x.flatten(1, 2)
    index = module.route(tokens, norm).argmax(-1)
    assert len(index.unique()) > 1
    _same(prompt, (module.embeddingB.weight @ embedding_a)[index])
    image = module.in_proj(norm(x).permute(0, 3, 1, 2))
    gated = (image * torch.sigmoid(module.CPE(image))).flatten(2).transpose(1, 2)
    order = torch.sort(index[0], stable=True).indices
    assert torch.equal(places[0], order)
    _same(u, gated)
    in_place = torch.arange(len(order))[None]
    y = module.out_proj(module.out_norm(module.selectiveScan(u[:, order], prompt, in_place)))
    restored = torch.empty_like(y)
    restored[0, order] = y[0]
    _same(out, restored.view_as(out) + x)

"""Counter-based noise: the generator's known answers, agreement of backends, independence of batch and threads."""

import math

import pytest
import torch
from torch import Tensor

from mambair_ds.kernels.philox import NoiseKey, gumbel, normal
from mambair_ds.kernels.philox.reference import philox4x32

SEED = 0xA99F31D0A4093822
POSITIONS = torch.tensor([0x0370734413198A2E, 0, 5, 2**40 + 3])


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # published with the Random123 library
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert tuple(word.item() for word in philox4x32((c0, c1, c2, c3), key)) == words


def test_elements_are_the_documented_words() -> None:
    noise = normal(NoiseKey(SEED, POSITIONS), 9, (4, 3, 3), "cpu", backend="reference").flatten(1)
    low, high = POSITIONS[0] & 0xFFFFFFFF, POSITIONS[0] >> 32
    words = philox4x32((torch.tensor(1), torch.tensor(9), low, high), (SEED & 0xFFFFFFFF, SEED >> 32))
    uniform = [((int(word) >> 9) + 0.5) / 2**23 for word in words]
    radius, angle = math.sqrt(-2 * math.log(uniform[2])), 2 * math.pi * uniform[3]
    assert noise[0, 6].item() == pytest.approx(radius * math.cos(angle), abs=1e-6)
    assert noise[0, 7].item() == pytest.approx(radius * math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("draw", [gumbel, normal])
@pytest.mark.parametrize("shape", [(4, 1), (4, 33, 7), (4, 1500, 3)])
@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_agree(draw, shape: tuple[int, ...], stream: int, backend: str, device: str) -> None:  # type: ignore[no-untyped-def]
    key = NoiseKey(SEED, POSITIONS)
    noise = draw(key, stream, shape, device if backend == "triton" else "cpu", backend=backend).cpu()
    torch.testing.assert_close(noise, draw(key, stream, shape, "cpu", backend="reference"), rtol=1e-6, atol=1e-6)


def test_the_ends_of_the_uniform_range_are_finite_and_accurate() -> None:
    """No draw of a test comes near 2^-24 and 1 - 2^-24, so the CPU's logarithm is tried on them itself."""
    from mambair_ds.kernels.philox.cpu import log

    for u in (2.0**-24, 1.5 * 2**-23, 0.25, 0.7071067, 0.7071068, 1 - 2.0**-10, 1 - 1.5 * 2**-23, 1 - 2.0**-24):
        assert float(log(torch.tensor(u).numpy()[()])) == pytest.approx(math.log(u), rel=3e-7)


@pytest.mark.parametrize("draw", [gumbel, normal])
def test_a_sample_does_not_depend_on_batch_threads_or_size(draw) -> None:  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    together = draw(NoiseKey(SEED, POSITIONS), 3, (4, 90, 64), "cpu")
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            for i in range(4):
                alone = draw(NoiseKey(SEED, POSITIONS[i : i + 1]), 3, (1, 90, 64), "cpu")
                assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draw(NoiseKey(SEED, POSITIONS), 3, (4, 10, 64), "cpu"), together[:, :10])


def test_seed_stream_and_position_each_change_everything() -> None:
    def draw(seed: int, stream: int, position: int) -> Tensor:
        return normal(NoiseKey(seed, torch.tensor([position])), stream, (1, 4096), "cpu")

    base = draw(1, 2, 3)
    others = [draw(2, 2, 3), draw(1 + 2**32, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 2, 3 + 2**32)]
    for other in others:
        assert abs(torch.corrcoef(torch.cat([base, other]))[0, 1].item()) < 0.06


@pytest.mark.parametrize(
    ("draw", "mean", "variance"), [(gumbel, 0.57721566, math.pi**2 / 6), (normal, 0.0, 1.0)], ids=["gumbel", "normal"]
)
def test_moments(draw, mean: float, variance: float) -> None:  # type: ignore[no-untyped-def]
    noise = draw(NoiseKey(11, torch.arange(4)), 0, (4, 250_000), "cpu").double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(mean, abs=0.006)
    assert noise.var().item() == pytest.approx(variance, rel=0.01)
    for lag in (1, 2, 4, 4096):
        assert abs(torch.corrcoef(torch.stack([noise[0, lag:], noise[0, :-lag]]))[0, 1].item()) < 0.01


@pytest.mark.parametrize(
    ("seed", "stream", "positions", "message"),
    [
        (-1, 0, torch.zeros(2, dtype=torch.int64), "seed is -1"),
        (2**64, 0, torch.zeros(2, dtype=torch.int64), "seed is 18446744073709551616"),
        (0, 2**32, torch.zeros(2, dtype=torch.int64), "stream is 4294967296"),
        (0, 0, torch.zeros(3, dtype=torch.int64), r"of shape \(3,\), expected torch.int64 of shape \(2,\)"),
        (0, 0, torch.zeros(2), r"positions is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(seed: int, stream: int, positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gumbel(NoiseKey(seed, positions), stream, (2, 8), "cpu")

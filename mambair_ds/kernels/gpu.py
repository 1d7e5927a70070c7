"""What the Triton backends share: matrix products and activations.

Triton's interpreter runs the kernels on a CPU for the tests. It has no inline assembly, and multiplies bfloat16 numbers
as if they were integers.
"""

# mypy: disable-error-code="no-untyped-def"

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total (or None, for zeros) + a b, with float32 sums; PRECISION says how float32 numbers are multiplied."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """max(x, 0) - |x| Φ(-|x|), with log2 Φ(-|x|) a polynomial: within 2e-7, and 2e-6 of the result above -3."""
    t = tl.abs(x)
    p = -8.719965527729255e-07 * t + 4.573650984428112e-05
    p = p * t - 0.0008342686249017471
    p = p * t + 0.008232910358883867
    p = p * t - 0.05357728363583862
    p = p * t - 0.4587008718677758
    p = p * t - 1.1512044252996487
    p = p * t - 0.9999951154578158
    return tl.maximum(x, 0.0) - t * tl.exp2(p)


@triton.jit
def gelu_slope(x):
    """GELU's derivative within 2e-7: h(-x) below 0, 1 - h(x) above, where h(t) = Φ(-t) - t φ(t).

    h is 0 at 0.7518, and h(t) / (0.7518 - t) is positive: its logarithm is a polynomial.
    """
    t = tl.abs(x)
    p = -1.9199096979011044e-05 * t + 0.00034553037965406115
    p = p * t - 0.0028440558493377736
    p = p * t + 0.014655694467394901
    p = p * t - 0.0547286983067037
    p = p * t - 0.5607138877845187
    p = p * t - 0.38318490157846274
    p = p * t - 0.5884047808049608
    h = (0.7517915246935644 - t) * tl.exp2(p)
    return tl.where(x >= 0, 1.0 - h, h)

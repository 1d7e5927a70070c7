"""How far bf16 is from float32, layer by layer.

    python benchmarks/layers.py --weights experiments/x2_light --lq DIR

One forward and backward pass in float32 and one under bfloat16 autocast, on the same crops, weights and noise. The
classes that the first pass routes tokens to are injected into the second: a token in another class is another
computation, not an error. How many would have gone elsewhere is a column. Errors are root mean squares relative to the
float32 tensor's: of what enters the next layer, of what a layer adds to its input, and of the gradients of its weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mambair_ds.data.pictures import read_picture
from mambair_ds.inference import to_tensor
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models.mambairv2 import AttentiveLayer, MambaIRv2
from mambair_ds.models.state_space import Router
from mambair_ds.weights import open_network


class Pass:
    """What one forward and backward pass of a network leaves."""

    def __init__(self, network: MambaIRv2, lq: Tensor, *, bf16: bool, routes: list[Tensor] | None = None) -> None:
        self.classes: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.added: list[Tensor] = []
        layers = [module for module in network.modules() if isinstance(module, AttentiveLayer)]

        def decide(router: Router, scores: Tensor, noise: object) -> Tensor:
            self.classes.append(Router.decide(router, scores, noise))  # type: ignore[arg-type]
            return routes[len(self.classes) - 1] if routes else self.classes[-1]

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs.append(output.detach().float())
            self.added.append((output - inputs[0]).detach().float())

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        routers = [module for module in network.modules() if isinstance(module, Router)]
        for router in routers:
            router.decide = decide.__get__(router)  # type: ignore[method-assign]
        network.zero_grad()
        with torch.autocast(lq.device.type, torch.bfloat16, enabled=bf16):
            self.restored = network(lq, NoiseKey(0, torch.arange(len(lq), device=lq.device))).float()
        self.restored.square().mean().backward()
        for hook in hooks:
            hook.remove()
        for router in routers:
            del router.decide
        self.gradients = [
            torch.cat([p.grad.flatten().float() for p in layer.parameters() if p.grad is not None]) for layer in layers
        ]
        self.restored = self.restored.detach()


def error(found: Tensor, expected: Tensor) -> float:
    """Relative root mean square."""
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a weight file or the folder of a run")
    parser.add_argument("--lq", required=True, type=Path, metavar="DIR", help="folder of LQ pictures")
    parser.add_argument("--side", type=int, default=64, help="of the crops, one from the middle of each picture")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = open_network(arguments.weights).to(device).train()
    crops, side = [], arguments.side
    for path in sorted(arguments.lq.iterdir()):
        picture = to_tensor(read_picture(path, "rgb").pixels, device)
        top, left = ((size - side) // 2 for size in picture.shape[2:])
        if top >= 0 and left >= 0:
            crops.append(picture[:, :, top : top + side, left : left + side])
    lq = torch.cat(crops)
    exact = Pass(network, lq, bf16=False)
    near = Pass(network, lq, bf16=True, routes=exact.classes)
    print(f"torch {torch.__version__}, {device.type}, {len(lq)} crops of {side}x{side}, {arguments.weights}\n")
    print("| layer | state after it | what it adds | gradients of its weights | other classes |")
    print("| --- | --- | --- | --- | --- |")
    for i in range(len(exact.outputs)):
        pairs = (
            (near.outputs[i], exact.outputs[i]),
            (near.added[i], exact.added[i]),
            (near.gradients[i], exact.gradients[i]),
        )
        elsewhere = (near.classes[i] != exact.classes[i]).float().mean().item()
        print(f"| {i} | {' | '.join(f'{error(*pair):.2e}' for pair in pairs)} | {100 * elsewhere:.2f} % |")
    psnr = -10 * (near.restored - exact.restored).square().mean().log10().item()
    print(f"\nThe restored crops of both passes: {psnr:.1f} dB apart.")


if __name__ == "__main__":
    main()

"""Losses beside the pixel loss, against their definitions."""

import pytest
import torch
from conftest import Workplace
from torch import nn

from mambair_ds.config import PerceptualConfig, UserError
from mambair_ds.training.losses import fft_loss
from mambair_ds.training.perceptual import PerceptualLoss

LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"]


def vgg19():
    """The convolutions of VGG19 as torchvision orders them."""
    layers, inputs = [], 3
    for width in LAYOUT:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = vgg19()
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({f"features.{key}": value for key, value in network.state_dict().items()}, path)
    return path, network


@pytest.mark.parametrize("layers", [{"conv1_2": 0.5}, {"conv3_1": 1.0, "conv2_2": 2.0}, {"conv5_4": 1.0}])
def test_features_are_those_of_torchvisions_vgg19(weights, layers):
    path, network = weights
    index = {}
    block, number = 1, 0
    for i, layer in enumerate(network):
        if isinstance(layer, nn.Conv2d):
            number += 1
            index[f"conv{block}_{number}"] = i
        elif isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
    x, y = torch.rand(2, 2, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = sum(
            factor
            * (network[: index[name] + 1]((x - mean) / std) - network[: index[name] + 1]((y - mean) / std)).abs().mean()
            for name, factor in layers.items()
        )
    loss = PerceptualLoss(PerceptualConfig(weights=path, layer_weights=layers, loss_weight=3.0))
    assert loss(x, y).item() == pytest.approx(3 * float(expected), rel=1e-4)
    grey = loss(x[:, :1].requires_grad_(), y[:, :1])
    grey.backward()
    assert not any(p.requires_grad for p in loss.parameters())


def test_other_weights_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"features\.0 does not fit"):
        PerceptualLoss(PerceptualConfig(weights=tmp_path / "x.pth"))


def test_the_fourier_loss_is_the_mean_distance_of_spectra():
    x, y = torch.rand(2, 2, 3, 8, 6, dtype=torch.float64)
    spectra = [torch.view_as_real(torch.fft.rfft2(p.float())) for p in (x, y)]
    assert fft_loss(x, y).item() == pytest.approx((spectra[0] - spectra[1]).abs().mean().item(), rel=1e-5)
    assert fft_loss(x, x).item() == 0


def test_a_run_logs_every_loss(workplace: Workplace, weights) -> None:
    settings = [f"train.perceptual_loss.weights={weights[0]}", "train.perceptual_loss.layer_weights={conv1_2: 1.0}"]
    done = workplace.train(
        *settings, "train.fft_loss.loss_weight=0.05", "train.total_iter=2", "data.train.batch_size=1"
    )
    assert done.returncode == 0, done.stderr
    for name in ("l_pix", "l_percep", "l_fft"):
        assert workplace.scalars(f"losses/{name}").keys() == {1, 2}
    assert "l_percep: " in done.stdout
    done = workplace.train("train.perceptual_loss.weights=nowhere.pth")
    assert done.returncode == 2 and "vgg19-dcbb9e9d.pth" in done.stderr
    done = workplace.train(f"train.perceptual_loss.weights={workplace.config}", "name=other")
    assert done.returncode == 2 and "broken, or no file of weights" in done.stderr
    assert not (workplace.folder / "experiments/other").exists()

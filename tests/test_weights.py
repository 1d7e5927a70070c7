"""Weight files: what is written is read, what does not fit is said, and nothing half-written remains."""

import errno
import os

import pytest
import torch
from networks import build_tiny, published

from mambair_ds.config import NetworkConfig, UserError
from mambair_ds.weights import describe_weights, load_network, open_network, read_weights, save_network, weight_file


def _equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["net_g_8.pth", "net.safetensors"])
def test_what_is_saved_is_loaded(tmp_path, name):
    model, other = build_tiny(0), build_tiny(1)
    save_network(tmp_path / "new" / "folder" / name, {"params": model.state_dict()})
    assert load_network(other, tmp_path / "new" / "folder" / name) == []
    _equal(other.state_dict(), model.state_dict())
    assert os.listdir(tmp_path / "new" / "folder") == [name]


def test_published_layout(tmp_path):
    model, mean = build_tiny(0), build_tiny(1)
    path = tmp_path / "net_g_8.pth"
    save_network(path, {"params": model.state_dict(), "params_ema": mean.state_dict()})
    content = torch.load(path, weights_only=True)
    assert list(content) == ["params", "params_ema"]
    assert list(content["params"]) == list(model.state_dict())
    _equal(read_weights(path), dict(model.state_dict()))
    _equal(read_weights(path, "params_ema"), dict(mean.state_dict()))


def test_without_a_mean_the_params_are_taken_and_it_is_said(tmp_path, caplog):
    model = build_tiny(0)
    save_network(tmp_path / "net.pth", {"params": model.state_dict()})
    with caplog.at_level("INFO"):
        _equal(read_weights(tmp_path / "net.pth", "params_ema"), dict(model.state_dict()))
    assert "has no params_ema" in caplog.text


def test_bare_and_wrapped_state_dicts(tmp_path):
    model = build_tiny(0)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "net.pth")
    assert load_network(build_tiny(1), tmp_path / "net.pth") == []


def test_strict_loading_names_file_keys_and_shapes(tmp_path):
    path = tmp_path / "wide.pth"
    save_network(path, {"params": build_tiny(embed_dim=24).state_dict()})
    model = build_tiny(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_network(model, path)
    message = str(error.value)
    assert str(path) in message and "another network" in message
    assert "conv_first.weight: 24×3×3×3 in the file, 12×3×3×3 in the network" in message
    assert "more" in message and message.count("\n") <= 7
    _equal(model.state_dict(), before)


def test_loose_loading_takes_another_scale_and_reports_the_head(tmp_path):
    x2, x3 = build_tiny(0, upsampler="pixelshuffle"), build_tiny(1, upsampler="pixelshuffle", upscale=3)
    save_network(tmp_path / "x2.pth", {"params": x2.state_dict()})
    skipped = load_network(x3, tmp_path / "x2.pth", strict=False)
    assert skipped == [
        "upsample.0.weight: 256×64×3×3 in the file, 576×64×3×3 in the network",
        "upsample.0.bias: 256 in the file, 576 in the network",
    ]
    assert torch.equal(x3.state_dict()["conv_last.weight"], x2.state_dict()["conv_last.weight"])
    # ×4 has one more step than ×2: its own weights stay.
    x4 = build_tiny(2, upsampler="pixelshuffle", upscale=4)
    assert load_network(x4, tmp_path / "x2.pth", strict=False) == [
        "upsample.2.weight: not in the file, the network has 256×64×3×3",
        "upsample.2.bias: not in the file, the network has 256",
    ]
    save_network(tmp_path / "x4.pth", {"params": x4.state_dict()})
    assert "upsample.2.bias: 256 in the file, not in the network" in load_network(x2, tmp_path / "x4.pth", strict=False)


def test_loose_loading_of_something_else_is_an_error(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="another network"):
        load_network(build_tiny(0), tmp_path / "other.pth", strict=False)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_broken_files(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="cannot read it"):
        read_weights(path)
    save_network(path, {"params": build_tiny(0).state_dict()})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not weights at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="broken, or no file of weights") as error:
            read_weights(path)
        assert str(path) in str(error.value)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD"],))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save({"params": {"a": Payload()}}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="no file of weights"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"params": {}}, {"step": 3}, [torch.zeros(1)], {"params": [1]}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(UserError, match="no weights in it"):
        read_weights(tmp_path / "net.pth")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, old = tmp_path / "net.pth", build_tiny(0).state_dict()
    save_network(path, {"params": old})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_network(path, {"params": build_tiny(1).state_dict()})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["net.pth"]
    _equal(read_weights(path), dict(old))


def test_safetensors_holds_one_set(tmp_path):
    state = build_tiny(0).state_dict()
    with pytest.raises(ValueError):
        save_network(tmp_path / "net.safetensors", {"params": state, "params_ema": state})


@pytest.mark.parametrize("name", sorted(published()["variants"]))
def test_the_network_is_read_off_its_weights(name):
    variants = published()
    shapes = variants["state_dicts"][variants["variants"][name]["state_dict"]]
    weights = {key: torch.empty(shape, device="meta") for key, shape, _ in shapes}
    wanted = NetworkConfig.model_validate(variants["variants"][name]["network_g"])
    assert describe_weights(weights, name) == wanted.model_copy(update={"img_size": 64})


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_ratio": 1.9, "type": "MambaIRv2"},
        {"resi_connection": "3conv", "qkv_bias": False},
        {"upscale": 4, "upsampler": "nearest+conv", "in_chans": 1},
        {"upscale": 4, "upsampler": "pixelshuffle", "num_heads": [2, 3], "depths": [1, 2]},
        {"upscale": 1, "upsampler": "", "convffn_kernel_size": 3, "window_size": 8},
    ],
)
def test_unpublished_networks_open_by_their_weights_alone(changes, tmp_path):
    model = build_tiny(**changes)
    save_network(tmp_path / "models" / "net_g_8.pth", {"params": model.state_dict()})
    save_network(tmp_path / "models" / "net_g_20.pth", {"params": model.state_dict()})
    assert weight_file(tmp_path).name == "net_g_20.pth"
    opened = open_network(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor)


def test_other_weights_are_no_network(tmp_path):
    save_network(tmp_path / "other.pth", {"params": {"conv.weight": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"other.pth: not the weights of a MambaIRv2"):
        open_network(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no models/net_g_ITER\.pth"):
        open_network(tmp_path)

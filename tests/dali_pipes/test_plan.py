from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dali_pipes.plan import Draw, Plan
from dali_pipes.settings import AugmentSettings, LoaderSettings

LABELS = np.array([1.0] * 20 + [0.0] * 980)


def make(labels=LABELS, seed=1, train=True, rank=0, world_size=1, augment=None, **settings):
    return Plan(labels, LoaderSettings(**settings), seed, train, augment or AugmentSettings(), rank, world_size)


def same(one: Draw, other: Draw):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_balanced_epoch_has_the_share_asked_for(share):
    drawn = make(positive_share=share, batch_size=8).drawn(0)
    first = make(positive_share=share, batch_size=8).drawn(0, 2)
    assert sum(first.values()) == 16
    assert abs(first["positive"] - share * 16) <= 2
    assert abs(drawn["positive"] / sum(drawn.values()) - share) < 0.01


def test_positives_of_a_balanced_epoch_are_spread_over_all_of_it():
    order = make(positive_share=0.125).order(0)
    positive = LABELS[order] == 1
    assert all(positive[start : start + 16].any() for start in range(len(order) - 16))


@pytest.mark.parametrize(
    ("count", "share", "batch"), [(1003, 0.125, 8), (997, 1 / 16, 16), (1001, 0.1, 10), (999, 0.3, 10)]
)
def test_no_whole_batch_of_a_balanced_epoch_lacks_its_positives(count, share, batch):
    """Whatever is left over at the epoch's end, and whatever a share comes to in binary."""
    labels = (np.arange(count) % 40 == 0).astype(float)
    plan = Plan(labels, LoaderSettings(positive_share=share, batch_size=batch), seed=3, train=True)
    order = plan.order(1)[: plan.steps * batch].reshape(-1, batch)
    positives = labels[order].sum(axis=1)
    assert positives.min() >= np.floor(share * batch + 1e-6)
    assert positives.max() <= np.ceil(share * batch)


def test_a_share_that_is_no_binary_number_gives_every_batch_the_same():
    """7 / 0.07 is a little less than 100, and 700 * 0.07 a little more than 49."""
    labels = (np.arange(700) % 40 == 0).astype(float)
    plan = Plan(labels, LoaderSettings(positive_share=0.07, batch_size=100), seed=3, train=True)
    positives = [labels[plan.order(epoch)].reshape(-1, 100).sum(axis=1) for epoch in range(40)]
    assert np.unique(positives).tolist() == [7]


def test_what_is_drawn_is_counted_over_all_ranks():
    plan = make(positive_share=0.25, batch_size=8, rank=1, world_size=3)
    assert sum(plan.drawn(0).values()) == 1000 // 24 * 24
    assert plan.drawn(0, 5) == {"negative": 90, "positive": 30}


@pytest.mark.parametrize(("share", "samples"), [(0.9, 8), (0.99, 50), (0.95, 10), (0.01, 5)])
def test_a_short_balanced_epoch_has_both_classes(share, samples):
    labels = np.array([1.0, 1, 0, 0, 0, 0])
    settings = LoaderSettings(positive_share=share, batch_size=2, epoch_samples=samples)
    order = Plan(labels, settings, seed=3, train=True).order(0)
    assert len(order) == samples
    assert set(labels[order]) == {0, 1}


def test_a_balanced_epoch_shows_no_row_twice_more_often_than_another_of_its_class():
    counts = np.bincount(make(positive_share=0.5).order(3), minlength=1000)
    assert np.ptp(counts[:20]) <= 1
    assert counts[20:].max() == 1


def test_a_natural_epoch_is_a_permutation():
    order = make(sampling="natural").order(0)
    assert sorted(order) == list(range(1000))
    assert list(order) != list(range(1000))


def test_epoch_samples_sets_the_length_of_training_epochs_only():
    assert make(sampling="natural", epoch_samples=2500, batch_size=10).steps == 250
    assert make(train=False, epoch_samples=2500, val_batch_size=10).steps == 100


def test_a_weighted_epoch_draws_the_classes_alike():
    drawn = make(sampling="weighted", epoch_samples=20_000, batch_size=10).drawn(0)
    assert abs(drawn["positive"] / 20_000 - 0.5) < 0.02


@pytest.mark.parametrize("labels", [np.zeros(30), np.ones(30), np.full(30, np.nan)])
def test_balance_among_one_class_is_the_natural_order(labels):
    assert sorted(make(labels).order(0)) == list(range(30))


@pytest.mark.parametrize("sampling", ["natural", "balanced", "weighted"])
def test_epochs_and_seeds_differ_and_repeat_themselves(sampling):
    plan = make(sampling=sampling)
    assert np.array_equal(plan.order(4), make(sampling=sampling).order(4))
    assert not np.array_equal(plan.order(4), plan.order(5))
    assert not np.array_equal(plan.order(4), make(sampling=sampling, seed=2).order(4))
    assert same(plan.sample(4, 7), plan.sample(4, 7))
    numbers = {plan.sample(epoch, place).pick for epoch in range(5) for place in range(5)}
    assert len(numbers) == 25
    assert plan.sample(0, 0).pick != make(sampling=sampling, seed=2).sample(0, 0).pick


@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_an_epoch_without_gap_or_overlap(train):
    plans = [make(rank=r, world_size=3, train=train, batch_size=4, val_batch_size=4) for r in range(3)]
    places = np.concatenate([plan.places(step) for plan in plans for step in range(plan.steps)])
    expected = 1000 // 12 * 12 if train else 1000
    assert sorted(places) == list(range(expected))
    assert len({plan.steps for plan in plans}) == 1


def test_validation_neither_drops_nor_repeats_nor_changes():
    plan = make(train=False, val_batch_size=7)
    places = np.concatenate([plan.places(step) for step in range(plan.steps)])
    assert np.array_equal(plan.order(0)[places], np.arange(1000))
    assert same(plan.sample(0, 5), Draw())


def test_a_rank_without_rows_has_no_steps():
    assert make(np.zeros(2), train=False, rank=2, world_size=3).steps == 0


def test_turning_one_change_off_leaves_the_others_as_they_were():
    on, off = make(), make(augment=AugmentSettings(hflip=0, blur=0, grid=0, dropout=0))
    for place in range(50):
        a, b = on.sample(0, place), off.sample(0, place)
        assert (a.angle, a.zoom, a.pick, a.brightness, a.noise_sigma) == (
            b.angle,
            b.zoom,
            b.pick,
            b.brightness,
            b.noise_sigma,
        )
        assert not b.hflip
        assert b.blur_sigma == 0
        assert b.grid is None


def test_changes_come_with_their_probabilities_and_within_their_limits():
    settings = AugmentSettings()
    draws = [make().sample(1, place) for place in range(4000)]
    share = lambda happens: np.mean([happens(draw) for draw in draws])  # noqa: E731
    assert abs(share(lambda d: d.hflip) - settings.hflip) < 0.03
    assert abs(share(lambda d: d.vflip) - settings.vflip) < 0.03
    assert abs(share(lambda d: d.angle != 0) - settings.affine) < 0.03
    assert abs(share(lambda d: d.contrast != 1) - settings.tone) < 0.03
    assert abs(share(lambda d: d.noise_sigma > 0) - settings.noise) < 0.03
    assert abs(share(lambda d: d.grid is not None) - settings.grid) < 0.03
    assert abs(share(lambda d: len(d.holes) > 0) - settings.dropout) < 0.03
    angles = np.array([d.angle for d in draws])
    assert 14 < np.abs(angles).max() <= settings.rotate_deg
    assert abs(angles.mean()) < 0.5
    assert max(abs(d.shift_x) for d in draws) <= settings.shift
    assert max(abs(d.zoom - 1) for d in draws) <= settings.scale
    holes = np.concatenate([d.holes for d in draws])
    assert holes.min() >= 0
    assert holes.max() <= 1
    assert ((holes[:, 2:] - holes[:, :2]) <= settings.dropout_size + 1e-6).all()
    assert max(len(d.holes) for d in draws) == settings.dropout_holes
    assert max(np.abs(d.grid).max() for d in draws if d.grid is not None) <= settings.grid_limit


def test_a_pictures_holes_are_of_every_number_alike():
    plan = make(augment=AugmentSettings(dropout=1.0, dropout_holes=4))
    counts = np.bincount([len(plan.sample(1, place).holes) for place in range(2000)])
    assert counts[0] == 0
    assert np.abs(counts[1:] / 2000 - 1 / 4).max() < 0.04


def test_grid_dropout_blackens_a_quarter():
    """Half of each cell's side, either way (Chen et al. 2020, keep ratio)."""
    plan = make(augment=AugmentSettings(dropout=0, grid_dropout=1.0))
    shares = []
    for place in range(100):
        seen = np.ones((200, 200))
        for top, left, bottom, right in np.round(plan.sample(1, place).holes * 200).astype(int):
            seen[top:bottom, left:right] = 0
        shares.append(1 - seen.mean())
    assert abs(np.mean(shares) - 0.25) < 0.02
    assert max(shares) < 0.4


RANGES = {
    **{"angle": (-15, 15), "zoom": (0.85, 1.15), "shift_x": (-0.06, 0.06), "shift_y": (-0.06, 0.06)},
    **{"patch_x": (0, 1), "patch_y": (0, 1), "pick": (0, 1), "window_shift": (-0.1, 0.1), "window_zoom": (0.8, 1.2)},
    **{"brightness": (-0.1, 0.1), "contrast": (0.9, 1.1), "gamma": (0.8, 1.2), "noise_sigma": (0, 0.03)},
    **{"noise_x": (0, 1), "noise_y": (0, 1), "blur_sigma": (0.3, 1.2), "sharpen": (0.2, 1)},
}


def test_numbers_fill_their_ranges_evenly_and_know_nothing_of_each_other():
    always = dict.fromkeys(("affine", "window", "tone", "noise", "blur", "sharpen"), 1.0)
    plan = make(augment=AugmentSettings(**always))
    draws = [plan.sample(1, place) for place in range(4000)]
    shares = np.array([[(getattr(d, n) - low) / (high - low) for d in draws] for n, (low, high) in RANGES.items()])
    assert np.abs(np.sort(shares) - (np.arange(4000) + 0.5) / 4000).max() < 0.03  # Kolmogorov-Smirnov
    assert np.abs(np.corrcoef(shares) - np.eye(len(RANGES))).max() < 0.07


@pytest.mark.parametrize(
    ("change", "number", "still"),
    [
        *(("affine", "angle", 0), ("window", "window_zoom", 1), ("tone", "gamma", 1)),
        *(("noise", "noise_sigma", 0), ("blur", "blur_sigma", 0), ("sharpen", "sharpen", 0)),
    ],
)
def test_each_change_comes_as_often_as_asked_for(change, number, still):
    plan = make(augment=AugmentSettings(**{change: 0.35}))
    assert abs(np.mean([getattr(plan.sample(1, place), number) != still for place in range(2000)]) - 0.35) < 0.03


def test_a_stream_is_philoxs_by_key_and_counter_whatever_was_drawn_before():
    plan = make(seed=9)
    for epoch, purpose, place in ((3, 1, 7), (3, 1, 8), (0, 4, 7), (3, 1, 7)):
        found = plan._generator(epoch, purpose, place)
        fresh = np.random.Generator(np.random.Philox(key=[9, epoch], counter=[0, place, purpose, 0]))
        assert np.array_equal(found.random(5), fresh.random(5))
        assert np.array_equal(found.integers(0, 9, 3, np.int32), fresh.integers(0, 9, 3, np.int32))  # halves a word
        assert found.beta(0.4, 0.4) == fresh.beta(0.4, 0.4)


def test_threads_draw_side_by_side_what_one_alone_draws():
    plan = make()
    alone = [plan.sample(2, place) for place in range(400)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda place: plan.sample(2, place), range(400)))
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_without_choice_among_windows_the_first_is_taken():
    plan = make(augment=AugmentSettings(choose_window=False))
    assert {plan.sample(0, place).pick for place in range(20)} == {0.0}

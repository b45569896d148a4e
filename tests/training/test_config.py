"""CFG: defaults of the mission, presets, overrides, debug mode, and errors that name the place."""

from __future__ import annotations

import pytest
import timm
import yaml

from preprocessing.errors import ConfigError
from preprocessing.settings import ConvertSettings
from training import checkpoint
from training.config import CFG, Config, checked, dump, load_config, presets


@pytest.mark.parametrize("setting", ["focal_alpha=-0.5", "class_weights=-3", "class_weights=0", "class_weights=.nan"])
def test_a_loss_that_is_none_is_refused(setting):
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        load_config(None, (f"train.{setting}",))


def test_a_focusing_exponent_without_a_finite_slope_is_refused():
    with pytest.raises(ConfigError, match=r"focal_gamma = 0\.5: 1 or more, or 0 for none"):
        load_config(None, ("train.focal_gamma=0.5",))
    assert load_config(None, ("train.focal_gamma=0",)).train.focal_gamma == 0


def test_a_level_may_be_named_as_a_number():
    assert load_config(None, ("pipeline.patch_level=2048",)).pipeline.patch_level == "2048"


def test_a_wrong_override_is_named_and_not_the_preset():
    with pytest.raises(ConfigError, match=r"^--set: train\.epochs = 'none'"):
        load_config("small-cpu", ("train.lr=1", "train.epochs=none"))


def test_what_a_checkpoint_may_be_continued_with_is_in_the_tree():
    tree = Config().model_dump()
    for name in checkpoint.FREE:
        section, _, setting = name.partition(".")
        found = tree[section]
        for part in filter(None, setting.split(".")):
            found = found[part]


def test_a_quoted_number_stays_text():
    config = load_config(None, ("pipeline.patch_level='2048'",))
    assert config.pipeline.patch_level == "2048"
    assert load_config(None, ("train.lr=3e-4",)).train.lr == 3e-4


def test_defaults_are_the_missions():
    assert CFG.model.backbone == "efficientnet_b3"
    assert (CFG.pipeline.height, CFG.pipeline.width) == (512, 512)
    assert (CFG.data.loader.batch_size, CFG.data.loader.val_batch_size) == (8, 32)
    assert (CFG.train.lr, CFG.train.weight_decay) == (1e-4, 1e-6)
    assert (CFG.train.loss, CFG.train.patience) == ("focal", 3)
    assert load_config("default") == CFG == load_config(None)


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_name_models_that_timm_has(name):
    assert timm.is_model(load_config(name).model.backbone)


def test_the_presets_of_the_mission_are_there():
    assert {"default", "small-cpu", "demo", "high-resolution", "rsna-subset"} <= set(presets())


def test_a_section_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  lr: 1e-3\ndata:\n  folds: 3\ntrain:\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: train stands there twice.*line"):
        load_config(tmp_path / "mine.yaml")


def test_a_file_that_is_not_utf8_is_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("train:".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: not UTF-8, so no YAML file\."):
        load_config(tmp_path / "mine.yaml")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 0.01\n  epochs: 7\n")
    config = load_config(path, ("train.lr=3e-4", "train.epochs=2", "train.epochs=5"))
    assert (config.train.lr, config.train.epochs) == (3e-4, 5)


def test_values_are_read_as_yaml():
    config = load_config(None, ("model.aux=[density, view]", "data.max_images=null", "model.compile=true"))
    assert config.model.aux == ("density", "view")
    assert config.data.max_images is None
    assert config.model.compile is True


def test_debug_mode_takes_a_subset_and_an_explicit_override_wins():
    config = load_config(None, ("train.max_steps=9",), debug=True)
    assert config.debug
    assert config.data.max_images == 48
    assert config.train.max_steps == 9


@pytest.mark.parametrize("asked", ["--set debug=true", "--set debug=1", "file"])
def test_debug_mode_is_one_thing_wherever_it_is_asked_for(tmp_path, asked):
    path = tmp_path / "config.yaml"
    path.write_text("train: {lr: 0.01}\n" + ("debug: 1\n" if asked == "file" else ""))
    overrides = () if asked == "file" else (asked.removeprefix("--set "),)
    assert load_config(path, overrides) == load_config(path, debug=True)
    assert load_config(path, (*overrides, "debug=false")).train.max_steps is None


def test_a_debug_runs_own_configuration_reads_back_equal(tmp_path):
    config = load_config(None, ("train.max_steps=1", "train.epochs=1"), debug=True)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path) == load_config(path, debug=True) == config
    assert load_config(path, ("train.epochs=2",)).train.max_steps == 1


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = load_config("high-resolution", ("model.aux=[density]", "train.class_weights=2.5"))
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config == checked(Config, yaml.safe_load(dump(config)), "saved")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown setting 'train\.epoch'.*Did you mean 'epochs'\?"),
        ("trian.epochs=3", r"unknown setting 'trian'.*Did you mean 'train'\?"),
        ("train.lr=-1", r"train\.lr = -1: input should be greater than 0"),
        ("train.class_weights=often", r"train\.class_weights = 'often'"),
        ("train.device=gpu", r"train\.device = 'gpu'"),
        ("train.lr.x=1", "unknown setting|is a value|train.lr"),
        ("pipeline.fixed_low=5000", r"fixed_high \(4095\.0\) must be above fixed_low \(5000"),
        ("model.weights=file", "weights_file"),
        ("train.warmup_epochs=.inf", r"train\.warmup_epochs = inf: input should be a finite number"),
        ("pipeline.mean=.nan", r"pipeline\.mean = nan: input should be a finite number"),
        ("data.folds=two", r"data\.folds = 'two'"),
        ("train.covariates=age", r"train\.covariates = 'age': expected a list, such as \[age\]"),
        ("train.covariates=null", r"train\.covariates = None: expected a list; \[\] is an empty one"),
        ("train.covariates=[height]", r"^--set: train\.covariates\.0 = 'height'"),
        ("data.seed=18446744073709551616", r"data\.seed = 18446744073709551616: input should be less than"),
        ("train.lr", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
    ],
)
def test_an_impossible_setting_is_one_precise_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, (override,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "found list"), ("train: [1\n", "not valid YAML"), ("train: 3\n", "train")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_names_the_presets():
    with pytest.raises(ConfigError, match=r"no such file, nor a preset.*default.*small-cpu"):
        load_config("nowhere.yaml")


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def test_checked_serves_other_settings_too():
    with pytest.raises(ConfigError, match=r"convert: levels: levels are 'full' and whole numbers"):
        checked(ConvertSettings, {"levels": ["big"]}, "convert")

import pytest
import yaml
from hypothesis import given, strategies as st

from localvit.config.files import (
    list_recipes,
    load_recipe,
    merge,
    parse_setting,
    resolve,
)
from localvit.config.schema import TrainConfig
from localvit.errors import ConfigError
from localvit.locality.config import LocalityConfig
from localvit.locality.presets import preset
from localvit.models.config import ModelConfig
from localvit.structure import build, plain, to_yaml


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(1e-4, 10),
    blocks=st.sampled_from(["all", [0, 1], [[0, 2], [3, 4]]]),
    kernel=st.sampled_from([3, 5]),
    ema=st.none() | st.floats(0.1, 0.9999),
    args=st.dictionaries(st.sampled_from(["img_size", "depth"]), st.integers(1, 99)),
)
def test_yaml_gives_the_same_configuration_back(seed, lr, blocks, kernel, ema, args):
    locality = LocalityConfig(kernel_size=kernel)
    model = ModelConfig(locality=locality, blocks=blocks, args=args)
    config = TrainConfig(model=model, seed=seed, ema_decay=ema)
    config = build(TrainConfig, merge(plain(config), {"optim": {"lr": lr}}))
    assert build(TrainConfig, yaml.safe_load(to_yaml(config))) == config
    assert config.optim.lr == lr
    assert config.model.locality == locality


def test_default_locality_is_not_no_locality():
    on = resolve(settings=["model.locality={}"])
    assert on.model.locality == LocalityConfig()
    assert build(TrainConfig, yaml.safe_load(to_yaml(on))) == on
    assert resolve(settings=["model.locality=null"]).model.locality is None
    again = resolve(settings=["model.locality={kernel_size: 5}", "model.locality={}"])
    assert again.model.locality == LocalityConfig()  # a value, not "no change"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optm.lr=1", r"^optm: this field does not exist; did you mean 'optim'\?"),
        ("optim.lrr=1", r"^optim\.lrr: this field does not exist; did you mean 'optim\.lr'\?"),
        ("model.args=3", r"^model\.args: 3 is not accepted; use a mapping"),
        ("model=3", r"^model: 3 is not accepted; use a mapping"),
        ("optim.lr=fast", r"^optim\.lr: 'fast' is not accepted; use a number"),
        ("optim.lr=0", r"optim\.lr=0\.0 is not accepted"),
        ("optim.lr=.nan", r"^optim\.lr: nan is not accepted; use a finite number"),
        ("epochs=1.5", r"^epochs: 1\.5 is not accepted; use an integer"),
        ("epochs=true", r"^epochs: True is not accepted; use an integer"),
        ("epochs=0", r"epochs=0 is not accepted; use at least 1"),
        (f"batch_size={2**63}", rf"^batch_size={2**63} is not accepted; use 1 to {2**63 - 1}"),
        ("workers=-1", r"workers=-1 is not accepted; use at least 0"),
        ("schedule.name=cosin", r"^schedule\.name: 'cosin' is not accepted; use 'cosine', 'tanh'"),
        ("schedule.warmup_epochs=100", r"warmup_epochs=100 is not accepted; use less than epochs=100"),
        ("optim.lr=1e-6", r"schedule\.min_lr=1e-05 is not accepted; use at most optim\.lr=1e-06"),
        ("augment.scale=[1]", r"^augment\.scale\[1\] is missing"),
        ("augment.scale=[0.5, 0.1]", r"augment\.scale=\[0\.5, 0\.1\] is not accepted; use \[low, high\]"),
        ("augment.hflip=2", r"augment\.hflip=2\.0 is not accepted; use a probability"),
        ("data.holdout=0.9", r"data\.holdout=0\.9 is not accepted; use a fraction"),
        ("data.download=1", r"^data\.download: 1 is not accepted; use true or false"),
        ("ema_decay=1", r"ema_decay=1\.0 is not accepted"),
        ("model.locality.kernel_size=4", r"model\.locality: kernel_size=4"),
        ("model.locality.kernl=4", r"model\.locality: .*did you mean 'kernel_size'"),
        ("model.blocks=[0]", r"model\.blocks=\[0\] has no effect without model\.locality"),
        ("epochs", r"'epochs' is not accepted; use key=value"),
        ("epochs=[", r"'epochs=\[', line 1: not YAML: "),
    ],
)
def test_errors_name_path_value_and_what_is_accepted(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings=[setting])


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(ConfigError, match="batch_size=33 is odd"):
        resolve(settings=["batch_size=33", "augment.mixup=0.8"])


def test_exponents_without_a_dot_are_numbers():
    # YAML 1.1 reads 1e-3 as a string.
    assert parse_setting("optim.lr=1e-3") == {"optim": {"lr": "1e-3"}}
    assert resolve(settings=["optim.lr=1e-3"]).optim.lr == 1e-3


def test_settings_beat_the_recipe_and_explicit_values_beat_settings(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 7\nseed: 1\noptim: {lr: 0.1, name: sgd}\n")
    assert resolve(str(recipe)).epochs == 7
    config = resolve(str(recipe), ["optim.lr=0.2", "seed=2"], {"optim": {"lr": 0.3}})
    assert (config.epochs, config.seed, config.optim.lr, config.optim.name) == (7, 2, 0.3, "sgd")


def test_every_recipe_resolves_and_says_where_it_comes_from():
    from importlib import resources

    assert {"digits", "small_images"} <= set(list_recipes())
    for name in list_recipes():
        resolve(name)
        text = (resources.files("localvit.config") / "recipes" / f"{name}.yaml").read_text()
        head = [line for line in text.splitlines() if line.startswith("#")]
        for word in ("source:", "command:", "cost:", "expect:"):
            assert any(word in line for line in head), (name, word)


def test_unknown_recipe_and_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match=r"'digit' does not exist; did you mean 'digits'.*accepted: "):
        load_recipe("digit")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="use a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_a_published_design_by_name_and_with_changes():
    made = build(TrainConfig, {"model": {"locality": {"preset": "mix_ffn", "kernel_size": 5}}})
    assert made.model.locality == preset("mix_ffn", kernel_size=5)
    assert build(TrainConfig, plain(made)) == made
    with pytest.raises(
        ConfigError, match=r"model.locality: the preset 'mix-ffn' does not exist; did you mean 'mix_ffn'"
    ):
        build(TrainConfig, {"model": {"locality": {"preset": "mix-ffn"}}})

"""Recipes: their layers, their values, and that each one trains."""

import json

import pytest
import yaml

from localvit.cli import main
from localvit.config import TrainConfig, list_recipes, load_recipe, resolve
from localvit.data.sources import open_digits
from localvit.errors import ConfigError
from localvit.structure import build
from tests.training.families import SHRUNK

COUNTS = {"train": 7, "val": 2, "test": 2}  # of each digit
SMALL = ["epochs=1", "schedule.warmup_epochs=0", "workers=0", "device=cpu", "batch_size=34"]  # two updates
RECIPES = list_recipes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of digits as ImageNet is one: splits, in them classes."""
    folder = tmp_path_factory.mktemp("digits")
    images = open_digits("train")
    left = {digit: dict(COUNTS) for digit in range(10)}
    for i in range(len(images)):
        image, digit = images[i]
        split = next((name for name, count in left[digit].items() if count), None)
        if split is not None:
            left[digit][split] -= 1
            path = folder / split / images.class_names[digit] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return str(folder)


def settings(recipe, photos, *more):
    data = [f"data.train={photos}"]
    if recipe == "digits":
        data = ["data.holdout=0.49", "batch_size=330"]
    values = [*SMALL, *data, f"model.args={json.dumps(SHRUNK[recipe])}", *more]
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, photos):
    """The folder of a short run on images of 32x32."""
    folder = str(tmp_path_factory.mktemp("teacher") / "run")
    arguments = settings("small_images", photos)
    assert main(["train", "--recipe", "small_images", *arguments, "--output", folder]) == 0
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_a_shrunk_model(recipe, photos, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # recipes are found by name from anywhere
    more = {
        "distill_deit": [f"distill.teacher={teacher}"],
        "finetune": ["model.pretrained=false"],
    }
    arguments = settings(recipe, photos, *more.get(recipe, []))
    assert main(["train", "--recipe", recipe, *arguments, "--output", "run"]) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    config = build(TrainConfig, yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert config.optim == resolve(recipe).optim
    assert config.augment == resolve(recipe).augment


def test_finetuning_starts_from_a_model_of_ones_own(photos, teacher, tmp_path):
    own = ["--model", f"local-dir:{teacher}/best", "--output", str(tmp_path / "run")]
    arguments = settings("finetune", photos, "model.args={}")
    assert main(["train", "--recipe", "finetune", *arguments, *own]) == 0
    assert (tmp_path / "run" / "best" / "locality.safetensors").is_file()


def test_the_recipe_of_deit_by_hand():
    """The defaults of main.py in facebookresearch/deit; see `deit_imagenet.yaml`."""
    config = resolve("deit_imagenet")
    assert (config.epochs, config.batch_size, config.effective_lr) == (300, 1024, 1e-3)
    assert (config.optim.name, config.optim.weight_decay, config.optim.no_decay) == ("adamw", 0.05, None)
    schedule = config.schedule
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr) == (
        *("cosine", 5, 1e-6),
        1e-5,
    )
    augment = config.augment
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (augment.auto_augment, augment.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.smoothing, augment.repeats, augment.scale) == (0.1, 3, (0.08, 1.0))
    assert config.model.args == {"drop_path_rate": 0.1}
    assert config.ema_decay is None


@pytest.mark.parametrize(
    ("recipe", "base", "changes"),
    [
        ("pvt_imagenet", "deit_imagenet", {"model", "optim"}),
        ("tnt_imagenet", "deit_imagenet", {"model", "optim"}),
        ("t2t_imagenet", "deit_imagenet", {"model", "optim"}),
        ("swin_imagenet", "deit_imagenet", {"model", "optim"}),
        ("swin_imagenet_authors", "swin_imagenet", {"model", "optim", "schedule", "augment", "engine"}),
        (
            "t2t_imagenet_authors",
            "t2t_imagenet",
            {"optim", "schedule", "augment", "ema_decay", "batch_size"},
        ),
        ("distill_deit", "deit_imagenet", {"model", "optim", "distill"}),
    ],
)
def test_recipes_of_families_differ_from_their_base_only_where_they_say(recipe, base, changes):
    ours, theirs = load_recipe(recipe), load_recipe(base)
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == changes


def test_a_recipe_extends_another_mapping_by_mapping(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "leaf.yaml").write_text(
        "extends: ../stem.yml\nseed: 5\nmodel: {args: {depth: 9}}\n"
    )
    (tmp_path / "stem.yml").write_text("extends: digits\nmodel: {args: {num_heads: 2}}\nepochs: 7\n")
    values = load_recipe(str(tmp_path / "deeper" / "leaf.yaml"))
    digits = load_recipe("digits")
    assert "extends" not in values
    assert (values["seed"], values["epochs"], values["batch_size"]) == (5, 7, digits["batch_size"])
    assert values["model"]["args"] == {**digits["model"]["args"], "num_heads": 2, "depth": 9}
    assert values["data"] == digits["data"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml", r"mine\.yaml': .*mine\.yaml -> .*mine\.yaml is a cycle"),
        ("extends: other.yaml", r"mine\.yaml -> .*other\.yaml -> .*mine\.yaml is a cycle"),
        ("extends: deit_imagnet", r"recipe: 'deit_imagnet' does not exist; did you mean 'deit_imagenet'"),
        ("extends: none.yaml", r"none\.yaml' cannot be read"),
        ("extends: [digits]", r"mine\.yaml': extends=\['digits'\] is not accepted; use a recipe's name"),
    ],
)
def test_what_cannot_be_extended(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    with pytest.raises(ConfigError, match=message):
        load_recipe("mine.yaml")

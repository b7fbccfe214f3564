"""Learning rates and weight decay of every parameter, and which parameters learn."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from localvit.config.files import resolve
from localvit.config.schema import OptimConfig
from localvit.errors import ConfigError
from localvit.models.build import build_model
from localvit.surgery.parameters import locality_parameters
from localvit.training.loop import train
from localvit.training.optim import build_optimizer, freeze
from tests.training.families import FAMILIES


def by_name(model, optimizer, field):
    """Name -> the value of `field` in the parameter's group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g[field] for g in optimizer.param_groups for p in g["params"]}


def small(recipe, *more):
    config = resolve(recipe)
    model = dataclasses.replace(config.model, args=FAMILIES[recipe].args, pretrained=False)
    return build_model(model, 10), config


@pytest.mark.parametrize("recipe", FAMILIES)
def test_decayed_is_what_the_reference_decays(recipe):
    model, config = small(recipe)
    family = FAMILIES[recipe]
    decay = by_name(model, build_optimizer(model, config.optim, config.batch_size), "weight_decay")
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decay.keys() == learnt.keys()
    assert family.no_decay <= learnt.keys()
    for name, parameter in learnt.items():
        kept = parameter.ndim <= 1 or name.endswith(".bias") or name in family.no_decay
        assert decay[name] == (0.0 if kept else 0.05), name
    assert decay[family.decayed] == 0.05


def test_the_models_own_list_where_no_other_is_given():
    model, config = small("swin_imagenet")
    table = FAMILIES["swin_imagenet"].decayed
    own = dataclasses.replace(config.optim, no_decay=None)
    assert by_name(model, build_optimizer(model, own, 1024), "weight_decay")[table] == 0.0
    named = dataclasses.replace(config.optim, no_decay=("*_bias_table",))
    assert by_name(model, build_optimizer(model, named, 1024), "weight_decay")[table] == 0.0


def test_locality_is_decayed_like_other_weights():
    config = resolve("deit_imagenet", ["model.locality={}"])
    model = build_model(dataclasses.replace(config.model, args=FAMILIES["deit_imagenet"].args), 10)
    decay = by_name(model, build_optimizer(model, config.optim, 1024), "weight_decay")
    assert decay["blocks.0.mlp.conv.weight"] == 0.05
    assert decay["blocks.0.mlp.norm2.weight"] == 0.0


def test_the_rate_is_scaled_to_the_batch_and_its_ends_are_not():
    # DeiT: 5e-4 * 1024 / 512; its warm-up and minimum stay (facebookresearch/deit main.py).
    config = resolve(settings=["optim.lr=5e-4", "optim.lr_batch=512", "batch_size=1024"])
    assert config.effective_lr == 1e-3
    assert (config.schedule.warmup_lr, config.schedule.min_lr) == (1e-6, 1e-5)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, config.optim, config.batch_size)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert resolve(settings=["optim.lr=5e-4", "batch_size=1024"]).effective_lr == 5e-4


def test_a_scaled_rate_trains(tiny):
    shared = ("epochs=1", "schedule.warmup_epochs=0", "schedule.name=constant")
    assert train(tiny(*shared, "optim.lr=2e-3", "optim.lr_batch=256")).history[0]["lr"] == 1e-3


def test_rates_of_layers_by_hand():
    model, _ = small("deit_imagenet")
    config = OptimConfig(lr=1.0, layer_decay=0.5)
    scale = by_name(model, build_optimizer(model, config), "lr_scale")
    # The classifier on top, two blocks (the last with the final norm), then the embeddings.
    assert scale["head.weight"] == 1.0
    assert scale["norm.weight"] == scale["blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["blocks.0.attn.qkv.bias"] == 0.25
    assert scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.125
    decay = by_name(model, build_optimizer(model, dataclasses.replace(config, no_decay=())), "weight_decay")
    assert (decay["pos_embed"], decay["head.bias"]) == (0.05, 0.0)


def test_the_rate_that_is_told_is_the_full_one(tiny):
    shared = ("epochs=1", "schedule.warmup_epochs=0", "schedule.name=constant", "optim.lr=1e-3")
    assert train(tiny(*shared, "optim.layer_decay=0.5")).history[0]["lr"] == 1e-3


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("train_only", ["locality", "head", "locality-alone"])
def test_only_what_train_only_names_learns(tiny, init, train_only):
    config = tiny(
        f"model.locality={{init: {init}}}",
        f"train_only={train_only}",
        "epochs=1",
        "schedule.warmup_epochs=0",
        "model.args.weight_init=''",  # not a classifier of zeros, which passes no gradient
    )
    torch.manual_seed(config.seed)
    before = build_model(config.model, 10).state_dict()
    model = train(config).model
    local = {name for name, _ in locality_parameters(model)} if train_only != "head" else set()
    head = {"head.weight", "head.bias"} if train_only != "locality-alone" else set()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # The last block's are dead under "paper": no output depends on them, so only decay moves the matrices.
    assert changed <= local | head
    assert {n for n in local if n.startswith("blocks.0.")} | head <= changed
    assert changed


def test_both_heads_of_a_distilled_model_stay_trainable():
    config = resolve("distill_deit", ["model.locality={init: preserve}"])
    model = build_model(dataclasses.replace(config.model, args=FAMILIES["distill_deit"].args), 10)
    freeze(model, "locality")
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnt == {
        *("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
        *("blocks.0.mlp.drop1.conv.weight", "blocks.1.mlp.drop1.conv.weight"),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(no_decay=(), args={"fallback_list": ["a"]}), "fallback_list has no effect"),
        (OptimConfig(layer_decay=0.5, args={"layer_decay": 0.5}), "multiple values.*layer_decay"),
        (OptimConfig(lr_batch=512), "needs a batch size"),
    ],
)
def test_options_that_contradict_each_other(config, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(timm.create_model("deit_tiny_patch16_224", depth=1), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train_only=locality"], r"train_only='locality': the model has no locality"),
        (["train_only=locality-alone"], r"train_only='locality-alone': the model has no locality"),
        (["train_only=localty"], r"train_only: 'localty' is not accepted; use 'all', 'locality', 'head' or "),
        (["model.name=pit_ti_224", "model.args={}", "optim.layer_decay=0.7"], r"layer_decay=0\.7: Pooling"),
        (["model.args.img_size=9"], r"9x9 is not divisible by the patch size 2x2"),
        (["optim.name=adahessian"], r"optim\.name='adahessian' needs second derivatives"),
        (["device=meta"], r"device='meta' cannot be used here"),
        (["model.args.depth=-1"], r"model\.args\.depth: -1 is not accepted; use a positive number"),
        (["model.args.depth=two"], r"model\.args\.depth: 'two' is not accepted; use a positive number"),
        (["model.args.img_size='32,40'"], r"'32,40' is not accepted; use .* a list such as \[32, 40\]"),
        (
            ["model.args.depht=2"],
            r"model\.args\.depht is not an argument of model .*; did you mean 'depth'\?",
        ),
        (["model.args.gelu=2"], r"model\.args\.gelu is not an argument of model .*; leave it out"),
        (["model.name=local-dir:nowhere"], r"model\.name: cannot open 'local-dir:nowhere'"),
    ],
)
def test_a_run_that_cannot_work_fails_before_anything_is_written(tiny, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(tiny(*settings, f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr_batch=0", r"optim\.lr_batch=0 is not accepted; use at least 1"),
        ("optim.layer_decay=1.5", r"optim\.layer_decay=1\.5 is not accepted"),
        ("optim.no_decay=cls_token", r"optim\.no_decay: 'cls_token' is not accepted; use a list"),
        ("optim.momentum=-1", r"optim\.momentum=-1\.0 is not accepted; use at least 0"),
        ("seed=18446744073709551616", r"seed: an integer of 65 bits; use at most 64"),
        ("augment.repeats=0", r"augment\.repeats=0 is not accepted; use 1"),
        ("augment.color_jitter=-1", r"augment\.color_jitter=-1\.0 is not accepted; use 0 \(off\) or more"),
        *(
            (
                f"augment.auto_augment={policy}",
                rf"augment\.auto_augment='{policy}' is not accepted; use a policy",
            )
            for policy in (
                "foo",
                "rand-foo",
                "rand-mX",
                "rand-m9-",
                "originals",
                "v0-m3",
                "augmix-t3",
                "rand9",
            )
        ),
        ("augment.repeats=200", r"augment\.repeats=200 is not accepted; use at most batch_size=128"),
        ("augment={repeats: 3, crop: none}", r"augment\.repeats=3 repeats equal images"),
        ("distill.alpha=0", r"^distill\.teacher is missing; add it$"),
        ("distill={teacher: a, alpha: 0}", r"distill\.alpha=0\.0 is not accepted"),
        ("distill={teacher: a, temperature: 2}", r"temperature=2 has no effect with distill\.kind='hard'"),
        ("distill={teacher: a, kind: soft, temperature: 0}", r"temperature=0\.0 is not accepted"),
        (
            "distill={teacher: a, kind: medium}",
            r"distill\.kind: 'medium' is not accepted; use 'soft' or 'hard'",
        ),
        ("distill.techer=a", r"^distill\.techer: this field does not exist; did you mean 'distill\.teacher'"),
        ("lr=1e-3", r"^lr: this field does not exist; did you mean 'optim\.lr'"),
        ("drop_path_rate=0.1", r"^drop_path_rate: this field does not exist"),
        ("optim={lr: 5e-4, lr_batch: 32768}", r"min_lr=1e-05 .*optim\.lr=0\.0005 x .* 128 / 32768, which is"),
    ],
)
def test_errors_of_the_configuration(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings=[setting])

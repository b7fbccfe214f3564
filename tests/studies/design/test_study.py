"""A study as a value: what is refused, what is paired, how arms differ."""

import dataclasses

import pytest
import torch

from localvit import LocalityConfig
from localvit.config.comparison import differences
from localvit.errors import ConfigError
from localvit.models.build import build_model
from localvit.structure import plain
from localvit.studies.demo import ARMS, demo_study
from localvit.studies.design.study import Arm, Study, key_of
from localvit.studies.running import run_study


def test_arms_differ_in_locality_only_without_tuned_rates(study):
    control, treatment = (plain(study.config(arm, 0)) for arm in study.arms)
    assert differences(control, treatment) == {"model.locality": (None, {})}


def test_one_seed_of_every_arm_comes_first(study):
    assert [(run.arm, run.seed) for run in study.runs()] == [
        ("baseline", 0),
        ("locality", 0),
        ("baseline", 1),
        ("locality", 1),
    ]


def test_a_seed_pairs_the_initial_weights_that_arms_share(study):
    def weights(arm, seed):
        config = study.config(arm, seed)
        torch.manual_seed(config.seed)
        return build_model(config.model, 10).state_dict()

    control, treatment = (weights(arm, 1) for arm in study.arms)
    for name in control:
        if ".mlp." not in name and ".norm2." not in name:
            assert torch.equal(control[name], treatment[name]), name
    random = "blocks.1.attn.qkv.weight"
    assert not torch.equal(control[random], weights(study.arms[0], 0)[random])


@pytest.mark.parametrize("field", ["output", "workers"])
def test_where_results_go_is_no_part_of_the_key(tiny, field):
    other = dataclasses.replace(tiny, **{field: {"output": "x", "workers": 2}[field]})
    assert key_of(plain(other)) == key_of(plain(tiny))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 2}, {"batch_size": 128}])
def test_what_decides_the_result_is_in_the_key(tiny, change):
    assert key_of(plain(dataclasses.replace(tiny, **change))) != key_of(plain(tiny))


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [
        ((), (0,), "0 arms and 1 seeds"),
        (ARMS, (), "2 arms and 0 seeds"),
        ((ARMS[0], ARMS[0]), (0,), "arm 'baseline' is a duplicate"),
        (ARMS, (0, 1, 0), "seed 0 is a duplicate"),
        ((ARMS[0], Arm(name="same")), (0,), "'baseline' and 'same' are equal"),
        (
            (Arm(name="a", changes={"model": {"lokality": {}}}),),
            (0,),
            "^arms.a.model.lokality: .* does not exist.*locality",
        ),
        ((Arm(name="a", changes={"optim": {"lr": -1.0}}),), (0,), "^arms.a: optim.lr=-1.0"),
        ((Arm(name="a", changes={"seed": 3}),), (0,), "arm 'a' changes 'seed'"),
        ((Arm(name="a", changes={"output": "x"}),), (0,), "arm 'a' changes 'output'"),
    ],
)
def test_refused(tiny, arms, seeds, message):
    with pytest.raises(ConfigError, match=message):
        Study(question="?", base=tiny, arms=arms, seeds=seeds)


def test_names_of_arms_can_stand_in_files():
    with pytest.raises(ConfigError, match="use lower case"):
        Arm(name="a/b")


def test_one_pair_is_no_comparison(tiny, tmp_path):
    with pytest.raises(ConfigError, match="seeds=1 is not accepted"):
        run_study(demo_study(tiny, 1, None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_arm_without_locality_differs_from_one_with_its_defaults(tiny):
    # `{}` is locality with its defaults, not "no change".
    base = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, locality=LocalityConfig(gate="eca"))
    )
    study = Study(question="?", base=base, arms=ARMS, seeds=(0,))
    assert study.config(ARMS[1], 0).model.locality == LocalityConfig()
    assert study.config(ARMS[0], 0).model.locality is None


def test_differences_name_the_fields():
    found = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert found == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}

"""Checks of a study before it runs: costs, confounders, and budgets that are made equal."""

import dataclasses

import pytest

from localvit.config.files import resolve
from localvit.errors import ConfigError
from localvit.studies.design.checks import check_study, matched
from localvit.studies.design.study import Arm, Study

TINY = ("model.args.embed_dim=16", "model.args.depth=2", "model.args.num_heads=2")
LOCAL = Arm(name="local", changes={"model.locality": {}})


def study(*arms, settings=TINY, **fields):
    return Study(
        question="?",
        base=resolve("digits", settings),
        arms=(Arm(name="plain"), *arms),
        seeds=(0, 1),
        **fields,
    )


def cost(made, name):
    summary = check_study(made).arms[name]
    return {"params": summary.parameters, "macs": summary.macs}


def test_costs_by_hand():
    summary = check_study(study(LOCAL)).arms
    # Patch embedding 4*16+16, class token and 17 positions, 2 blocks, norm, head of 10 classes.
    block = 2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    assert summary["plain"].parameters == (4 * 16 + 16) + 16 + 17 * 16 + 2 * block + 32 + 10 * 17
    assert summary["plain"].tokens == summary["local"].tokens == 17
    assert (summary["plain"].differs, summary["plain"].confounders) == ({}, ())
    assert summary["local"].differs == {"model.locality": (None, {})}


def sentences(arm, *others, settings=TINY):
    return " ".join(check_study(study(*others, arm, settings=settings)).arms[arm.name].confounders)


def test_confounders_of_the_papers_feed_forward_network():
    text = sentences(LOCAL)
    for words in ("No pre-norm", "without effect here", "hardswish", "(batch)", "(se)", "skips"):
        assert words in text
    assert "blocks.1.mlp of the last block has" in text
    assert text.count("Not matched in parameters") == 1
    assert "rate of up to 0.1" in sentences(LOCAL, settings=(*TINY, "model.args.drop_path_rate=0.1"))


def test_what_is_kept_is_no_confounder():
    text = sentences(Arm(name="local", changes={"model.locality": {"init": "preserve"}}))
    for words in ("No pre-norm", "No drop-path", "Activation", "Norm (", "gate", "skips"):
        assert words not in text
    assert "Not matched in parameters" in text


def test_heads_and_tokens_and_fields_that_follow():
    heads = Arm(name="heads", changes={"model.locality": {}, "model.args.num_heads": 4})
    assert "Heads differ: 2 in the control, 4 here." in sentences(heads)
    tokens = Arm(name="tokens", changes={"model.args.patch_size": 4})
    assert "Tokens differ: 17 in the control, 5 here." in sentences(tokens)
    preserve = Arm(name="preserve", control="local", changes={"model.locality": {"init": "preserve"}})
    assert (
        "prefix follows from the fields that differ: 'skip' in the control, 'pointwise' here."
        in sentences(preserve, LOCAL)
    )


def test_a_field_that_is_not_set_is_shown_as_what_the_design_decides():
    own = Arm(name="own", control="local", changes={"model.locality": {"gate": "none"}})
    assert check_study(study(LOCAL, own)).arms["own"].differs == {"model.locality.gate": ("se", "none")}


@pytest.mark.parametrize("match", ["params", "macs"])
def test_budgets_are_matched_by_the_expansion_within_one_per_cent(match):
    wide = Arm(name="wide", changes={"model.locality": {"kernel_size": 5}})
    made = matched(study(wide, match=match))
    assert abs(cost(made, "wide")[match] / cost(made, "plain")[match] - 1) <= 0.01
    assert made.arm("wide").adjusted == ("model.locality.expansion",)
    assert 1.0 < made.arm("wide").changes["model.locality.expansion"] < 4.0
    assert "matched by model.locality.expansion=" in check_study(made).arms["wide"].matched
    assert matched(made) == made  # what is matched stays


def test_a_plain_arm_is_matched_by_its_mlp_ratio():
    plain = Arm(name="deep", changes={"model.args.depth": 1})
    assert matched(study(plain, match="params")).arm("deep").adjusted == ("model.args.mlp_ratio",)


def test_an_arm_that_asks_about_expansion_is_matched_by_width_or_refused():
    narrow = Arm(name="narrow", changes={"model.locality": {"expansion": 2.0}})
    with pytest.raises(ConfigError, match=r"'narrow' cannot match the params .* within 1%: the nearest is"):
        matched(study(narrow, match="params"))
    roomy = ("model.args.embed_dim=192", "model.args.depth=2", "model.args.num_heads=2")
    made = matched(study(narrow, match="params", settings=roomy))
    assert made.arm("narrow").adjusted == ("model.args.embed_dim",)


def test_equal_compute_by_epochs():
    half = Arm(name="half", changes={"model.args.depth": 1})
    made = matched(study(half, budget="compute"))
    assert made.arm("half").adjusted == ("epochs",)
    epochs = made.config(made.arm("half"), 0).epochs
    assert epochs * cost(made, "half")["macs"] == pytest.approx(40 * cost(made, "plain")["macs"], rel=0.02)


def test_an_arm_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match=r"num_heads|divisible"):
        check_study(study(Arm(name="odd", changes={"model.args.num_heads": 3})))
    none = dataclasses.replace(resolve("digits"), epochs=40)
    with pytest.raises(ConfigError, match="not divisible by the patch size"):
        check_study(
            Study(
                question="?",
                base=none,
                arms=(Arm(name="a"), Arm(name="b", changes={"model.args.patch_size": 3})),
                seeds=(0,),
            )
        )


def test_heads_differ_by_their_number_not_by_the_depth():
    assert "Heads" not in sentences(Arm(name="deep", changes={"model.args.depth": 3}))
    text = sentences(Arm(name="more", changes={"model.args.num_heads": 4, "model.args.depth": 3}))
    assert "Heads differ: 2 in the control, 4 here." in text

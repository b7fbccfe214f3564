"""Questions as files: every one that is shipped can be asked at every scale, and what is wrong is named."""

import json
import re

import pytest
import torch

from localvit.config.comparison import differences
from localvit.errors import ConfigError
from localvit.models.build import build_model
from localvit.studies.design.checks import check_study
from localvit.studies.design.question import list_questions, load_question
from localvit.studies.design.study import study_from_dict

SHRUNK = {"paper": ["model.args.depth=3"]}  # DeiT-T's arms of 12 blocks take seconds each to count


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(ConfigError, match="'big' does not exist; accepted: digits, small, paper"):
        load_question("depthwise").study("big", 1)


@pytest.mark.parametrize("scale", ["digits", "small", "paper"])
@pytest.mark.parametrize("name", list_questions())
def test_every_question_can_be_asked_at_every_scale(name, scale):
    study = load_question(name).study(scale, 2, SHRUNK.get(scale, []))
    assert study_from_dict(json.loads(json.dumps(study.to_dict()))) == study
    assert len(study.contrasts()) >= 2
    if name == "architectures" and scale == "paper":
        return  # the models of the publications: counted in tests/models
    summary = check_study(study)
    for arm, control in study.contrasts():
        differs = summary.arms[arm.name].differs
        assert differs, f"{arm.name} against {control.name}"
        assert {path.split(".")[0] for path in differs} <= {"model", "data"}


def test_the_questions_of_the_issue_are_there():
    assert set(list_questions()) >= {"depthwise", "gate", "placement", "expansion", "architectures"}


def test_a_seed_pairs_the_initial_weights_that_all_arms_share():
    study = load_question("kernel").study("digits", 2)

    def weights(name, seed):
        config = study.config(study.arm(name), seed)
        torch.manual_seed(config.seed)
        return build_model(config.model, 10).state_dict()

    base, other = weights("mid-3", 1), weights("mid-7", 1)
    for key in base:
        if ".mlp." not in key:
            assert torch.equal(base[key], other[key]), key
    random = "blocks.1.attn.qkv.weight"
    assert not torch.equal(base[random], weights("mid-3", 0)[random])


def write(folder, text):
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


MINE = """
question: Does it train longer?
control: short
arms:
  long: {epochs: 60}
  longer: {against: long, epochs: 80}
scales:
  mine: {recipe: digits, base: {optim.lr: 1.0e-3}, arms: {longer: {epochs: 90}}}
match: none
"""


def test_a_question_of_ones_own(tmp_path):
    study = load_question(write(tmp_path, MINE)).study("mine", 3, ["batch_size=16"], train="images")
    assert [arm.name for arm in study.arms] == ["short", "long", "longer"]
    assert [(a.name, c.name) for a, c in study.contrasts()] == [("long", "short"), ("longer", "long")]
    assert [study.config(arm, 0).epochs for arm in study.arms] == [40, 60, 90]
    assert (study.base.optim.lr, study.base.batch_size, study.base.data.train) == (1e-3, 16, "images")
    assert (study.seeds, study.name, study.scale) == ((0, 1, 2), "mine", "mine")


CLAIM = "claim: {text: t, source: s, "


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("question:", "questoin:", "questoin"),
        ("{epochs: 60}", "{epoch: 60}", "arms.long.epoch: .*did you mean 'epochs'"),
        ("{epochs: 60}", "{}", "arms 'short' and 'long' are equal"),
        ("{epochs: 60}", "60", "arms.long: 60 is not accepted; use a mapping"),
        ("against: long", "against: logn", "arms.longer.against: 'logn' does not exist; did you mean 'long'"),
        ("longer: {epochs: 90}", "longest: {epochs: 90}", "scales.mine.arms: 'longest' does not exist"),
        ("recipe: digits", "recipe: digit", "did you mean 'digits'"),
        ("recipe: digits, ", "", "scales.mine.recipe is missing; add it, or use digits, small, paper"),
        ("{epochs: 90}", "{against: lon}", "scales.mine.arms.longer.against: 'lon' does not exist"),
        ("match: none", "match: time", "match: 'time' is not accepted; use 'none', 'params' or 'macs'"),
        (
            "match: none",
            "claim: {text: t, source: s, expected: {lon: better}}",
            "claim.expected: 'lon' does not exist; did you mean 'long'",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        load_question(write(tmp_path, MINE.replace(old, new, 1))).study("mine", 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  long:", "  on:", "line 5: arms: the key on is not text in YAML; quote it: 'on'"),
        ("  long:", "  off:", "line 5: arms: the key off is not text in YAML; quote it: 'off'"),
        ("  long:", "  5:", "line 5: arms: the key 5 is not text in YAML; quote it: '5'"),
        ("  longer: {", "  long: {", "line 6: arms: duplicate key 'long'"),
        ("{epochs: 60}", "{epochs: 0x_}", "line 5: arms.long.epochs: 0x_ is an integer in YAML"),
        ("{epochs: 60}", "{epochs: [" + "[" * 1000, "use at most 40 levels"),
        ("short", "[short]", "control: ['short'] is not accepted; use a string"),
        ("match: none", "claim: 3", "claim: 3 is not accepted; use a mapping"),
        ("match: none", "claim: {text: t}", "claim.source is missing"),
        (
            "match: none",
            CLAIM + "expected: higher}",
            "claim.expected: 'higher' is not accepted; use a mapping",
        ),
        (
            "match: none",
            CLAIM + "expected: {long: higher}}",
            "claim.expected.long: 'higher' is not accepted; use 'better' or 'worse'",
        ),
        (
            "match: none",
            CLAIM + "reported: {long: about 75}}",
            "claim.reported.long: 'about 75' is not accepted; use a number",
        ),
        ("match: none", CLAIM + "reported: {long: .nan}}", "claim.reported.long: nan is not accepted"),
        (
            "match: none",
            CLAIM + "reported: {lang: 75}}",
            "claim.reported: 'lang' does not exist; did you mean 'long'",
        ),
        ("match: none", CLAIM + "expceted: {}}", "claim.expceted: this field does not exist; did you mean"),
        (
            "{longer: {epochs: 90}}",
            "{longer: 3}",
            "scales.mine.arms.longer: 3 is not accepted; use a mapping",
        ),
        ("recipe: digits", "recipes: digits", "scales.mine.recipes: this field does not exist; did you mean"),
        ("recipe: digits", "recipe: 3", "scales.mine.recipe: 3 is not accepted; use a string"),
    ],
)
def test_what_is_wrong_is_named_when_the_question_is_read(tmp_path, old, new, message):
    assert old in MINE
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_question(write(tmp_path, MINE.replace(old, new, 1)))
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quoted_name_of_an_arm_is_a_name(tmp_path):
    text = MINE.replace("  long:", "  'on':").replace("against: long", "against: 'on'")
    study = load_question(write(tmp_path, text)).study("mine", 2)
    assert [arm.name for arm in study.arms] == ["short", "on", "longer"]


def test_what_an_arm_asks_of_a_cluster_is_checked(tmp_path):
    text = MINE.replace("{epochs: 60}", "{epochs: 60, resources: {minuets: 5}}")
    with pytest.raises(ConfigError, match=r"arms\.long\.resources\.minuets: .*did you mean 'minutes'"):
        load_question(write(tmp_path, text)).study("mine", 2)


def test_unknown_names_come_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"did you mean 'placement'.*accepted: architectures, "):
        load_question("plaecment")
    with pytest.raises(ConfigError, match="'smal' does not exist; did you mean 'small'"):
        load_question("gate").study("smal", 2)


def test_scales_differ_in_the_recipe_and_arms_in_what_the_question_names():
    study = load_question("placement").study("paper", 1)
    control, upper = (study.config(study.arm(name), 0) for name in ("deit", "upper-third"))
    assert (control.data.train, control.epochs) == ("imagenet", 300)
    from localvit.structure import plain

    assert set(differences(plain(control), plain(upper))) == {"model.locality", "model.blocks"}

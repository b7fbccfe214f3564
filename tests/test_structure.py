"""Structured files: what is built from them, what comes back, and what every bad input is told."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from localvit.config import TrainConfig, load_recipe, resolve
from localvit.config.older import from_older, to_older
from localvit.errors import ConfigError
from localvit.locality import LocalityConfig
from localvit.structure import (
    MOST_DEPTH,
    build,
    parse_json,
    parse_yaml,
    plain,
    read_json,
    read_yaml,
    schema,
    to_json,
    to_yaml,
)
from localvit.studies.design import key_of


@dataclass(frozen=True, kw_only=True)
class Lens:
    focus: float
    stops: tuple[float, ...] = ()
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.focus <= 0:
            raise ConfigError(f"focus={self.focus!r} must be positive")


@dataclass(frozen=True, kw_only=True)
class Camera:
    name: str
    lens: Lens
    others: dict[str, Lens] = field(default_factory=dict)
    roll: tuple[Lens, ...] = ()
    mode: Literal["day", "night"] = "day"
    flash: bool = False
    shots: int = 1
    frames: str | list[Any] = "all"
    extra: dict[str, Any] = field(default_factory=dict)


LENS = {"focus": 50}


def refused(call, *arguments):
    """The message of the error, which is one line."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_built_by_hand():
    values = {
        "name": "box",
        "lens": {"focus": 50, "stops": [2, "2.8", "1e1"], "span": [1, 2]},
        "others": {"wide": {"focus": "1e-3"}},
        "roll": [LENS, LENS],
        "frames": [[0, 2], 3],
        "extra": {"a": [1, {"b": None}]},
    }
    camera = build(Camera, values)
    assert camera == Camera(
        name="box",
        lens=Lens(focus=50.0, stops=(2.0, 2.8, 10.0), span=(1, 2)),
        others={"wide": Lens(focus=0.001)},
        roll=(Lens(focus=50.0), Lens(focus=50.0)),
        frames=[[0, 2], 3],
        extra={"a": [1, {"b": None}]},
    )
    assert [type(stop) for stop in camera.lens.stops] == [float] * 3
    assert plain(camera)["lens"] == {"focus": 50.0, "stops": [2.0, 2.8, 10.0], "span": [1, 2]}
    assert build(Camera, plain(camera)) == camera
    assert build(dict[str, Lens], {"one": LENS}) == {"one": Lens(focus=50.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": "x"}, "nam: this field does not exist; did you mean 'name'?"),
        (
            {"lens": {"focus": 1, "stop": []}},
            "lens.stop: this field does not exist; did you mean 'lens.stops'?",
        ),
        ({"stops": []}, "stops: this field does not exist; did you mean 'lens.stops'?"),
        (
            {"others": {"w": {"focs": 1}}},
            "others.w.focs: this field does not exist; did you mean 'others.w.focus'?",
        ),
        (
            {"roll": [LENS, {**LENS, "spam": 1}]},
            "roll[1].spam: this field does not exist; did you mean 'roll[1].span'?",
        ),
        ({"lens": {"zzz": 1}}, "lens.zzz: this field does not exist; accepted: focus, stops, span"),
        ({"others": {"w": {}}}, "others.w.focus is missing; add it"),
        ({"lens": {"focus": "far"}}, "lens.focus: 'far' is not accepted; use a number"),
        ({"lens": {"focus": True}}, "lens.focus: True is not accepted; use a number"),
        ({"lens": {"focus": None}}, "lens.focus: None is not accepted; use a number"),
        ({"lens": {"focus": math.nan}}, "lens.focus: nan is not accepted; use a finite number"),
        ({"lens": {"focus": "nan"}}, "lens.focus: nan is not accepted; use a finite number"),
        ({"lens": {"focus": "1e999"}}, "lens.focus: inf is not accepted; use a finite number"),
        ({"lens": {"focus": 1, "stops": 2}}, "lens.stops: 2 is not accepted; use a list"),
        ({"lens": {"focus": 1, "stops": "22"}}, "lens.stops: '22' is not accepted; use a list"),
        ({"lens": {"focus": 1, "stops": [2, "x"]}}, "lens.stops[1]: 'x' is not accepted; use a number"),
        ({"lens": {"focus": 1, "span": [1]}}, "lens.span[1] is missing; add it"),
        (
            {"lens": {"focus": 1, "span": [1, 2, 3]}},
            "lens.span: [1, 2, 3] is not accepted; use a list of at most 2 items",
        ),
        ({"lens": 3}, "lens: 3 is not accepted; use a mapping of field to value"),
        ({"others": 3}, "others: 3 is not accepted; use a mapping of field to value"),
        ({"others": {"w": 3}}, "others.w: 3 is not accepted; use a mapping of field to value"),
        ({"mode": "dusk"}, "mode: 'dusk' is not accepted; use 'day' or 'night'"),
        ({"flash": 1}, "flash: 1 is not accepted; use true or false"),
        ({"flash": "yes"}, "flash: 'yes' is not accepted; use true or false"),
        ({"shots": True}, "shots: True is not accepted; use an integer"),
        ({"shots": 1.0}, "shots: 1.0 is not accepted; use an integer"),
        ({"shots": "1"}, "shots: '1' is not accepted; use an integer"),
        ({"shots": 2**64}, "shots: an integer of 65 bits; use at most 64"),
        ({"frames": 3}, "frames: 3 is not accepted; use a string or a list"),
        ({"name": 3}, "name: 3 is not accepted; use a string"),
        ({"extra": {"a": [math.inf]}}, "extra.a[0]: inf is not accepted; use a finite number"),
        ({"extra": {"a": {True: 1}}}, "extra.a.True: the key True is not text; quote it"),
        ({"extra": {"a": {None: 1}}}, "extra.a.None: the key None is not text; quote it"),
        ({"extra": {"a": b"x"}}, "extra.a: b'x' is not a JSON value; quote it if it is text"),
        ({"lens": {"focus": 0}}, "lens: focus=0.0 must be positive"),
        (
            {"": 1},
            "'': this field does not exist; accepted: "
            "name, lens, others, roll, mode, flash, shots, frames, extra",
        ),
    ],
)
def test_every_refusal_names_path_value_and_what_is_accepted(changes, message):
    values = {"name": "box", "lens": LENS} | changes
    assert refused(build, Camera, values) == message
    inside = refused(build, Camera, values, "cases.x")
    assert inside.startswith("cases.x: " if message.startswith("'") else f"cases.x.{message.split(' ')[0]}")


def test_a_folder_whose_name_is_not_utf8_survives():
    config = build(TrainConfig, {"data": {"train": "caf\udce9"}})
    assert build(TrainConfig, parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize("values", [None, 3, [], "name"])
def test_what_is_no_mapping(values):
    assert "use a mapping of field to value" in refused(build, Camera, values)


def test_keys_and_values_that_would_break_the_line():
    long = refused(build, Camera, {"name": "x" * 10**6, "lens": {"focus": "y" * 10**6}})
    assert len(long) < 200
    assert refused(build, Camera, {"a\nb": 1, "name": "b", "lens": LENS}).startswith(
        r"'a\nb': this field does not exist"
    )


def test_messages_of_dataclasses_stay_and_get_the_path_that_they_lack():
    message = "optim.lr=0.0 is not accepted; use a positive number"
    assert refused(build, TrainConfig, {"optim": {"lr": 0}}) == message
    assert refused(build, TrainConfig, {"optim": {"lr": 0}}, "arms.wide") == f"arms.wide: {message}"
    # A `DataError`, which is another kind of `ValueError`.
    assert refused(build, TrainConfig, {"data": {"holdout": 2}}).startswith(
        "data.holdout=2.0 is not accepted"
    )
    wrong = {"model": {"locality": {"kernel_size": 4}}}
    assert refused(build, TrainConfig, wrong, "arms.a").startswith(
        "arms.a.model.locality: kernel_size=4 is not"
    )


def test_a_preset_stands_for_its_fields_wherever_locality_is_read():
    made = build(TrainConfig, {"model": {"locality": {"preset": "mix_ffn", "kernel_size": 5}}})
    assert made.model.locality == LocalityConfig.from_dict({"preset": "mix_ffn", "kernel_size": 5})
    assert "did you mean 'mix_ffn'" in refused(
        build, TrainConfig, {"model": {"locality": {"preset": "mix-ffn"}}}
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
LENSES = st.builds(
    Lens,
    focus=st.floats(min_value=1e-300, allow_infinity=False),
    stops=st.lists(FINITE).map(tuple),
    span=st.none() | st.tuples(st.integers(-5, 5), st.integers(-5, 5)),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CAMERAS = st.builds(
    Camera,
    name=TEXT,
    lens=LENSES,
    others=st.dictionaries(TEXT, LENSES, max_size=3),
    roll=st.lists(LENSES, max_size=3).map(tuple),
    mode=st.sampled_from(["day", "night"]),
    flash=st.booleans(),
    shots=st.integers(-(2**63), 2**64 - 1),
    extra=st.dictionaries(st.text(), JSON, max_size=3),
)


@settings(deadline=None)
@given(CAMERAS)
def test_json_gives_the_same_value_back(camera):
    text = to_json(camera)
    again = build(Camera, parse_json(text))
    assert again == camera
    assert to_json(again) == text


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_yaml_of_other_programs_gives_the_same_value_back(values):
    assert parse_yaml(yaml.safe_dump(values)) == yaml.safe_load(yaml.safe_dump(values))


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63),
            "ema_decay": st.none() | st.floats(0.1, 0.9),
            "optim": st.fixed_dictionaries(
                {"lr": st.floats(1e-4, 10)}, optional={"no_decay": st.lists(TEXT)}
            ),
            "augment": st.fixed_dictionaries({"scale": st.sampled_from([[0.1, 1], [1, "1e1"]])}),
            "data": st.fixed_dictionaries({}, optional={"train": TEXT, "std": st.lists(st.integers(1, 9))}),
            "model": st.fixed_dictionaries(
                {"args": st.dictionaries(TEXT, st.integers() | TEXT, max_size=3)},
                optional={"locality": st.none() | st.builds(dict, kernel_size=st.sampled_from([1, 3, 5]))},
            ),
        },
    )
)
def test_configurations_survive_yaml_and_json(values):
    try:
        config = build(TrainConfig, values)
    except ConfigError:
        return  # e.g. an integer of 65 bits
    assert build(TrainConfig, parse_yaml(to_yaml(config))) == config
    assert build(TrainConfig, parse_json(to_json(config))) == config
    assert build(TrainConfig, config) == config


def built_or_refused(make):
    """Return whether `make` succeeds or fails in one line; any other error is raised."""
    told = ""
    try:
        make()
    except ConfigError as error:
        told = str(error)
    return "\n" not in told


@settings(deadline=None)
@given(JSON | st.builds(lambda v: {"optim": v, "model": v, "epochs": v}, JSON))
def test_whatever_is_given_is_built_or_refused_in_one_line(values):
    assert built_or_refused(lambda: build(TrainConfig, values))


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("[]{}:,&*!#|>-?'\"\n ab0.x_", max_size=40))
def test_whatever_is_read_as_yaml_is_a_value_or_refused_in_one_line(text):
    assert built_or_refused(lambda: plain(parse_yaml(text)))


ALIASES = "\n".join(
    ["a0: &a0 [1,1,1,1,1,1,1,1,1]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: duplicate key 'a'"),
        ("m: {a: 1, b: {c: 1, c: 1}}", "line 1: m.b: duplicate key 'c'"),
        ("on: 1", "line 1: the key on is not text in YAML; quote it: 'on'"),
        ("arms: {off: {}}", "line 1: arms: the key off is not text in YAML; quote it: 'off'"),
        ("arms:\n  5: {}", "line 2: arms: the key 5 is not text in YAML; quote it: '5'"),
        ("~: 1", "line 1: the key ~ is not text in YAML; quote it: '~'"),
        ("? [a]\n: 1", "line 1: the key ... is not text in YAML"),
        ("2026-01-01: 1", "line 1: the key 2026-01-01 is not text in YAML; quote it"),
        ("optim: {lr: 0x_}", "line 1: optim.lr: 0x_ is an integer in YAML, which is not accepted; quote it"),
        ("a: [1, 2026-13-45]", "line 1: a[1]: 2026-13-45 is a date in YAML"),
        ("a: 2026-01-01", "line 1: a: 2026-01-01 is a date in YAML"),
        ("a: " + "9" * 5000, "line 1: a: 9999"),
        ("a: !!int abc", "line 1: a: abc is an integer in YAML"),
        ("a: !!bool maybe", "line 1: a: maybe is tag:yaml.org,2002:bool in YAML"),
        ("a: !!binary aGVsbG8=", "is tag:yaml.org,2002:binary in YAML"),
        ("a: !!set {x}", "line 1: a: this is tag:yaml.org,2002:set in YAML"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "python/object/apply:os.system in YAML, which is not accepted",
        ),
        ("a: " + "[" * 100_000, f"line 1: too deeply nested; use at most {MOST_DEPTH} levels"),
        ("a: " + "{b: " * 1000, f"line 1: too deeply nested; use at most {MOST_DEPTH} levels"),
        (
            "\n".join(" " * i + "a:" for i in range(500)),
            f"too deeply nested; use at most {MOST_DEPTH} levels",
        ),
        ("a: &a [*a]", f"line 1: too deeply nested; use at most {MOST_DEPTH} levels"),
        (ALIASES, "use at most 20000, with aliases"),
        ("a: [" + "1," * 100_000 + "]", "use at most 20000, with aliases"),
        ("a: b" * 10**6, "use at most 1048576 characters"),
        ("<<: 3", "line 1: << without a mapping"),
        ("a: *b", "line 1: not YAML: found undefined alias 'b'"),
        ("a: [1\nb: 2", "line 2: not YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "line 2: not YAML: but found another document"),
        ("a: \x00", "unacceptable character"),
        ("a: 'x", "found unexpected end of stream"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_yaml_is_refused_with_line_and_field(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    told = refused(read_yaml, path)

    assert told.startswith(repr(str(path)))
    assert message in told
    assert len(told) < 400


def test_yaml_that_is_fine():
    assert parse_yaml("") is None
    assert parse_yaml("b: &b {x: 1, y: 2}\nc: {<<: *b, y: 3}\nd: {<<: [*b, {z: 4}]}") == {
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 3},
        "d": {"x": 1, "y": 2, "z": 4},
    }
    assert parse_yaml("'on': yes\n'5': 1e-3\nx: 1.0e-3") == {"on": True, "5": "1e-3", "x": 0.001}
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_yaml(deep) is not None
    with pytest.raises(ConfigError):
        parse_yaml(f"[[{deep}]]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec can't decode"),
        (b"[1, 2]", "[1, 2] is not accepted; use a mapping of field to value"),
        (b"", "None is not accepted; use a mapping of field to value"),
    ],
)
def test_files_that_hold_no_mapping(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(read_yaml, path)


def test_a_folder_and_an_endless_device_are_no_files(tmp_path):
    assert "cannot be read: Is a directory" in refused(read_yaml, tmp_path)
    assert "/dev/zero" in refused(read_yaml, "/dev/zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON: Expecting value"),
        ("{", "is not JSON: Expecting property name"),
        ('{"a": 1, "a": 2}', "is not JSON: duplicate key 'a'"),
        ('{"focus": NaN}', "is not JSON: NaN is not a JSON value"),
        ('{"focus": -Infinity}', "is not JSON: -Infinity is not a JSON value"),
        ('{"focus": 1e999}', ": focus: inf is not accepted; use a finite number"),
        ('{"focus": 1' + "0" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"focus": 1' + "0" * 50 + "}", ": focus: an integer of 167 bits; use at most 64"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ("[]", ": value: [] is not accepted; use a mapping of field to value"),
        ('{"focus": 1, "stop": []}', ": stop: this field does not exist; did you mean 'stops'?"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_json_is_refused_with_file_and_field(tmp_path, text, message):
    path = tmp_path / "lens.json"
    path.write_text(text)
    told = refused(read_json, Lens, path)
    assert told.startswith(repr(str(path)))
    assert message in told


def test_json_never_has_nan():
    assert refused(to_json, {"a": [Lens(focus=math.inf)]}) == (
        "a[0].focus: inf is not accepted; use a finite number"
    )
    assert to_json({"a": (1, 2), 5: 1}, indent=None) == '{"a": [1, 2], "5": 1}'


def test_the_schema_has_every_field_and_forbids_others():
    made = schema(TrainConfig)
    assert made["additionalProperties"] is False
    assert set(made["properties"]) == {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(made["$defs"]) >= {"OptimConfig", "LocalityConfig", "DataConfig"}
    json.dumps(made)


def test_values_of_an_older_version_are_translated():
    old = {"model": {"locality": {"prefix": "mlp", "gate": "eca"}}, "epochs": 9}
    new = {"model": {"locality": {"prefix": "pointwise", "gate": "eca"}}, "epochs": 9}
    assert from_older(old) == new
    assert old["model"]["locality"]["prefix"] == "mlp"
    assert from_older(new) == new
    assert to_older(new) == old
    arm = {"model.locality.prefix": "bypass", "model.locality": {"prefix": "passthrough"}, "optim": 3}
    assert from_older(arm) == {
        "model.locality.prefix": "skip",
        "model.locality": {"prefix": "identity"},
        "optim": 3,
    }
    damaged = {"model": {"locality": {"prefix": ["mlp"]}}, "model.locality": None}
    assert from_older(damaged) == damaged
    assert from_older(None) is None


def test_a_run_keeps_the_name_that_0_3_gave_it():
    config = plain(resolve(settings=["model.locality={prefix: pointwise}"]))
    assert key_of(config) == "e25bdea3f757"  # of `model.locality={prefix: mlp}`, computed by 0.3.1


@pytest.mark.parametrize("setting", ["model.locality={prefix: mlp}", "model.locality.prefix=mlp"])
def test_an_old_word_is_refused_with_the_new_one(setting, tmp_path):
    told = refused(resolve, None, [setting])
    assert told.endswith("prefix='mlp' is not accepted since version 0.4; write prefix='pointwise'")
    (tmp_path / "mine.yaml").write_text("model: {locality: {prefix: bypass}}\n")
    assert "write prefix='skip'" in refused(resolve, str(tmp_path / "mine.yaml"))


# The files are described in the README beside them.
FIXTURES = Path(__file__).parent / "fixtures" / "v0_3"


def test_every_file_of_0_3_is_read():
    from localvit.config import read_config
    from localvit.runs import RunStatus
    from localvit.studies.execution import Record, read_study

    config = read_config(FIXTURES / "run" / "config.yaml")
    assert (config.optim.lr, config.model.args["depth"], config.epochs) == (0.004, 2, 2)
    status = RunStatus.read(FIXTURES / "run")
    assert status.state == "finished"
    study = read_study(FIXTURES / "study")
    assert [arm.name for arm in study.arms] == ["deit", "local"]
    for run in study.runs():
        folder = FIXTURES / "study" / "runs" / run.key  # the names of configurations are the same
        record = read_json(Record, folder / "record.json")
        assert record.key == run.key
        assert RunStatus.read(folder).state == "finished"
        assert read_config(folder / "config.yaml").seed == run.seed


def test_numbers_in_yaml_1_1_are_accepted_where_a_float_is_meant():
    assert resolve(settings=["optim.lr=1e-3"]).optim.lr == 1e-3
    assert resolve(settings=["optim.weight_decay=0"]).optim.weight_decay == 0.0
    told = refused(resolve, None, ["epochs=1e2"])
    assert told == "epochs: '1e2' is not accepted; use an integer"
    assert refused(resolve, None, ["epochs=1:30:00", "optim.lr=2026-01-01"]).startswith(
        "setting 'optim.lr=2026"
    )


def test_a_recipe_with_a_key_that_is_not_text(tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  args: {5: 1}\n")
    assert "line 2: model.args: the key 5 is not text" in refused(load_recipe, str(tmp_path / "mine.yaml"))


def test_importing_it_is_light():
    code = "import sys, localvit.structure; print({'torch', 'numpy', 'timm', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

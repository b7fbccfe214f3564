"""Distillation: losses by hand, the images that a teacher sees, and teachers that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from localvit.errors import ConfigError
from localvit.inference import open_model
from localvit.models.build import build_model, preprocessing_for
from localvit.training.loop import train
from localvit.training.task import build_task

DISTILLED = "model.name=deit_tiny_distilled_patch16_224"
CPU = torch.device("cpu")
NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run on digits, whose images are normalised by the recipe's mean and deviation."""
    from localvit.config.files import resolve
    from tests.training.conftest import TINY

    folder = str(tmp_path_factory.mktemp("teacher") / "run")
    train(resolve("digits", [*TINY, f"output={folder}"]))
    return folder


@pytest.fixture
def config(tiny, teacher):
    return lambda *settings: tiny(f"distill.teacher={teacher}", *settings)


def smoothed(logits, labels, amount):
    log = F.log_softmax(logits, dim=1)
    own = -log[torch.arange(len(labels)), labels]
    return ((1 - amount) * own - amount * log.mean(dim=1)).mean()


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_by_hand(config, teacher, token, kind):
    name = [DISTILLED] if token else []
    soft = ["distill.temperature=3"] if kind == "soft" else []
    # Student's normalisation on purpose another one than the teacher's.
    run = config(
        *name,
        *soft,
        f"distill={{kind: {kind}, alpha: 0.3, token: {token}}}",
        "data.mean=[0.5]",
        "data.std=[0.25]",
    )
    torch.manual_seed(0)
    model = build_model(run.model, 10).train()
    task = build_task(model, run.augment, run.distill, preprocessing_for(model, run.data), NAMES, device=CPU)
    task.train()
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    found = task(images, labels)["loss"]

    pixels = images * 0.25 + 0.5
    theirs = open_model(teacher, CPU).model((pixels - 0.305) / 0.376)
    output = model(images)
    ours, heard = output if token else (output, output)
    if kind == "hard":
        distance = F.cross_entropy(heard, theirs.argmax(dim=1))
    else:
        p, q = F.softmax(theirs / 3, dim=1), F.softmax(heard / 3, dim=1)
        distance = (p * (p.log() - q.log())).sum(dim=1).mean() * 9
    assert found.item() == pytest.approx(
        (0.7 * smoothed(ours, labels, 0.1) + 0.3 * distance).item(), rel=1e-5
    )
    found.backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert not task.teacher.training


def test_a_teacher_leaves_the_random_stream_alone(config):
    run = config(DISTILLED)
    model = build_model(run.model, 10)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_task(model, run.augment, run.distill, preprocessing_for(model, run.data), NAMES, device=CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings",
    [
        (DISTILLED, "augment.mixup=0.8", "ema_decay=0.9", "model.locality={}"),
        ("distill.token=false",),
        ("distill={token: false, kind: soft}",),
    ],
)
def test_it_trains_and_the_result_is_an_ordinary_model(config, teacher, tmp_path, settings):
    folder = tmp_path / "run"
    result = train(config(*settings, "epochs=1", "schedule.warmup_epochs=0", f"output={folder}"))
    again = open_model(folder, CPU).model
    image = torch.randn(1, 1, 8, 8)
    assert torch.equal(again(image), result.model(image))
    assert again(image).shape == (1, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), r"distill\.token=true: VisionTransformer has no distillation token"),
        (
            (DISTILLED, "distill.teacher=./nowhere"),
            r"distill\.teacher='\./nowhere': .*does not exist",
        ),
        (
            (DISTILLED, "distill.teacher=deit_tny_patch16_224"),
            r"distill\.teacher='deit_tny.*did you mean 'deit",
        ),
        (
            (DISTILLED, "distill.teacher=localvit_tiny_relu6_x6_patch16_224"),
            r"distill\.teacher='localvit_tiny_relu6.*cannot be loaded",
        ),
        ((DISTILLED, "model.args.num_classes=12"), r"it has 10 classes and the student 12"),
        ((DISTILLED, "model.args.img_size=16"), r"fails on an image of size \(1, 16, 16\)"),
        (
            (DISTILLED, "model.args.in_chans=3", "data.mean=null", "data.std=null"),
            r"fails on an image of size \(3",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_fails_before_anything_is_written(config, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(config(*settings, f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)


def test_a_teacher_of_other_classes_in_equal_number_is_refused(config):
    run = config(DISTILLED)
    model = build_model(run.model, 10)
    names = [*NAMES[:4], "four", *NAMES[5:]]
    with pytest.raises(ConfigError, match="its class '4' is 'four' in the data"):
        build_task(model, run.augment, run.distill, preprocessing_for(model, run.data), names, device=CPU)

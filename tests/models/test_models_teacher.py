"""Teachers: the average is the closed form, the target is an independent forward, and no gradient gets through."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from models.config import ModelConfig, TeacherConfig
from models.drop import DepthDrop
from models.targets import feature_target
from models.teacher import EmaTeacher, Teacher
from models.vit import Encoder, build_encoder

HEADS = (2, 4, 10, 12)
Small = Callable[..., ModelConfig]


@pytest.fixture
def student(small: Small) -> Encoder:
    return build_encoder(small(), seed=0)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images.float() / 255 - mean) / std


def layer_norm_by_hand(tokens: torch.Tensor) -> torch.Tensor:
    mean = tokens.mean(-1, keepdim=True)
    return (tokens - mean) / ((tokens - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("pairs", "block", "want"),
    [
        ("last", 0, (12, 12, 12, 12)),
        ("last", 9, (9, 9, 9, 9)),
        ("same", 0, (2, 4, 10, 12)),
        ("earlier", 0, (2, 2, 4, 10)),
        ("later", 0, (4, 10, 12, 12)),
    ],
)
def test_which_block_of_the_teacher_a_head_predicts(pairs: str, block: int, want: tuple[int, ...]) -> None:
    assert TeacherConfig(pairs=pairs, block=block).blocks(HEADS, 12) == want  # type: ignore[arg-type]


@pytest.mark.parametrize("pairs", ["same", "earlier", "later"])
def test_a_single_head_predicts_its_own_block(pairs: str) -> None:
    assert TeacherConfig(pairs=pairs).blocks((12,), 12) == (12,)  # type: ignore[arg-type]


def test_the_average_after_n_steps_is_the_closed_form(student: Encoder) -> None:
    student.freeze(2)
    teacher = EmaTeacher(student, 0.8)
    courses = [{name: p.detach().clone().double() for name, p in student.vit.named_parameters()}]
    for _ in range(6):
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        courses.append({name: p.detach().clone().double() for name, p in student.vit.named_parameters()})
        teacher.follow(student)
    # The start times 0.8^6, and what step t left times 0.2 and 0.8 for every later step.
    shares = [0.262144, 0.065536, 0.08192, 0.1024, 0.128, 0.16, 0.2]
    assert sum(shares) == pytest.approx(1)
    average = teacher.state_dict()
    assert {"blocks.2.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "norm.weight"} <= average.keys()
    for name, value in average.items():
        want = sum(share * course[name] for share, course in zip(shares, courses, strict=True))
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)


def test_frozen_parts_are_the_student_s_own_and_are_not_averaged(student: Encoder) -> None:
    student.freeze(2)
    teacher = EmaTeacher(student, 0.999)
    theirs, mine = dict(student.vit.named_parameters()), dict(teacher.encoder.vit.named_parameters())
    shared = {name for name in mine if mine[name] is theirs[name]}
    frozen = {name for name in mine if name.startswith(("patch_embed.", "pos_embed", "blocks.0.", "blocks.1."))}
    assert shared == frozen and teacher.state_dict().keys() == mine.keys() - frozen


def test_with_momentum_0_the_average_is_the_student_and_with_1_it_stays(student: Encoder) -> None:
    still, quick = EmaTeacher(student, 1.0), EmaTeacher(student, 0.0)
    start = student.vit.blocks[3].mlp.fc1.weight.detach().clone()
    with torch.no_grad():
        student.vit.blocks[3].mlp.fc1.weight.mul_(3)
    for teacher, want in ((still, start), (quick, 3 * start)):
        teacher.follow(student)
        assert torch.equal(teacher.state_dict()["blocks.3.mlp.fc1.weight"], want)


def test_a_saved_average_is_taken_over_and_what_no_longer_learns_is_the_student_s(student: Encoder) -> None:
    first = EmaTeacher(student, 0.999)
    saved = {name: torch.full_like(value, 7.0) for name, value in first.state_dict().items()}
    student.freeze(3)
    theirs = {name: value.clone() for name, value in student.vit.state_dict().items()}
    second = EmaTeacher(student, 0.999)
    second.load_state_dict(theirs | {name: saved[name] for name in second.names})
    assert all(bool((value == 7).all()) for value in second.state_dict().values())
    assert all(torch.equal(value, theirs[name]) for name, value in student.vit.state_dict().items())


def test_what_a_saved_average_lacks_is_the_student_s_also_where_none_is_shared(student: Encoder) -> None:
    """As where the student's weights are spread over ranks: the average then has frozen ones of its own."""
    student.freeze(2)
    saved = {name: torch.full_like(value, 7.0) for name, value in EmaTeacher(student, 0.999).state_dict().items()}
    theirs = {name: torch.full_like(value, 3.0) for name, value in student.vit.state_dict().items()}
    for cut in (2, 0):
        student.freeze(cut)
        average = EmaTeacher(student, 0.999)
        average.encoder = copy.deepcopy(average.encoder)
        average.load_state_dict(theirs | saved)
        for name, value in average.encoder.vit.state_dict().items():
            assert bool((value == (7.0 if name in saved else 3.0)).all()), name


def test_targets_equal_an_independent_forward(student: Encoder, images: torch.Tensor) -> None:
    vit = student.vit
    tokens = vit.patch_embed(normalised(images)) + vit.pos_embed
    wants = {}
    for number, block in enumerate(vit.blocks, start=1):
        tokens = block(tokens)
        wants[number] = tokens
    found = Teacher(student).of_images(images, [4, 2, 4])
    assert found.keys() == {2, 4}
    for block, features in found.items():
        torch.testing.assert_close(features, wants[block].detach(), rtol=1e-5, atol=1e-5)
        by_hand = layer_norm_by_hand(wants[block]).detach()
        torch.testing.assert_close(feature_target(features), by_hand, rtol=1e-4, atol=1e-4)


def test_targets_from_tokens_go_on_where_the_tokens_stand(student: Encoder, images: torch.Tensor) -> None:
    teacher = Teacher(student)
    whole = teacher.of_images(images, [3])
    after_two = student.run(student.embed(normalised(images)), 0, 2)
    found = teacher.of_tokens(after_two, 2, [2, 3])
    torch.testing.assert_close(found[3], whole[3], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], after_two)
    with pytest.raises(AssertionError, match="what lay before the tokens is gone"):
        teacher.of_tokens(after_two, 2, [1, 3])


def test_an_average_is_looked_at_behind_the_frozen_blocks_only(student: Encoder, images: torch.Tensor) -> None:
    student.freeze(2)
    teacher = EmaTeacher(student, 0.999)
    live, plain = teacher.of_images(images, [1, 4]), Teacher(student).of_images(images, [2, 4])
    assert torch.equal(live[1], plain[2]) and torch.equal(live[4], plain[4])
    cached = teacher.of_tokens(plain[2], 2, [1, 4])
    assert torch.equal(cached[1], live[1]) and torch.equal(cached[4], live[4])


def test_no_gradient_and_no_dropping_in_a_teacher(student: Encoder, images: torch.Tensor) -> None:
    DepthDrop(0, 0.5, 0.5, 10).install(student)
    teacher = EmaTeacher(student, 0.999)
    student.train()
    assert not any(module.training for module in teacher.encoder.modules())
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())
    assert all(p.requires_grad for p in student.vit.blocks.parameters())
    target = teacher.of_images(images, [4])[4]
    assert not target.requires_grad
    torch.manual_seed(1)
    assert torch.equal(teacher.of_images(images, [4])[4], target)

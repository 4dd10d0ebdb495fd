"""Checkpoints of other projects, as this project's encoder takes them: what a file holds goes in, the state of timm's
VisionTransformer comes out, with a word on everything that was left out or changed. timm's, MAE's and DINO's names are
understood; a key that does not fit is an error that names it. Pure: the file was read before.

Shapes: R prefix tokens, L patch tokens, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.families import ModelError

State = dict[str, Tensor]

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "target_encoder", "encoder")
"""Where a file may hold its weights beside other things; the first that is there is taken, an average before the last
iterate, as timm does, a teacher before its student, as DINO does, and a target before its encoder, as I-JEPA does."""
PREFIXES = frozenset({"module", "model", "backbone", "encoder", "visual", "trunk", "vit", "teacher", "student"})
"""What may stand before every name of the encoder."""
RENAMED = (
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
"""Names of older timm versions and of DINOv2, and timm's of today."""
LEFT_OUT = {
    "heads": r"(head|heads|head_dist|head_drop|fc_norm|pre_logits|classifier|attn_pool|projector|projection|predictor"
    r"|prototypes|dino_head|ibot_head|dino_loss|ibot_patch_loss|koleo_loss)\.",
    "a decoder": r"(decoder|decoders|decoder_\w+)(\.|$)",
    "mask tokens": r"(mask_token|mask_embed)$",
    "constants": r".*\.(num_batches_tracked|relative_position_index)$",
}
"""Kinds of keys that the encoder has no use for."""
ANCHOR = "patch_embed.proj.weight"


def encoder_state(content: Mapping[str, Any], vit: VisionTransformer, source: str) -> tuple[State, list[str]]:
    """(state for `vit`, what was left out or changed) from a file's content; `source` names the file in messages.

    Positions and patch embedding of another size are resampled with timm's functions. Raises ModelError, in one line,
    for content that is no such checkpoint, and for every key that is missing, not known, or of another shape.
    """
    wrapped, where = _unwrapped(content)
    found, beside, prefix = _under_prefix(wrapped, source)
    notes = [f"taken from {where}"] * bool(where) + [f"prefix {prefix} removed"] * bool(prefix)
    kept = _without_heads(_renamed(found, vit, notes), beside, source, notes)
    state = {name: value.detach().to(torch.float32) for name, value in kept.items()}
    _check_prefix_tokens(state, vit, source)
    state[ANCHOR] = _patch_embedding(state[ANCHOR], vit, notes)
    if "pos_embed" in state:
        state |= _positions(state, vit, source, notes)
    _check_fit(state, vit, source)
    return state, notes


def _unwrapped(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The innermost of nested wrappers, and the way to it, such as `teacher`."""
    where: list[str] = []
    while inner := next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = content[inner]
        where.append(inner)
    return dict(content), ".".join(where)


def _under_prefix(content: Mapping[str, Any], source: str) -> tuple[State, list[str], str]:
    """The encoder's tensors without what stands before all their names, the names of all others, and the prefix."""
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    found = [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    found = [prefix for prefix in found if PREFIXES.issuperset(prefix.split(".")[:-1]) and prefix[-1:] in ("", ".")]
    if not found:
        first = ", ".join(list(content)[:3]) or "nothing"
        raise ModelError(
            f"model.weights={source} has no {ANCHOR}, so it is no ViT in timm's names; it begins with {first}; convert "
            "it to timm's names, or give another file"
        )
    prefix = min(found, key=lambda prefix: ("student" in prefix, len(prefix)))
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return own, [name for name in tensors if not name.startswith(prefix)], prefix


def _renamed(state: State, vit: VisionTransformer, notes: list[str]) -> State:
    for old, new in RENAMED:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    if "norm.weight" not in state and "fc_norm.weight" in state and "norm.weight" in vit.state_dict():
        notes.append("the norm behind the pooling is taken for the last norm")
        state = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in state.items()}
    return state


def _without_heads(state: State, beside: list[str], source: str, notes: list[str]) -> State:
    """The state without keys of known kinds that are of no use, with a note for each kind."""
    kinds = {name: kind for name in [*state, *beside] if (kind := _kind(name))}
    if strange := [name for name in beside if name not in kinds]:
        raise ModelError(
            f"model.weights={source} has {strange[0]} beside the encoder, of no known kind; save the encoder alone"
        )
    for kind in LEFT_OUT:
        names = sorted(name for name in kinds if kinds[name] == kind)
        if names:
            notes.append(f"{kind} left out ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})")
    return {name: value for name, value in state.items() if name not in kinds}


def _kind(name: str) -> str:
    """The kind of a key that is left out, whatever known prefix stands before it; empty for one that is not."""
    parts = name.split(".")
    while parts[0] in PREFIXES and len(parts) > 1:
        parts = parts[1:]
    return next((kind for kind, pattern in LEFT_OUT.items() if re.match(pattern, ".".join(parts))), "")


def _check_prefix_tokens(state: State, vit: VisionTransformer, source: str) -> None:
    """The class and register tokens of file and model must be the same ones: what blocks compute depends on them."""
    if ("cls_token" in state) != vit.has_class_token:
        has, value = ("a", "true") if "cls_token" in state else ("no", "false")
        raise ModelError(
            f"model.weights={source} has {has} class token, model.class_token={str(vit.has_class_token).lower()}; set "
            f"model.class_token={value}"
        )
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if registers != vit.num_reg_tokens:
        remedy = f"set model.registers={registers}" if registers else "name a model without registers"
        raise ModelError(
            f"model.weights={source} has {registers} register tokens, the model has {vit.num_reg_tokens}; {remedy}"
        )


def _patch_embedding(weight: Tensor, vit: VisionTransformer, notes: list[str]) -> Tensor:
    """(D, 3, P, P) at the model's patch size. Older files hold a linear layer's (D, 3 * P * P)."""
    wanted: Tensor = vit.get_parameter(ANCHOR)
    if weight.ndim == 2 and weight.numel() == weight.shape[0] * wanted[0].numel():
        weight = weight.reshape(len(weight), *wanted.shape[1:])
    if weight.ndim == 4 and weight.shape[:2] == wanted.shape[:2] and weight.shape != wanted.shape:
        notes.append(f"patch embedding resampled from {weight.shape[-1]} to {wanted.shape[-1]} pixels")
        weight = resample_patch_embed(weight, list(wanted.shape[-2:]))
    return weight


def _positions(state: State, vit: VisionTransformer, source: str, notes: list[str]) -> State:
    """Positions on the model's grid and, where its convention differs from the file's, the prefix tokens that held or
    now hold a part of them: a position is added to a token before anything else happens, so both say the same."""
    positions_1LD, prefix = state["pos_embed"], vit.num_prefix_tokens
    count = positions_1LD.shape[1]
    held = next((n for n in (prefix, 1, 0) if n <= prefix and math.isqrt(count - n) ** 2 == count - n), None)
    if held is None:
        raise ModelError(
            f"model.weights={source} has pos_embed {tuple(positions_1LD.shape)}: its {count} positions are no square "
            "grid; images here are square"
        )
    grid, own = math.isqrt(count - held), vit.patch_embed.grid_size[0]
    ahead_1RD, patches_1LD = positions_1LD[:, :held], positions_1LD[:, held:]
    if grid != own:
        notes.append(f"positions resampled from {grid} x {grid} to {own} x {own}")
        patches_1LD = resample_abs_pos_embed(patches_1LD, [own, own], [grid, grid], num_prefix_tokens=0)
    if vit.no_embed_class:
        return {"pos_embed": patches_1LD} | _folded(state, ahead_1RD)
    ahead_1RD = torch.cat([ahead_1RD, ahead_1RD.new_zeros(1, prefix - held, ahead_1RD.shape[-1])], dim=1)
    return {"pos_embed": torch.cat([ahead_1RD, patches_1LD], dim=1)}


def _folded(state: State, ahead_1RD: Tensor) -> State:
    """The prefix tokens with their positions added."""
    found: State = {}
    start = 0
    for name in ("cls_token", "reg_token"):
        if name in state and start < ahead_1RD.shape[1]:
            part = ahead_1RD[:, start : start + state[name].shape[1]]
            found[name] = state[name] + torch.cat([part, part.new_zeros(state[name][:, part.shape[1] :].shape)], dim=1)
            start += part.shape[1]
    return found


def _check_fit(state: State, vit: VisionTransformer, source: str) -> None:
    """Every key of the model, in the model's shape, and no other."""
    wanted = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    for name, value in state.items():
        if name in wanted and tuple(value.shape) != wanted[name]:
            raise ModelError(
                f"model.weights={source}: {name} is {tuple(value.shape)} in the file and {wanted[name]} in the model; "
                f"{_remedy(state)}"
            )
    for name, value in state.items():
        if name not in wanted:
            raise ModelError(
                f"model.weights={source}: {name} {tuple(value.shape)} of the file has no place in the model; "
                f"{_remedy(state)}"
            )
    if missing := [name for name in wanted if name not in state]:
        raise ModelError(
            f"model.weights={source}: {missing[0]} {wanted[missing[0]]} of the model is not in the file; "
            f"{_remedy(state)}"
        )


def _remedy(state: State) -> str:
    """What the file says of its model."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return f"the file's model has width {len(state[ANCHOR])} and depth {depth}: name it with model.name"

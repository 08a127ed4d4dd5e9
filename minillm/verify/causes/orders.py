"""Faults of order: rows of q, k and v as another format has them, columns of o_proj, rows for columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minillm.verify.scene import Candidate, Scene, only

_QKV = ("q_proj", "k_proj", "v_proj")


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Meta's order of a head's rows (pairs side by side) -> half-split: (heads E, ..) -> same."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def meta_order(scene: Scene) -> Iterator[Candidate]:
    """Meta pairs numbers 2i and 2i + 1 of a head, Hugging Face i and i + E/2; loaders reorder the rows of q and k."""
    part, config = scene.case.operation.short, scene.formula.config
    if part not in _QKV or config.head_size % 2:
        return
    queries, own = config.num_heads, config.num_heads if part == "q_proj" else config.num_kv_heads
    rows = torch.arange(scene.case.exact.shape[-1])
    metas = interleaved(rows, own)
    orders = [
        ("meta_order", f"with {part} in Meta's order of rows: Meta-format weights read as Hugging Face's", metas),
        ("meta_order", f"with {part} reordered from Meta's order, in which it was not", half_split(rows, own)),
    ]
    if own != queries and len(rows) % (2 * queries) == 0:
        wrong = f"with {part} un-permuted with {queries} heads; it has n_kv_heads = {own}"
        orders += [
            ("permuted_with_heads", f"{wrong} (Meta-format weights)", half_split(metas, queries)),
            ("permuted_with_heads", wrong, half_split(rows, queries)),
            (
                "permuted_with_heads",
                f"with {part} permuted with {queries} heads; it has {own}",
                interleaved(rows, queries),
            ),
        ]
    for key, text, order in orders:
        yield from _reordered(scene, key, text, order.to(scene.case.exact.device))


def _reordered(scene: Scene, key: str, text: str, order: Tensor) -> Iterator[Candidate]:
    """Rows of the weight in another order, those of the bias too or not: outputs in that order."""
    exact = scene.case.exact
    yield Candidate(key, text, exact[..., order])
    offset = scene.bias()
    if offset is not None:
        yield Candidate(key, f"{text}, its bias not", (exact - offset)[..., order] + offset)


def fused_layout(scene: Scene) -> Iterator[Candidate]:
    """Falcon's query_key_value: for each key/value head its query heads, then k, then v. Read in other ways:"""
    part, config = scene.case.operation.short, scene.formula.config
    if part not in _QKV or config.family != "falcon":
        return
    names = [scene.name.replace(part, name) for name in _QKV]
    outputs = torch.cat([scene.formula.linear(scene.inputs()[0], name=name) for name in names], dim=-1)
    has_bias = scene.bias() is not None
    biases = torch.cat([scene.formula.parameter(f"{name}.bias").double() for name in names]) if has_bias else None
    each, groups, size = config.heads_per_group, config.num_kv_heads, config.head_size
    ids = torch.arange(outputs.shape[-1], device=outputs.device)
    q, k, v = ids.split([groups * each * size, groups * size, groups * size])
    fused = torch.cat((q.view(groups, each, size), k.view(groups, 1, size), v.view(groups, 1, size)), dim=1).flatten()
    index = _QKV.index(part)
    for text, read in (
        ("as all of q, then all of k, then all of v", _as_blocks),
        ("with key/value heads innermost", _groups_inside),
        ("as k, v, then the query heads", _keys_first),
        ("as [q, k, v] of each number of a head", _numbers_inside),
    ):
        chosen = read(fused, each, groups, size)
        if chosen is None:
            continue
        rows, text = chosen[index], f"with the fused query_key_value read {text}"
        yield Candidate("fused_layout", text, outputs[..., rows])
        if biases is not None:
            own = biases[(q, k, v)[index]]
            yield Candidate("fused_layout", f"{text}, its bias not", (outputs - biases)[..., rows] + own)
            yield Candidate("fused_layout", f"{text}, only its bias", scene.case.exact - own + biases[rows])


_Parts = tuple[Tensor, Tensor, Tensor]


def _as_blocks(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    q, k, v = fused.split([groups * each * size, groups * size, groups * size])
    return q, k, v


def _groups_inside(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    rows = fused.view(each + 2, groups, size)
    return rows[:each].flatten(), rows[each].flatten(), rows[each + 1].flatten()


def _keys_first(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    rows = fused.view(groups, each + 2, size)
    return rows[:, 2:].flatten(), rows[:, 0].flatten(), rows[:, 1].flatten()


def _numbers_inside(fused: Tensor, each: int, groups: int, size: int) -> _Parts | None:
    if each != 1:
        return None
    rows = fused.view(groups, size, 3)
    return rows[..., 0].flatten(), rows[..., 1].flatten(), rows[..., 2].flatten()


def transposed(scene: Scene) -> Iterator[Candidate]:
    """The whole weight, or the square of one head, with rows for columns."""
    weight = scene.formula.parameter(f"{scene.name}.weight")
    if weight.shape[0] != weight.shape[1]:
        return
    yield Candidate("transposed", "with the weight transposed", scene.with_parameter(only("weight", lambda w: w.T)))
    x, exact, size = scene.inputs()[0], scene.case.exact, scene.formula.config.head_size
    for head in range(weight.shape[0] // size if ".attention." in scene.name else 0):
        part = slice(head * size, (head + 1) * size)
        square = weight[part, part].double()
        output = exact.clone()
        output[..., part] += x[..., part] @ (square - square.T)
        yield Candidate("head_transposed", f"with the square of head {head} transposed", output)
    yield from _all_heads_transposed(scene, weight)


def _all_heads_transposed(scene: Scene, weight: Tensor) -> Iterator[Candidate]:
    size = scene.formula.config.head_size
    if ".attention." in scene.name and not weight.shape[0] % size:
        squares = weight.unflatten(0, (-1, size)).unflatten(-1, (-1, size)).transpose(1, 3)  # (H, E, H, E)
        text = "with the square of every pair of heads transposed"
        output = scene.with_parameter(only("weight", lambda _: squares.flatten(2).flatten(0, 1)))
        yield Candidate("head_transposed", text, output)


def input_heads(scene: Scene) -> Iterator[Candidate]:
    """o_proj with its columns in another order of heads, or of a head's numbers."""
    config = scene.formula.config
    if not scene.name.endswith("o_proj"):
        return
    heads = torch.arange(config.num_heads * config.head_size).view(config.num_heads, config.head_size)
    groups = heads.unflatten(0, (config.num_kv_heads, config.heads_per_group))
    for text, order in (
        ("in reverse order of heads", heads.flip(0)),
        ("with heads of a group apart, not together", groups.transpose(0, 1)),
        ("with heads of a group together, not apart", heads.unflatten(0, (config.heads_per_group, -1)).transpose(0, 1)),
        ("with the numbers of heads interleaved", heads.T),
    ):
        columns = order.flatten()
        output = scene.with_parameter(only("weight", _columns(columns)))
        yield Candidate("heads_reordered", f"with the columns of o_proj {text}", output)


def _columns(order: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight[:, order.to(weight.device)]

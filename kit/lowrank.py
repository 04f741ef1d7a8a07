"""AdamW whose moments live in a low-rank projection of the gradient: GaLore (Zhao et al. 2024) and APOLLO (Zhu et al. 2024).

Each matrix is seen as [s, l] with s <= l; its gradient G is projected to P^T G, [rank, l], where Adam's moments are kept in float32.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from kit.errors import UserError

GALORE, APOLLO = "galore", "apollo"
# The range finder: random columns beside the rank, the weight of noise in a warm start, passes at most, and the energy it may miss.
OVERSAMPLING, NOISE, PASSES, MISSED = 8, 0.1, 8, 1e-3
GROWTH = 1.01  # of the norm of APOLLO's update from one step to the next (after Chen et al. 2024, Fira)
# Values that share a scale in 8 bits, and the smallest tensor that is quantised, both as in bitsandbytes' own optimisers.
BLOCK, SMALLEST = 256, 4096
TINY = 1e-30


def parameter_groups(
    model: Any, *, targets: Sequence[str], rank: int, update_gap: int, scale: float, projection: str, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters of a model as groups for `LowRankAdamW`: projected, plain, and plain without weight decay.

    Projected are the weights of Linear modules whose last name part is a target, unless the smaller side is at most `rank`, where a
    projection saves nothing. One-dimensional parameters (norms, biases) are not decayed. Raises UserError when nothing is projected.
    """
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.rpartition(".")[2] in targets}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "rank": rank, "projection": projection, "update_gap": update_gap, "scale": scale},
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for p in model.parameters():
        if p.requires_grad:
            groups[2 if p.ndim < 2 else 0 if id(p) in linear and min(p.shape) > rank else 1]["params"].append(p)
    if not groups[0]["params"]:
        raise UserError(f"no trainable weight of {', '.join(targets)} has both sides over rank {rank}; lower the rank or train other modules")
    return [group for group in groups if group["params"]]


class LowRankAdamW(torch.optim.Optimizer):
    """GaLore, APOLLO and plain AdamW, chosen group by group; all state is tensors, and a resumed run equals an unbroken one bit for bit.

    A group of matrices with a `rank` also has `projection` (galore or apollo), `update_gap` (steps between new projections) and `scale`
    (alpha); APOLLO at rank 1 scales whole tensors (APOLLO-Mini). A group without a rank is decoupled AdamW (Loshchilov and Hutter 2019).
    Random numbers depend on `seed`, the parameter's place and the projection's number alone. `eight_bit` keeps moments in blockwise 8-bit
    (Dettmers et al. 2022); small tensors and projectors stay float32. A step with a gradient that is not finite, or whose norm overflows
    float32, changes nothing, as under a GradScaler.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, eight_bit: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "eight_bit": eight_bit, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        rank, sides = param_group.get("rank"), [min(p.shape) if p.ndim == 2 else 0 for p in param_group["params"]]
        if rank is not None and (param_group["projection"] not in (GALORE, APOLLO) or param_group["update_gap"] < 1 or not 0 < rank < min(sides)):
            raise UserError("a projection is galore or apollo, its update gap at least 1, and its rank from 1 to below each matrix's smaller side")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the closure's value, if there is one."""
        with torch.enable_grad():
            loss = closure() if closure else None
        with torch.no_grad():
            every = [(p, group) for group in self.param_groups for p in group["params"]]
            work = [(p, group, index) for index, (p, group) in enumerate(every) if p.grad is not None]
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p, *_ in work]
            # One answer for all parameters: the GPU is waited for once a step.
            if work and bool(torch.stack(norms).isfinite().all()):
                for each in work:
                    self._update(*each)
        return loss

    def _update(self, p: Any, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        step = int(state.setdefault("step", torch.zeros((), dtype=torch.int64)).add_(1))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        g = p.grad.float()
        if "rank" not in group:
            p.add_(_direction(state, g, group), alpha=-group["lr"])
            return
        refresh, age = divmod(step - 1, group["update_gap"])
        # [s, l]: GaLore's "std" side, the right one of a square matrix.
        w, g = (p.T, g.T) if p.shape[0] >= p.shape[1] else (p, g)
        key = f"{group['seed']} {index} {refresh}"
        if group["projection"] == APOLLO:
            _apollo(w, g, state, group, key)
            return
        if age == 0:
            state["projector"] = projector(g, group["rank"], previous=state.get("projector"), key=key)
        update, alpha = _direction(state, state["projector"].T @ g, group), -group["lr"] * group["scale"]
        if w.dtype == torch.float32:
            w.addmm_(state["projector"], update, alpha=alpha)  # without a matrix beside the weight
        else:
            w.add_(state["projector"] @ update, alpha=alpha)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own type: torch would cast it to that of the parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers, own = (chain.from_iterable(g["params"] for g in groups) for groups in (state_dict["param_groups"], self.param_groups))
        for number, p in zip(numbers, own, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {k: v.to("cpu" if k == "step" else p.device) for k, v in state_dict["state"][number].items()}


def projector(g: Any, rank: int, *, previous: Any | None, key: str) -> Any:
    """Approximate leading left singular vectors of g [s, l], orthonormal float32 [s, rank], by subspace iteration with QR.

    A randomised range finder (Halko et al. 2011, algorithm 4.4) that starts from the previous projector, if any, and stops when its energy
    ||Q^T g||_F^2 is within MISSED of ||g||_F^2 or grew by under half of that. Q is turned to the Ritz vectors, strongest first, because
    Adam depends on the basis, and signs follow the previous projector, because the moments are kept. A zero g changes nothing.
    """
    norm = g.square().sum().sqrt()  # a CPU's vector_norm of so many numbers is off by 1e-3
    start = gaussian(g.shape[0], min(rank + OVERSAMPLING, g.shape[0]), device=g.device, key=key) * (NOISE / math.sqrt(g.shape[0]))
    if previous is not None:  # the noise finds directions that it has lost
        start[:, :rank] += previous
    if not norm:
        return torch.linalg.qr(start[:, :rank]).Q if previous is None else previous
    z, energy = (g.T @ start) / norm, 0.0
    for _ in range(PASSES):
        q = torch.linalg.qr(g @ torch.linalg.qr(z).Q).Q
        z = (g.T @ q) / norm
        before, energy = energy, float(z.square().sum())
        if min(1 - energy, 2 * (energy - before)) <= MISSED * energy:
            break
    made = q @ torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, :rank]
    return made if previous is None else made * torch.where((made * previous).sum(0) < 0, -1.0, 1.0)


def _apollo(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any], key: str) -> None:
    """w -= lr scale g diag(c), c_j the growth that Adam gives column j of the projected gradient (algorithm 1), limited by GROWTH."""
    small = gaussian(group["rank"], g.shape[0], device=g.device, key=key) @ g / math.sqrt(group["rank"])
    axis = 0 if group["rank"] > 1 else (0, 1)
    adapted, raw = (torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in (_direction(state, small, group), small))
    factor = adapted / raw.clamp_min(TINY)
    norm = torch.linalg.vector_norm(factor * torch.linalg.vector_norm(g, dim=0))
    limited = torch.minimum(norm, GROWTH * state["norm"]) if "norm" in state else norm
    # After an update of zero anything may follow.
    state["norm"] = torch.where(limited > 0, limited, math.inf)
    w.addcmul_(g, factor * (limited / norm.clamp_min(TINY)), value=-group["lr"] * group["scale"])


def _direction(state: dict[str, Any], g: Any, group: dict[str, Any]) -> Any:
    """Adam's m_hat / (sqrt(v_hat) + eps) after moving the moments in `state` by g (Kingma and Ba 2015, algorithm 1)."""
    (beta1, beta2), step = group["betas"], int(state["step"])
    eight_bit = group["eight_bit"] and g.numel() >= SMALLEST
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
    elif eight_bit:
        _unpack(state, "exp_avg")
        _unpack(state, "exp_avg_sq").square_()
    m, v = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt()
    if eight_bit:
        _pack(state, "exp_avg", m)
        _pack(state, "exp_avg_sq", root)  # in 8 bits the root leaves half the error in the update that v itself does
    root.div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    return torch.div(m, root, out=root).div_(1 - beta1**step)


def _pack(state: dict[str, Any], name: str, value: Any) -> None:
    state[name], quantised = _codec(name, value.device)[0](value)
    state[f"{name}_absmax"] = quantised.absmax


def _unpack(state: dict[str, Any], name: str) -> Any:
    state[name] = _codec(name, state[name].device)[1](state[name], absmax=state[f"{name}_absmax"])
    return state[name]


@functools.cache
def _codec(name: str, device: Any) -> list[Callable[..., Any]]:
    """The 8-bit quantiser of a moment, and its inverse."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=name == "exp_avg").to(device)  # type: ignore[no-untyped-call]
    return [functools.partial(f, code=code, blocksize=BLOCK) for f in (functional.quantize_blockwise, functional.dequantize_blockwise)]


def gaussian(rows: int, columns: int, *, device: Any, key: str) -> Any:
    """Standard normal float32 [rows, columns] that depends on the key alone; the global generators are not touched."""
    generator = torch.Generator(device).manual_seed(random.Random(key).getrandbits(63))
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all the tensors that an optimiser keeps, each once: bitsandbytes' 8-bit states share two tables."""
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())

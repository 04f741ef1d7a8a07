"""LowRankAdamW: equal to the published formulas, exact when resumed, robust to bad gradients, and as small as it says."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kit.errors import UserError
from kit.lowrank import APOLLO, BLOCK, GALORE, GROWTH, PASSES, SMALLEST, LowRankAdamW, gaussian, parameter_groups, projector, state_bytes

RANK, GAP, SCALE, LR = 6, 5, 0.3, 1e-2
OPTIONS: dict[str, Any] = {"lr": LR, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(24, 40), (40, 24), (32, 32)]


def low(params: Sequence[Any], projection: str, rank: int = RANK, gap: int = GAP) -> dict[str, Any]:
    return {"params": params, "rank": rank, "projection": projection, "update_gap": gap, "scale": SCALE}


def spectrum(shape: tuple[int, int], values: Any, seed: int) -> torch.Tensor:
    """A random matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, min(shape))))[0] for n in shape)
    return torch.tensor((left * values) @ right.T, dtype=torch.float32)


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Noise, but at each refresh a matrix of rank RANK whose singular vectors are plain to see."""
    for step in range(steps):
        values = np.where(np.arange(min(shape)) < RANK, 0.7 ** np.arange(min(shape)), 0)
        yield spectrum(shape, values, step + seed) if step % GAP == 0 else torch.tensor(np.random.default_rng(step + seed).normal(size=shape)).float()


def galore(w: Any, grads: Sequence[Any]) -> Any:
    """Algorithm 2 of Zhao et al. 2024 around decoupled Adam, in float64 with an exact SVD; column signs as in the projector before."""
    m = v = p = 0.0
    beta1, beta2 = OPTIONS["betas"]
    for t, g in enumerate(grads, 1):
        right = g.shape[0] >= g.shape[1]
        if (t - 1) % GAP == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            new = vt[:RANK].T if right else u[:, :RANK]
            p = new if t == 1 else new * np.sign((new * p).sum(axis=0))
        r = g @ p if right else p.T @ g
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + OPTIONS["eps"])
        w = w - LR * OPTIONS["weight_decay"] * w - LR * SCALE * (n @ p.T if right else p @ n)
    return w


def apollo(w: Any, grads: Sequence[Any], rank: int) -> Any:
    """Algorithm 1 of Zhu et al. 2024 with the norm-growth limiter, in float64; tall and square matrices transposed; rank 1 is APOLLO-Mini."""
    if w.shape[0] >= w.shape[1]:
        w, grads = w.T, [g.T for g in grads]
    m = v = 0.0
    last = None
    beta1, beta2 = OPTIONS["betas"]
    for t, g in enumerate(grads, 1):
        p = gaussian(rank, g.shape[0], device="cpu", key=f"0 0 {(t - 1) // GAP}").double().numpy() / math.sqrt(rank)
        r = p @ g
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + OPTIONS["eps"])
        s = np.linalg.norm(n) / np.linalg.norm(r) if rank == 1 else np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0)
        update = g * s
        if last is not None and np.linalg.norm(update) / last > GROWTH:
            update = update / np.linalg.norm(update) * GROWTH * last
        last = np.linalg.norm(update)
        w = w - LR * OPTIONS["weight_decay"] * w - LR * SCALE * update
    return w


def run(w: torch.Tensor, grads: Sequence[torch.Tensor], **group: Any) -> tuple[torch.Tensor, LowRankAdamW]:
    """The parameter after a step for each gradient."""
    p = w.clone().requires_grad_()
    optimizer = LowRankAdamW([{**group, "params": [p]}], **OPTIONS)
    for g in grads:
        p.grad = g.clone().to(p.dtype)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_equals_its_algorithm(shape: tuple[int, int]) -> None:
    w, grads = torch.randn(shape, generator=torch.Generator().manual_seed(1)), list(gradients(shape, 3 * GAP + 2))
    expected = galore(w.double().numpy(), [g.double().numpy() for g in grads])
    assert np.abs(expected - w.numpy()).max() > 10 * LR * SCALE
    assert np.abs(run(w, grads, **low([], GALORE))[0].numpy() - expected).max() < 1e-3 * LR


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_equals_its_algorithm(shape: tuple[int, int], rank: int) -> None:
    w, grads = torch.randn(shape, generator=torch.Generator().manual_seed(1)), list(gradients(shape, 3 * GAP + 2))
    expected = apollo(w.double().numpy(), [g.double().numpy() for g in grads], rank)
    expected = expected.T if shape[0] >= shape[1] else expected
    assert np.abs(expected - w.numpy()).max() > 10 * LR * SCALE * (rank > 1)
    assert np.abs(run(w, grads, **low([], APOLLO, rank))[0].numpy() - expected).max() < 1e-3 * LR


def test_a_group_without_rank_is_torchs_adamw() -> None:
    w, grads = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)), list(gradients((30, 20), 20))
    p = w.clone().requires_grad_()
    reference = torch.optim.AdamW([p], **OPTIONS)
    for g in grads:
        p.grad = g
        reference.step()
    assert torch.allclose(run(w, grads)[0], p.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("projection", [GALORE, APOLLO, None])
def test_without_a_gradient_signal_weights_only_decay(projection: str | None) -> None:
    w = torch.randn(24, 40)
    after, optimizer = run(w, [torch.zeros(24, 40)] * 7, **(low([], projection) if projection else {}))
    assert torch.allclose(after, w * (1 - LR * 0.1) ** 7, rtol=1e-5)
    assert all(t.isfinite().all() for name, t in next(iter(optimizer.state.values())).items() if name != "norm")


class Model(torch.nn.Module):
    """A byte-sized language model: an embedding, two projectable matrices (one tall, one wide), a small one, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 96)
        self.up, self.down = torch.nn.Linear(96, 160), torch.nn.Linear(160, 96)
        self.gate = torch.nn.Linear(96, 16)
        self.norm = torch.nn.LayerNorm(96)
        self.head = torch.nn.Linear(96, 64, bias=False)

    def forward(self, ids: Any) -> Any:
        x = self.embedding(ids)
        x = x + self.down(torch.relu(self.up(x))) * self.gate(x).mean(-1, keepdim=True).sigmoid()
        return self.head(self.norm(x))


def make(projection: str, *, dtype: torch.dtype = torch.float32, eight_bit: bool = False, rank: int = 32) -> tuple[Model, LowRankAdamW]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().to(dtype)
    groups = parameter_groups(model, targets=["up", "down", "gate"], rank=rank, update_gap=4, scale=1.0, projection=projection, weight_decay=0.01)
    return model, LowRankAdamW(groups, lr=3e-3, eight_bit=eight_bit)


def steps(model: Model, optimizer: LowRankAdamW, numbers: Sequence[int]) -> list[float]:
    """Training to map every byte to a fixed other one, a batch per number; the losses."""
    losses = []
    for number in numbers:
        ids = torch.randint(64, (32,), generator=torch.Generator().manual_seed(number))
        loss = torch.nn.functional.cross_entropy(model(ids).float(), (ids * 5 + 3) % 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(optimizer: LowRankAdamW) -> dict[str, Any]:
    """The state dictionary as a trainer's checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def equal_states(one: LowRankAdamW, other: LowRankAdamW) -> bool:
    pairs = list(zip(one.state.values(), other.state.values(), strict=True))
    return all(a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("projection", [GALORE, APOLLO])
@pytest.mark.parametrize("at", [6, 8])
def test_a_resumed_run_equals_an_unbroken_one(projection: str, eight_bit: bool, dtype: torch.dtype, at: int) -> None:
    whole, optimizer = make(projection, eight_bit=eight_bit, dtype=dtype)
    steps(whole, optimizer, range(14))
    first, before = make(projection, eight_bit=eight_bit, dtype=dtype)
    steps(first, before, range(at))
    second, after = make(projection, eight_bit=eight_bit, dtype=dtype)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(saved(before))
    assert equal_states(before, after)
    assert all(t.dtype in (torch.float32, torch.uint8) for s in after.state.values() for k, t in s.items() if k != "step")
    assert any(t.dtype == torch.uint8 for s in after.state.values() for t in s.values()) == eight_bit
    steps(second, after, range(at, 14))
    assert equal_states(after, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("projection", [GALORE, APOLLO])
def test_training_learns_with_a_smaller_state(projection: str, eight_bit: bool) -> None:
    model, optimizer = make(projection, eight_bit=eight_bit)
    losses = steps(model, optimizer, range(80))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    shapes = [tuple(p.shape) for p in model.parameters() if p.shape not in ((64, 96), (16, 96))]
    left = [(64, 96), (64, 96), (16, 96)]
    assert state_bytes(optimizer) == counted(shapes, rank=32, projection=projection, eight_bit=eight_bit) + counted(left, eight_bit=eight_bit)


def test_a_table_that_all_states_share_is_counted_once() -> None:
    """bitsandbytes keeps its 8-bit codes in every parameter's state."""
    optimizer, table = torch.optim.SGD(torch.nn.Linear(4, 4).parameters()), torch.zeros(256)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] |= {"state1": torch.zeros(10, dtype=torch.uint8), "qmap1": table}
    assert state_bytes(optimizer) == 2 * 10 + 256 * 4


def counted(shapes: Sequence[tuple[int, ...]], *, rank: int = 0, projection: str = GALORE, eight_bit: bool = False) -> int:
    """Bytes of state for parameters of these shapes, every matrix larger than the rank projected; rank 0 is plain AdamW."""
    total = 8 * len(shapes)  # the steps
    for shape in shapes:
        values = math.prod(shape)
        if rank and len(shape) == 2 and min(shape) > rank:
            values = rank * max(shape)
            total += 4 * rank * min(shape) if projection == GALORE else 4
        total += 2 * (values + 4 * math.ceil(values / BLOCK)) if eight_bit and values >= SMALLEST else 8 * values
    return total


def test_the_figures_for_gemma_3_1b() -> None:
    layer = [(1024, 1152), (256, 1152), (256, 1152), (1152, 1024), (6912, 1152), (6912, 1152), (1152, 6912)]
    shapes: list[tuple[int, ...]] = 26 * [*layer, *4 * [(1152,)], (256,), (256,)] + [(1152,)]
    mib = lambda **options: round(counted(shapes, **options) / 2**20)  # noqa: E731
    assert (mib(), mib(eight_bit=True)) == (5325, 1353)
    assert (mib(rank=128), mib(rank=128, eight_bit=True), mib(rank=128, projection=APOLLO)) == (721, 241, 645)


def energy(g: torch.Tensor, made: torch.Tensor) -> float:
    """What the projector captures of what the exact SVD of the same rank does."""
    best = torch.linalg.svdvals(g.double())[: made.shape[1]].square().sum()
    return float((made.double().T @ g.double()).square().sum() / best)


def orthonormal(made: torch.Tensor) -> bool:
    return torch.allclose(made.T @ made, torch.eye(made.shape[1]), atol=1e-5)


@pytest.mark.parametrize("decay", [lambda i: i**-0.5, lambda i: 1 / i, lambda i: np.exp(-i / 40), lambda i: (i < 5) + 1e-3])
def test_energy_of_synthetic_spectra(decay: Any) -> None:
    previous = None
    for seed in range(3):
        g = 1e-6 * spectrum((160, 480), decay(np.arange(1, 161)), seed // 2)
        previous = projector(g, 32, previous=previous, key=str(seed))
        assert orthonormal(previous)
        assert energy(g, previous) >= 0.999


def test_energy_of_real_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def recording(g: Any, rank: int, **options: Any) -> Any:
        made = projector(g, rank, **options)
        found.append((options["previous"] is None, energy(g, made)))
        return made

    monkeypatch.setattr("kit.lowrank.projector", recording)
    steps(*make(GALORE, rank=12), range(21))
    assert [cold for cold, _ in found] == 3 * [True] + 15 * [False]
    assert min(e for _, e in found) >= 0.999


def test_a_projector_of_directions_that_vanished_is_left_behind() -> None:
    upper, lower = torch.zeros(60, 90), torch.zeros(60, 90)
    upper[:30], lower[30:] = spectrum((30, 90), 0.9 ** np.arange(30), 0), spectrum((30, 90), 0.9 ** np.arange(30), 1)
    previous = projector(upper, 8, previous=None, key="")
    assert energy(lower, previous) < 1e-9
    assert energy(lower, projector(lower, 8, previous=previous, key="")) >= 0.999


def test_a_warm_start_goes_on_where_the_projector_before_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.lowrank.PASSES", 2)
    g, captured, previous = torch.randn(160, 480, generator=torch.Generator().manual_seed(0)), [], None
    for key in "abcd":
        previous = projector(g, 32, previous=previous, key=key)
        captured.append(energy(g, previous))
    assert captured[0] < 0.92
    assert captured[3] > 0.98


def test_the_basis_is_the_singular_vectors_and_keeps_its_signs() -> None:
    g = spectrum((40, 90), np.where(np.arange(40) < 6, 0.6 ** np.arange(40), 0), 0)
    exact = torch.linalg.svd(g).U[:, :6]
    made = projector(g, 6, previous=None, key="a")
    assert torch.allclose((made.T @ exact).abs(), torch.eye(6), atol=1e-4)
    for flipped in (made, -made):
        assert torch.allclose(projector(-g, 6, previous=flipped, key="b"), flipped, atol=1e-4)


def test_a_projector_of_a_zero_or_rank_deficient_gradient() -> None:
    zero, thin = torch.zeros(40, 90), torch.outer(torch.arange(40.0), torch.ones(90))
    first = projector(zero, 8, previous=None, key="")
    assert orthonormal(first)
    assert projector(zero, 8, previous=first, key="1") is first
    for previous in (None, first):
        made = projector(thin, 8, previous=previous, key="2")
        assert orthonormal(made)
        assert energy(thin, made) > 0.99999


def test_noise_ends_after_a_bounded_number_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: calls.append(1) or qr(x))
    assert orthonormal(projector(torch.randn(200, 400, generator=torch.Generator().manual_seed(0)), 8, previous=None, key=""))
    assert len(calls) == 2 * PASSES  # of both sides, as in the algorithm


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("projection", [GALORE, APOLLO])
@pytest.mark.parametrize("at", [0, 4, 6])
def test_a_step_with_a_bad_gradient_changes_nothing(projection: str, bad: float, at: int) -> None:
    model, optimizer = make(projection)
    steps(model, optimizer, range(at))
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.norm.bias.grad[3] = bad
    optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    now = optimizer.state_dict()["state"]
    assert now.keys() == states.keys()
    assert all(torch.equal(states[i][k], now[i][k]) for i in states for k in states[i])
    assert all(map(math.isfinite, steps(model, optimizer, range(at, at + 6))))


def test_apollos_growth_limit_lets_go_after_a_zero_gradient() -> None:
    w, g = torch.zeros(24, 40), next(gradients((24, 40), 1))
    (one, _), (two, _) = (run(w, [torch.zeros_like(g)] * n + [g], **low([], APOLLO)) for n in (0, 2))
    assert two.norm() > 0.1 * one.norm() > 0


@pytest.mark.parametrize("projection", [GALORE, APOLLO])
def test_bfloat16_weights_move_as_float32_ones_do(projection: str) -> None:
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = [g.bfloat16().float() for g in gradients((24, 40), 1)]
    half, whole = (run(x, grads, **low([], projection)) for x in (w, w.float()))
    assert half[0].dtype == torch.bfloat16
    # Weight and update are rounded, and the update's rounding stays where the two cancel.
    rounding = float((whole[0] - w.float()).abs().max()) * 2**-7
    assert torch.allclose(half[0].float(), whole[0], rtol=2**-7, atol=rounding)
    assert not torch.equal(half[0], w)
    assert equal_states(half[1], whole[1])


def test_eight_bit_moments_change_little() -> None:
    shape = (80, 120)
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=shape))
    grads = [torch.tensor(sizes * (0.3 + rng.normal(size=shape))).float() for _ in range(40)]
    moved = []
    for eight_bit in (False, True):
        p = torch.zeros(shape, requires_grad=True)
        optimizer = LowRankAdamW([p], lr=1e-3, eight_bit=eight_bit)
        for g in grads:
            p.grad = g
            optimizer.step()
        moved.append(p.detach())
    assert 0 < (moved[1] - moved[0]).norm() / moved[0].norm() < 0.045


@pytest.mark.parametrize("projection", [GALORE, APOLLO])
def test_the_global_generator_is_not_touched_nor_asked(projection: str) -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, optimizer = make(projection)
        state = torch.get_rng_state()
        steps(model, optimizer, range(6))
        assert torch.equal(state, torch.get_rng_state())
        made.append(model.up.weight.detach())
    assert torch.equal(*made)


def test_projections_are_normal_and_differ_by_parameter_refresh_and_seed() -> None:
    keys: list[str] = []
    original = gaussian

    def recording(rows: int, columns: int, *, device: Any, key: str) -> Any:
        keys.append(key)
        return original(rows, columns, device=device, key=key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kit.lowrank.gaussian", recording)
        for seed in (0, 1):
            model, optimizer = make(APOLLO)
            for group in optimizer.param_groups:
                group["seed"] = seed
            steps(model, optimizer, range(8))
    assert len(keys) == 2 * 2 * 8
    assert len(set(keys)) == 2 * 2 * 2
    drawn = torch.stack([original(50, 100, device="cpu", key=key) for key in set(keys)])
    assert drawn.std() == pytest.approx(1, abs=0.02)
    assert (torch.corrcoef(drawn.flatten(1)) - torch.eye(8)).abs().max() < 0.06


def test_a_closure_is_run_with_gradients_and_unused_parameters_stay() -> None:
    model = Model()
    optimizer = LowRankAdamW([model.up.weight, torch.nn.Parameter(torch.ones(3))], lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.arange(8)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > 0
    assert len(optimizer.state) == 1
    optimizer.zero_grad()
    assert optimizer.step() is None


def test_a_transformers_model_with_a_schedule() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=80, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64
    )
    model = Qwen2ForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    groups = parameter_groups(model, targets=targets, rank=12, update_gap=10, scale=1.0, projection=GALORE, weight_decay=0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    projected, plain, undecayed = ({names[id(p)].removeprefix("model.layers.") for p in group["params"]} for group in groups)
    assert len(projected) == 2 * 5
    assert {n.split(".")[2] for n in projected} == set(targets) - {"k_proj", "v_proj"}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in plain} == {"k_proj", "v_proj", "lm_head"}
    assert all("norm" in n or n.endswith("bias") for n in undecayed)
    assert len(undecayed) == 2 * (2 + 3) + 1
    assert [g["weight_decay"] for g in groups] == [0.01, 0.01, 0.0]

    optimizer = LowRankAdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 30)
    ids = torch.randint(80, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    frozen = copy.deepcopy(model.state_dict())
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # the schedule ended at a learning rate of 0
    assert all(torch.equal(t, frozen[n]) for n, t in model.state_dict().items())


def test_what_cannot_be_projected_is_an_error() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(8, 9)), torch.nn.Parameter(torch.ones(9))
    for group in (low([matrix], "svd"), low([vector], GALORE), low([matrix], GALORE, rank=8), low([matrix], APOLLO, rank=0), low([matrix], APOLLO, gap=0)):
        with pytest.raises(UserError, match="a projection is"):
            LowRankAdamW([group], lr=1e-3)
    with pytest.raises(UserError, match="no trainable weight of up has both sides over rank 96"):
        parameter_groups(Model(), targets=["up"], rank=96, update_gap=1, scale=1.0, projection=GALORE, weight_decay=0.0)

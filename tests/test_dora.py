"""The kit's DoRA layers: equal to the paper's formula in float64, and to PEFT's layers in all that PEFT's layers can do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kit.config import RunConfig
from kit.model import attach, import_unsloth, load_base

LAYERS = ("q_proj", "o_proj")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Values = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    """Two linear layers with a function between them, maybe checkpointed."""

    between = staticmethod(torch.tanh)
    reentrant: bool | None = None

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.o_proj = torch.nn.Linear(64, 128, bias=bias), torch.nn.Linear(128, 64, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x) if self.reentrant is None else checkpoint(self.both, x, use_reentrant=self.reentrant)

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.between(self.q_proj(x)))


@pytest.fixture(scope="module", autouse=True)
def dora() -> Any:
    """The module, after Unsloth: both import PEFT."""
    import_unsloth()
    from kit import dora

    return dora


@pytest.fixture
def computed(dora: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every time that a layer's norms are computed."""
    calls: list[Any] = []
    original = dora._scales
    monkeypatch.setattr(dora, "_scales", lambda *arguments: calls.append(arguments[0]) or original(*arguments))
    return calls


def dora_config(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(LAYERS), "use_dora": True} | settings))


def stock(*, dtype: torch.dtype = FP32, four_bit: bool = False, bias: bool = False, seed: int = 0, **settings: Any) -> Any:
    """PEFT's own DoRA model, in training mode, its float32 adapter far from the initial values."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    net = Net(bias).to(dtype)
    model = get_peft_model(in_four_bits(net) if four_bit else net, dora_config(**settings))
    disturb(model)
    return model.train()


def in_four_bits(net: Any) -> Any:
    from bitsandbytes.nn import Linear4bit

    for name in LAYERS:
        old = getattr(net, name)
        new = Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=old.weight.dtype, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        setattr(net, name, new.to("cpu").requires_grad_(False))
    net.is_loaded_in_4bit = True
    return net


@torch.no_grad()
def disturb(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(p + 0.1 * torch.randn(p.shape) if "lora_B" in name else p * (1 + 0.2 * torch.randn(p.shape)))


def fast(model: Any) -> Any:
    """A copy of the model on the kit's path."""
    from kit import dora

    made = copy.deepcopy(model)
    assert dora.install(made) == len(LAYERS)
    return made


def layers(model: Any) -> list[Any]:
    return [model.get_submodule(f"base_model.model.{name}") for name in LAYERS]


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 32, 64, generator=generator), torch.randn(4, 32, 64, generator=generator)


def gradients(model: Any, x: torch.Tensor, weights: torch.Tensor, autocast: torch.dtype | None = None) -> Values:
    """The output and the gradients of sum(weights * output) for the input and every parameter, in float64."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    (y.float() * weights).sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.detach().double() for name, t in ({"x": x.grad, "y": y} | found).items()}


def formula(model: Any, x: torch.Tensor, weights: torch.Tensor) -> Values:
    """The same from equation 5 of the DoRA paper in float64, its norm constant (section 4.3), whatever PEFT does."""
    from peft.utils.integrations import dequantize_module_weight

    given = x = x.double().requires_grad_()
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    for name, layer in zip(LAYERS, layers(model), strict=True):
        adapter = layer.active_adapters[0]
        a, b, m = (leaves[f"base_model.model.{name}.{kind}.{adapter}.weight"] for kind in ("lora_A", "lora_B", "lora_magnitude_vector"))
        w = dequantize_module_weight(layer.get_base_layer()).detach().double()
        v = w + layer.scaling[adapter] * b @ a
        # With dropout as PEFT: it drops inputs of what is added to W x.
        x = x @ w.T + x * layer.lora_dropout[adapter](torch.ones(x.shape)) @ (m / v.detach().norm(dim=1) * v.T - w.T)
        if layer.get_base_layer().bias is not None:
            x = x + layer.get_base_layer().bias.detach().double()
        x = torch.tanh(x) if name == LAYERS[0] else x
    (x * weights.double()).sum().backward()
    return {name: t.grad for name, t in leaves.items()} | {"x": given.grad, "y": x.detach()}


def errors(found: Values, expected: Values) -> dict[str, float]:
    """Relative errors by kind: y, x, lora_A, lora_B, lora_magnitude_vector; the larger of the two layers'."""
    assert found.keys() == expected.keys()
    out: dict[str, float] = {}
    for name, value in found.items():
        kind = name if name in ("x", "y") else name.split(".")[3]
        out[kind] = max(out.get(kind, 0.0), float((value - expected[name]).norm() / expected[name].norm()))
    return out


def assert_exact(model: Any) -> None:
    """Output and gradients equal the formula's with the weights that the model has now."""
    assert max(errors(gradients(model, *data()), formula(model, *data())).values()) < 1e-5


def assert_like(found: Values, expected: Values, tolerance: float = 1e-5) -> None:
    assert max(errors(found, expected).values()) < tolerance


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_float32_equals_the_formula(four_bit: bool, bias: bool) -> None:
    assert_exact(fast(stock(four_bit=four_bit, bias=bias)))


def test_blocks_of_rows_add_up(dora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "BLOCK", 5 * 128)
    assert_exact(fast(stock(bias=True)))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "autocast"), [(BF16, None), (BF16, BF16), (FP16, None), (FP16, FP16)])
def test_16_bit_errors_are_not_larger_than_pefts(dtype: torch.dtype, autocast: torch.dtype | None, dropout: float, four_bit: bool) -> None:
    """Root mean square over draws of weights, against the formula in float64."""
    ours, theirs = [], []
    for seed in range(16):
        model = stock(dtype=dtype, four_bit=four_bit, bias=bool(seed % 2), seed=seed, lora_dropout=dropout)
        x, weights = data(seed)
        found = []
        for each in (None, model, fast(model)):
            torch.manual_seed(1)
            found.append(gradients(each, x.to(dtype), weights, autocast) if each else formula(model, x.to(dtype), weights))
        theirs.append(errors(found[1], found[0]))
        ours.append(errors(found[2], found[0]))
    for kind in ours[0]:
        squares = [sum(e[kind] ** 2 for e in each) for each in (ours, theirs)]
        assert squares[0] ** 0.5 < 1.1 * squares[1] ** 0.5, kind


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("four_bit", [False, True])
def test_without_autocast_it_computes_as_unsloths_lora_does(four_bit: bool, dropout: float) -> None:
    """Where Unsloth keeps Gemma 3's residuals in float32, on a T4: in float16 by itself, with the errors that PEFT has under autocast."""
    ours, theirs = [], []
    for seed in range(16):
        model = stock(dtype=FP16, four_bit=four_bit, seed=seed, lora_dropout=dropout)
        forced = copy.deepcopy(model)
        forced._unsloth_forced_float32 = True
        forced = fast(forced)
        x, weights = data(seed)
        found = []
        for find, given, more in ((formula, model, ()), (gradients, model, (FP16,)), (gradients, forced, ())):
            torch.manual_seed(1)
            found.append(find(given, x.to(FP16), weights, *more))
        theirs.append(errors(found[1], found[0]))
        ours.append(errors(found[2], found[0]))
        assert copy.deepcopy(layers(forced)[0].lora_variant["default"]).dtype is FP16
    for kind in ours[0]:
        squares = [sum(e[kind] ** 2 for e in each) for each in (ours, theirs)]
        assert squares[0] ** 0.5 < 1.1 * squares[1] ** 0.5, kind
    seen = []
    from kit import dora

    real, inputs = dora.linear, torch.randn(2, 64).to(FP16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "linear", lambda *given: seen.append({t.dtype for t in given}) or real(*given))
        forced(inputs)
        with torch.no_grad():
            forced(inputs)
    assert len(seen) >= 6
    assert seen[0] == seen[-1] == {FP16}


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_is_pefts_given_the_same_mask(bias: bool) -> None:
    model = stock(bias=bias, lora_dropout=0.3)
    found = []
    for each in (model, fast(model)):
        torch.manual_seed(1)
        found.append(gradients(each, *data()))
    assert_like(found[1], found[0])
    dropped = found[1]["y"]
    assert torch.allclose(fast(model).eval()(data()[0]).double(), model.eval()(data()[0]).double(), atol=1e-5)
    assert not torch.allclose(model(data()[0]).double(), dropped, atol=1e-2)


@pytest.mark.parametrize("left", [0.1, 1e-3])
def test_norms_where_the_update_cancels_the_weight(dora: Any, left: float) -> None:
    """Rows of W + s B A that are `left` times W: ||W||^2 + 2 s ... + s^2 ... would keep one digit, or none."""
    model = stock()
    layer = layers(model)[0]
    weight, a, b = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a[0] = weight[5]
        b[5] = torch.tensor([-(1 - left) / layer.scaling["default"], 0, 0, 0])
        exact = (weight.double() + layer.scaling["default"] * b.double() @ a.double()).norm(dim=1)
        model = fast(model)
        variant = next(dora._installed(model))
        weights = variant._weights(variant.module())
        kept = weights[3].double() / variant.scales(variant.module(), weights)[0]
    assert abs(float(kept[5] / exact[5]) - 1) < 1e-6 / left
    if left > 0.01:
        assert_exact(model)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_norm_zero_is_zero_without_gradient(bias: bool) -> None:
    model = stock(bias=bias)
    layer = layers(model)[1]
    with torch.no_grad():
        for p in (layer.get_base_layer().weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight):
            p[3] = 0
    assert model(data()[0])[..., 3].isnan().all()
    found = gradients(fast(model), *data())
    assert all(v.isfinite().all() for v in found.values())
    assert (found["y"][..., 3] == (layer.get_base_layer().bias[3] if bias else 0)).all()
    assert not found["base_model.model.o_proj.lora_B.default.weight"][3].any()


@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_of_zero_or_almost_still_gets_its_gradient(value: float, bias: bool) -> None:
    model = fast(stock(bias=bias))
    with torch.no_grad():
        layers(model)[0].lora_magnitude_vector["default"].weight[7] = value
    assert_exact(model)
    name = "base_model.model.q_proj.lora_magnitude_vector.default.weight"
    found, expected = (float(f(model, *data())[name][7]) for f in (gradients, formula))
    assert found == pytest.approx(expected, rel=1e-4)


def fused_step(model: Any) -> None:
    gradients(model, *data())
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()


def bitsandbytes_step(model: Any) -> None:
    from bitsandbytes.optim import AdamW

    gradients(model, *data())
    AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def by_hand(model: Any) -> None:
    with torch.no_grad():
        layers(model)[0].lora_A["default"].weight.add_(0.1)


def assigned(model: Any) -> None:
    weight = layers(model)[0].lora_B["default"].weight
    weight.kept_alive = weight.data
    weight.data = weight.data * 1.5


def assigned_at_the_same_address(model: Any) -> None:
    """As when an allocator gives freed memory to the next tensor."""
    weight = layers(model)[1].lora_A["default"].weight
    memory = weight.detach().numpy().copy()
    weight.data = torch.from_numpy(memory)
    with torch.no_grad():
        model(data()[0])
    memory *= 1.5
    weight.data = torch.from_numpy(memory)


def magnitude_by_hand(model: Any) -> None:
    with torch.no_grad():
        layers(model)[1].lora_magnitude_vector["default"].weight.mul_(2)


def state_loaded(model: Any) -> None:
    model.load_state_dict({name: 1.1 * t for name, t in model.state_dict().items()})


def adapter_loaded(model: Any) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(model, {name: 1.1 * t for name, t in get_peft_model_state_dict(model).items()})


def rescaled(model: Any) -> None:
    layers(model)[0].set_scale("default", 3.0)


def base_by_hand(model: Any) -> None:
    with torch.no_grad():
        layers(model)[0].get_base_layer().weight[:7].mul_(3)


CHANGES = [
    fused_step, bitsandbytes_step, by_hand, assigned, assigned_at_the_same_address, magnitude_by_hand, state_loaded, adapter_loaded, rescaled, base_by_hand,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_norms_are_kept_until_a_weight_changes(computed: list[Any], change: Callable[[Any], None]) -> None:
    model = fast(stock())
    for _ in range(3):
        assert_exact(model)
    with torch.inference_mode():
        model(data()[0])
    assert len(computed) == 2
    before = model(data()[0]).detach()
    change(model)
    assert not torch.allclose(model(data()[0]), before, rtol=1e-3)
    assert_exact(model)
    assert 3 <= len(computed) <= 4


def test_norms_first_needed_by_an_evaluation_serve_training(computed: list[Any]) -> None:
    model = fast(stock())
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        model.eval()(data()[0])
    assert_exact(model.train())
    assert len(computed) == 2


def test_a_write_that_nothing_announces_needs_refresh(dora: Any) -> None:
    model = fast(stock())
    assert_exact(model)
    layers(model)[0].lora_B["default"].weight.data.add_(1)
    with pytest.raises(AssertionError):
        assert_exact(model)
    dora.refresh(model)
    assert_exact(model)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_accumulation_compute_the_norms_once(computed: list[Any], reentrant: bool, four_bit: bool) -> None:
    model = fast(stock(four_bit=four_bit))
    expected = [gradients(model, *data(seed)) for seed in range(2)]
    model.base_model.model.reentrant = reentrant
    for seed in (0, 1, 0):
        assert_like(gradients(model, *data(seed)), expected[seed])
    assert len(computed) == 2
    # A layer that has not seen its first backward pass yet.
    fresh = copy.deepcopy(model)
    assert_like(gradients(fresh, *data(0)), expected[0])
    assert_like(gradients(fresh, *data(1)), expected[1])


def kept_bytes(model: Any, x: torch.Tensor, autocast: torch.dtype | None) -> int:
    """What the forward pass keeps for the backward pass, each memory once and without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", autocast, enabled=autocast is not None):
        model(x)
    return sum(size for address, size in found.items() if address not in own)


@pytest.mark.parametrize(("dtype", "autocast"), [(FP32, None), (BF16, None), (BF16, BF16)])
def test_what_lora_keeps_and_the_outputs_are_kept(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    from peft import get_peft_model

    lora = get_peft_model(Net().to(dtype), dora_config(use_dora=False)).train()
    model = fast(stock(dtype=dtype))
    x = torch.randn(2, 512, 64).to(dtype)
    outputs, scales = 1024 * (128 + 64) * dtype.itemsize, 3 * (128 + 64) * 4
    for _ in range(2):  # Before and after the layers have seen a backward pass.
        assert kept_bytes(model, x, autocast) <= kept_bytes(lora, x, autocast) + outputs + 2 * scales
        gradients(model, *(t.to(dtype) for t in data()), autocast)


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_input_is_kept_as_it_came(four_bit: bool, autocast: torch.dtype | None) -> None:
    """Layers that share it keep it once; PEFT makes each of them a float32 copy."""
    model = fast(stock(dtype=BF16, four_bit=four_bit))
    x = torch.randn(2, 512, 64).to(BF16)
    model.base_model.model.forward = layers(model)[0].forward
    output, narrowed, scales_and_sums = 1024 * 128 * 2, 1024 * 4 * 4, 4 * 128 * 4
    assert 0 < kept_bytes(model, x, autocast) <= output + narrowed + scales_and_sums


def test_an_adapter_without_dora_still_gets_its_input_cast(dora: Any) -> None:
    model = stock(dtype=BF16)
    ours = fast(model)
    for each in (model, ours):
        torch.manual_seed(3)
        each.add_adapter("plain", dora_config(use_dora=False))
        disturb(each)
    dora.install(ours)
    assert torch.allclose(ours(data()[0].to(BF16)), model(data()[0].to(BF16)), rtol=0.02, atol=0.02)
    for each in (model, ours):
        each.set_adapter("plain")
    assert torch.equal(ours(data()[0].to(BF16)), model(data()[0].to(BF16)))


def hidden_write(x: torch.Tensor) -> torch.Tensor:
    """What Unsloth's rotary kernel does to q: a new view of memory that it has overwritten without telling autograd."""
    return _HiddenWrite.apply(x)


class _HiddenWrite(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.data.mul_(-2.0)
        return x.view(x.shape)

    @staticmethod
    def backward(_ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return -2.0 * g


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("write", "same"), [(hidden_write, lambda x: -2.0 * x), (torch.sigmoid_, torch.sigmoid), (torch.tanh, torch.tanh)])
def test_outputs_may_be_overwritten(dora: Any, write: Any, same: Any, reentrant: bool | None) -> None:
    model = stock()
    model.base_model.model.between = same
    expected = [gradients(model, *data(seed)) for seed in range(3)]
    model = fast(model)
    model.base_model.model.between, model.base_model.model.reentrant = write, reentrant
    for seed in range(3):
        assert_like(gradients(model, *data(seed)), expected[seed])
    assert [v.intact for v in dora._installed(model)] == [write is same, True]


@pytest.mark.parametrize("overwritten", [0, 1])
def test_a_layer_used_twice_is_overwritten_once(overwritten: int) -> None:
    model = fast(stock())
    x, weights = data()
    expected = formula(model, torch.cat([x, x]), torch.cat([weights, weights]))
    for _ in range(3):
        model.zero_grad()
        losses = []
        for use in range(2):
            model.base_model.model.between = torch.tanh_ if use == overwritten else torch.tanh
            losses.append((model(x) * weights).sum())
        sum(losses).backward()
        for name, p in model.named_parameters():
            assert not p.requires_grad or torch.allclose(p.grad.double(), expected[name], rtol=1e-3, atol=1e-3), name


def test_several_adapters_keep_their_own_norms(dora: Any) -> None:
    model = stock()
    ours = fast(model)
    for each in (model, ours):
        torch.manual_seed(3)
        each.add_adapter("later", dora_config(r=8))
        each.add_adapter("plain", dora_config(use_dora=False))
        disturb(each)
    assert [dora.install(ours) for _ in range(2)] == [2, 2]
    for name in ("later", "default", "plain", "later"):
        for each in (model, ours):
            each.set_adapter(name)
        assert_like(gradients(ours, *data()), gradients(model, *data()))
    for each in (model, ours):
        each.base_model.set_adapter(["default", "later"])
    assert_like(gradients(ours, *data()), gradients(model, *data()))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit:UserWarning")
def test_disabling_merging_and_unmerging(four_bit: bool) -> None:
    model = stock(four_bit=four_bit)
    ours = fast(model)
    x = data()[0]
    with model.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), model(x))
    for do in ("merge_adapter", "unmerge_adapter", "merge_adapter", "unload"):
        for each in (model, ours):
            getattr(each, do)()
        assert torch.allclose(ours(x), model(x), atol=1e-5)
        if do == "unmerge_adapter":
            assert_exact(ours)


def test_a_saved_adapter_is_pefts_own(tmp_path: Path) -> None:
    from peft import PeftModel

    model = stock()
    ours = fast(model)
    fused_step(ours)
    assert ours.state_dict().keys() == model.state_dict().keys()
    ours.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert not any(type(v).__name__ == "KeptNormDora" for layer in layers(loaded) for v in layer.lora_variant.values())
    assert torch.allclose(loaded(data()[0]), ours(data()[0]), atol=1e-5)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_have_norms_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = fast(stock())
    assert_exact(model)
    other = copied(model)
    by_hand(other)
    for each in (other, model):
        assert_exact(each)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    assert_like(gradients(compiled, *data()), formula(other, *data()))


@pytest.mark.parametrize("four_bit", [False, True])
def test_compiled_layers_follow_optimiser_steps(computed: list[Any], four_bit: bool) -> None:
    ours = fast(stock(bias=True, four_bit=four_bit))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert_like(gradients(compiled, *data()), formula(ours, *data()))
        with torch.no_grad():
            assert torch.allclose(compiled(data()[0]), ours(data()[0]), atol=1e-5)
        fused_step(ours)
    assert len(computed) == 6


def test_layers_that_cannot_be_compiled_train_after_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where Unsloth has torch go on without the graphs that it cannot compile."""
    from torch._dynamo.backends.debugging import aot_eager

    def compiler(graph: Any, inputs: Any) -> Any:
        if any("dora_scales" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no kernel")
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._dynamo.config.suppress_errors", True)
    ours = fast(stock())
    compiled = torch.compile(ours, backend=compiler)
    with torch.inference_mode():
        compiled(data()[0])
    assert_like(gradients(compiled, *data()), formula(ours, *data()))


def test_four_bit_gradients_survive_an_evaluation() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first evaluation."""
    model = fast(stock(dtype=BF16, four_bit=True))
    x, weights = data()[0].to(BF16), data()[1]
    before = gradients(model, x, weights)
    with torch.no_grad():
        model.eval()(x)
    assert_like(gradients(model.train(), x, weights), before, 1e-12)


def test_four_bit_weights_that_are_repacked_already_are_an_error(dora: Any) -> None:
    model = stock(four_bit=True)
    layers(model)[0].get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="load the model again"):
        dora.install(model)


def test_other_kinds_of_layers_stay_pefts(dora: Any) -> None:
    from peft import get_peft_model

    net = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Conv1d(8, 8, 3), torch.nn.Linear(8, 8))
    model = get_peft_model(net, dora_config(target_modules=["0", "1", "2", "3"]))
    other = model.base_model.model[3]
    other.__class__ = type("GPTQLoraLinear", (type(other),), {})
    assert dora.install(model) == 1
    variants = [m.lora_variant["default"] for m in model.base_model.model]
    assert [type(v).__name__ for v in variants] == ["DoraEmbeddingVariant", "KeptNormDora", "DoraConv1dVariant", "DoraLinearVariant"]
    assert dora.install(model) == 1
    assert all(m.lora_variant["default"] is v for m, v in zip(model.base_model.model, variants, strict=True))


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = fast(stock())
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        x, weights = (t.chunk(2)[rank] for t in data())
        model.zero_grad()
        (parallel(x) * weights).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    torch.save({name: 2 * p.grad for name, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    # Forked, since each would take seconds to import what this process has.
    torch.multiprocessing.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    model = fast(stock())
    for _ in range(2):
        expected = gradients(model, *data())
        torch.optim.SGD([{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.005}]).step()
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(found.double(), expected[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_unsloths_model(dora: Any, tiny: Callable[..., RunConfig], method: str) -> None:
    """Six decoder layers with seven projections each; loss, gradients and generation equal PEFT's."""
    config = tiny("--method", method)
    model = attach(load_base(config)[0], config)
    disturb(model)
    ids = torch.arange(60).reshape(2, 30)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.inference_mode():
            tokens = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        model.train()
        found.append(({"y": loss.detach()} | {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}, tokens))
        assert dora.install(model) == 6 * 7
    assert len(found[0][0]) == 1 + 6 * 7 * 3
    for name, value in found[1][0].items():
        assert torch.allclose(value, found[0][0][name], rtol=1e-3, atol=1e-4 * float(found[0][0][name].norm())), name
    assert torch.equal(found[1][1], found[0][1])

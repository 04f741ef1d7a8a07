"""DoRA at LoRA's cost: PEFT's DoRA linear layers with the row norms kept between optimiser steps and one fused product.

DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) computes y = m / n * (W x + s B A x), n the row norms of W + s B A, which section 4.3
treats as constants in the backward pass. So n depends on weights alone: it is computed once per optimiser step, in float32, from the
rows of W + s B A themselves (expanding the square costs as much and loses its digits where W and s B A cancel). PEFT computes it in
every forward. A row of norm zero, for which PEFT gives NaN, has output zero (plus bias) and no gradient.

Stays PEFT's: parameters, saved files, merging, and layers other than Linear and Linear4bit. A layer returns its base
layer's dtype, also where PEFT's 4-bit DoRA returns float32 under autocast. Imports PEFT, so Unsloth comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import transpose
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

LAYERS = ("Linear", "Linear4bit")
# Numbers worked on at once in float32: what stays in a CPU's cache; on a GPU 128 MiB.
BLOCK, GPU_BLOCK = 2**18, 2**25
_steps = [0]
_handles = count()
_variants: WeakValueDictionary[int, KeptNormDora] = WeakValueDictionary()


def install(model: Any) -> int:
    """Puts every DoRA linear layer of a PEFT model on this path and returns how many there are; again after an adapter was added.

    Also keeps bitsandbytes from repacking NF4 weights for AVX512-BF16 CPUs at the first evaluation: gradients through the packed
    weights are wrong. Raises ValueError where that has happened already (the packing rounds the scales: it cannot be undone).
    """
    # Where Unsloth keeps Gemma 3's residuals in float32 there is no autocast, and its LoRA computes in float16 by itself; without this DoRA would not.
    dtype = torch.float16 if getattr(model, "_unsloth_forced_float32", False) else None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError("bitsandbytes has repacked this model's 4-bit weights in an evaluation; load the model again and install first")
        if isinstance(module, LoraLayer) and type(module).__name__ in LAYERS:
            for adapter, variant in module.lora_variant.items():
                if type(variant) is DoraLinearVariant:
                    module.lora_variant[adapter] = KeptNormDora(module, adapter, dtype)
            # PEFT would give each layer a wider copy of the input that q, k and v share. An adapter without DoRA needs that copy.
            module.cast_input_dtype_enabled = not all(isinstance(module.lora_variant.get(a), KeptNormDora) for a in module.lora_A)
    return len({variant.module() for variant in _installed(model)})


def refresh(model: Any) -> None:
    """Forgets the kept norms: needed only after writes that neither autograd nor a torch optimiser sees, such as `p.data.add_()`."""
    for variant in _installed(model):
        variant.kept = None


def _installed(model: Any) -> Iterator[KeptNormDora]:
    for module in model.modules():
        yield from (v for v in getattr(module, "lora_variant", {}).values() if isinstance(v, KeptNormDora))


def _count_step(*_: Any) -> None:
    """Fused and bitsandbytes optimisers leave Tensor._version as it is; a compiled step raises it itself."""
    if not torch.compiler.is_compiling():
        _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class KeptNormDora(DoraLinearVariant):  # type: ignore[misc]
    """One adapter of one layer. `kept` is (what the scales were computed from, weak references to its storages, the scales)."""

    def __init__(self, module: Any, adapter: str, dtype: Any = None) -> None:
        """`dtype`: in which products with the adapter's matrices are computed without autocast, by default in the matrices' own."""
        self.module, self.adapter, self.dtype = ref(module), adapter, dtype
        self.kept: tuple[Any, ...] | None = None
        # Whether the output is still as it was returned when the backward pass comes; None until the first one has looked.
        self.intact: bool | None = None
        handle = next(_handles)
        _variants[handle] = self
        # A tensor, since an integer would be a constant of the compiled graph and each layer a recompilation.
        self.handle = torch.tensor(handle)

    def __reduce__(self) -> Any:
        """A copied or unpickled layer starts anew."""
        return KeptNormDora, (self.module(), self.adapter, self.dtype)

    def forward(self, module: Any, active_adapter: str, x: Any, result: Any, **_: Any) -> Any:
        """The layer's output, in the base output's dtype. x: [..., in] as the layer got it; result: [..., out] of the base layer."""
        weights = self._weights(module)
        _, a, b, magnitude = weights
        if torch.compiler.is_compiling():
            scales, layer = torch.ops.kit.dora_scales(self.handle, [w.detach() for w in weights[1:]]).unbind(), None
        else:
            scales, layer = self.scales(module, weights), self
        base, dropout, bias = result, module.lora_dropout[active_adapter], module.get_base_layer().bias
        dropping = module.training and not isinstance(dropout, torch.nn.Identity)
        if dropping:
            # As PEFT: the base product that is scaled sees the dropped input, the other one does not.
            x = dropout(x.to(a.dtype)).to(self.dtype or a.dtype)
            base = _base_product(module, x).to(scales[0].dtype)
        # A bias is taken off and added in float32: the product is kept apart from it, where no bias can swallow a small one.
        product = base if bias is None else base.to(scales[0].dtype) - bias
        dtype = self._computing(x, a)
        if torch.is_grad_enabled():
            out = _Product.apply(product, x, a, b, magnitude, *scales, module.scaling[active_adapter], dtype, layer)
        else:
            out = torch.addcmul(linear(linear(x.to(dtype), a.to(dtype)), b.to(dtype)) * scales[2], product, scales[0])
        out = out if bias is None else out + bias
        return (result - base + out if dropping else out).to(result.dtype)

    def _computing(self, x: Any, a: Any) -> Any:
        """The dtype of products with the adapter's matrices: autocast's, the one that was asked for or, as PEFT does, the matrices' own."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype or a.dtype

    def _weights(self, module: Any) -> list[Any]:
        """W, A, B and m."""
        adapters = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
        return [module.get_base_layer().weight, *(each[self.adapter].weight for each in adapters)]

    # Where a layer around it cannot be compiled torch would compile this alone, and what it makes in an evaluation would serve no training.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def scales(self, module: Any, weights: list[Any]) -> Any:
        """Three [out] tensors in float32 or wider: m / n, what turns the gradient of the scaled product into that of m, and s m / n."""
        key = [_steps[0], module.scaling[self.adapter], *((0 if w.is_inference() else w._version, w.data_ptr()) for w in weights)]
        # An address may be given to other weights once its storage is gone.
        if self.kept is None or self.kept[0] != key or any(storage.expired() for storage in self.kept[1]):
            self.kept = key, [StorageWeakRef(w.untyped_storage()) for w in weights], _scales(module, module.scaling[self.adapter], *weights[1:])
        return self.kept[2]

    def checked(self, out: Any, sums: Any, again: Any) -> Any:
        """The output as the first backward pass needs it: computed again if a kernel has overwritten it since."""
        same = torch.equal(_sums(out), sums)
        self.intact = same and self.intact is not False
        return out if same else again(self.module())


@torch.library.custom_op("kit::dora_scales", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))  # type: ignore[untyped-decorator]
def _compiled_scales(handle: torch.Tensor, _weights: list[torch.Tensor]) -> torch.Tensor:
    """KeptNormDora.scales as a compiled graph calls it: looked up when the graph runs, and copied since the graph may write to it."""
    variant = _variants[int(handle)]
    module = variant.module()
    return torch.stack(variant.scales(module, variant._weights(module)))


@_compiled_scales.register_fake  # type: ignore[untyped-decorator]
def _(_handle: Any, weights: Any) -> Any:
    return weights[-1].new_empty((3, *weights[-1].shape), dtype=torch.promote_types(weights[-1].dtype, torch.float32))


def _scales(module: Any, scaling: float, a: Any, b: Any, magnitude: Any) -> Any:
    # Also in inference mode: what is kept serves later training. Autocast leaves operations in place alone.
    with torch.inference_mode(False), torch.no_grad():
        dtype = torch.promote_types(magnitude.dtype, torch.float32)
        a, b, m = a.to(dtype), b.to(dtype), magnitude.to(dtype)
        weight = _weight(module)
        norm = torch.cat([torch.linalg.vector_norm(w.to(dtype, copy=True).addmm_(rows, a, alpha=scaling), dim=1) for w, rows in _blocks(weight, b)])
        # The backward pass divides by the scale: a smaller one, or zero, stands as one rounding unit.
        unit = torch.full_like(m, torch.finfo(dtype).eps)
        scale = torch.where(m.abs() < unit * norm, torch.copysign(unit, m), m / norm)
        return [torch.where(norm > 0, t, 0.0) for t in (scale, 1 / (scale * (scale * norm)), scaling * scale)]


def _base_product(module: Any, x: Any) -> Any:
    """The base layer's output for an input that may be wider than what the layer computes in; then, as PEFT's, not rounded to that."""
    base = module.get_base_layer()
    own = getattr(base, "compute_dtype", None) or base.weight.dtype
    if own.itemsize < x.dtype.itemsize and not torch.is_autocast_enabled(x.device.type):
        return linear(x, _weight(module).to(x.dtype), base.bias) if torch.compiler.is_compiling() else _Wide.apply(x, module)
    return base(x.to(own))


def _weight(module: Any) -> Any:
    return transpose(peft_dora.dequantize_module_weight(module.get_base_layer()), module.fan_in_fan_out)


class _Wide(torch.autograd.Function):
    """The base layer's product in the dtype of its input; the backward pass makes the wide weights again rather than keep them."""

    @staticmethod
    def forward(ctx: Any, x: Any, module: Any) -> Any:
        ctx.module, bias = module, module.get_base_layer().bias
        return linear(x, _weight(module).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Any) -> Any:
        return g @ _weight(ctx.module).to(g.dtype), None


def _rows(tensor: Any) -> Any:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(*tensors: Any) -> Iterable[Any]:
    """Tensors [rows, ...], the widest first, a block of rows at a time; all rows in a compiled graph, which makes blocks of its own."""
    first = tensors[0]
    size = max(1, (BLOCK if first.device.type == "cpu" else GPU_BLOCK) // first.shape[1])
    if torch.compiler.is_compiling() or len(first) <= size:
        return [tensors]
    return zip(*(t.split(size) for t in tensors), strict=True)


def _widened(tensor: Any, scale: Any) -> Any:
    """On a CPU, arithmetic between dtypes, and products this thin in 16 bits, are slower than a cast; a GPU casts as it reads."""
    return tensor.to(scale.dtype) if tensor.device.type == "cpu" else tensor


def _sums(out: Any) -> Any:
    return _rows(out).sum(0, dtype=torch.promote_types(out.dtype, torch.float32))


def _product(base: Any, xa: Any, b: Any, scale: Any, factor: Any) -> Any:
    """[..., out]: scale * base + factor * xa B, in the dtype of base."""
    xa = _widened(xa, scale)
    b = (b * factor[:, None]).to(xa.dtype)
    out = base.new_empty(base.shape)
    for to, rows, low in _blocks(_rows(out), _rows(base), _rows(xa)):
        if out.device.type == "cpu" and out.dtype != scale.dtype:
            to.copy_((rows.to(scale.dtype) * scale).addmm_(low, b.T))
        else:
            torch.addcmul(linear(low, b), rows, scale, out=to)
    return out


class _Product(torch.autograd.Function):
    """_product with a backward pass that needs what LoRA's needs, and the output, which the next operation mostly keeps anyway.

    The gradient of m is sum_t g_t z_t / n with z = W x + s B A x = output / scale. Kernels that overwrite their input behind autograd's
    back (Unsloth's rotary embedding does so to q and k, Liger's to gate and up) would spoil it: the first backward pass of a layer
    compares column sums, and a layer whose output is overwritten keeps a copy from then on.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Any, x: Any, a: Any, b: Any, _magnitude: Any, scale: Any, inverse: Any, factor: Any, scaling: float, dtype: Any, layer: Any
    ) -> Any:
        narrow = x.to(dtype)
        xa = linear(narrow, a.to(dtype))
        x = narrow if narrow.dtype.itemsize < x.dtype.itemsize else x
        out = _product(base, xa, b, scale, factor)
        ctx.scaling, ctx.layer = scaling, layer if layer is not None and layer.intact is None else None
        # Of the same shapes either way, for the recomputation under checkpointing. `data` is not version-checked: the layer itself looks.
        ctx.save_for_backward(x, xa, a, b, scale, inverse, factor, *((out, scale) if ctx.layer is None else (out.data, _sums(out))))
        return out.clone() if layer is not None and layer.intact is False else out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Any) -> Any:
        x, xa, a, b, scale, inverse, factor, out, sums = ctx.saved_tensors
        if ctx.layer is not None:
            out = ctx.layer.checked(out, sums, lambda module: _product(_base_product(module, x), xa, b, scale, factor))
        a, lows, to_base = a.to(xa.dtype), _widened(_rows(xa), scale), g.new_empty(g.shape)
        b, to_xa = b.to(lows.dtype), torch.empty_like(lows)
        to_b, to_magnitude = lows.new_zeros(lows.shape[1], len(scale)), torch.zeros_like(scale)
        for to, rows, kept, low, to_low in _blocks(_rows(to_base), _rows(g), _rows(out), lows, to_xa):
            scaled = _widened(rows, scale) * scale
            to.copy_(scaled)
            narrow = to if to.dtype == low.dtype else scaled.to(low.dtype)
            torch.mm(narrow, b, out=to_low)
            to_b.addmm_(low.T, narrow)
            to_magnitude.add_(scaled.mul_(_widened(kept, scale)).sum(0))
        to_xa = (to_xa * ctx.scaling).to(xa.dtype)
        to_x = (to_xa @ a).reshape(x.shape) if ctx.needs_input_grad[1] else None
        return to_base, to_x, to_xa.T @ _rows(x).to(to_xa.dtype), to_b.T * ctx.scaling, to_magnitude * inverse, None, None, None, None, None, None

"""The modules of a model on the tape: linear layers as transformers, bitsandbytes and PEFT run them, norms and embeddings.

Legend: M rows (tokens) of a product, n elements of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.inventory import ModuleKind
from estimator.operators import (
    add,
    cast,
    clone,
    custom,
    dropout,
    embedding,
    layer_norm,
    linear,
    mean,
    multiply,
    promoted,
    relaid,
    rsqrt,
    scale,
    square,
    transposed,
    with_rows,
)
from estimator.recipe import Quantization, QuantizationKind, Recipe
from estimator.storage import StoredTensor
from estimator.tape import Gradients, Node, Parameter, Tape, Value
from estimator.units import ceil_div

# Multiplies by its transposed weight and then adds the bias. Source: transformers, models/falcon/modeling_falcon.py, FalconLinear.forward.
_FALCON_LINEAR = "FalconLinear"
_TRAINED_TOKENS = "trainable_tokens_delta"
_BLOCK = 64  # weights per absmax; BitsAndBytesConfig offers no other


@dataclass(frozen=True, slots=True)
class Modules:
    """Some modules of a model, by their names relative to `prefix`."""

    tape: Tape
    prefix: str
    """Makes parameter names unique: `model.layers.0.`."""
    tensors: Mapping[str, StoredTensor]
    """`self_attn.q_proj.weight` → what is stored."""
    recipe: Recipe

    def has(self, name: str) -> bool:
        return name in self.tensors

    def parameter(self, name: str) -> Parameter:
        """The stored tensor `name` as a leaf of the graph, or the copy of it that PEFT trains in its place (`modules_to_save`)."""
        module, _, leaf = name.rpartition(".")
        copied = f"{module}.modules_to_save.{leaf}"
        stored = self.tensors.get(copied) or self.tensors[name]
        # Tied modules share one leaf, which is known by where the tensor is stored.
        known = self.prefix + name if "{}" in stored.pattern else stored.pattern
        return Parameter(self.tape, known, stored.num_elements, stored.dtype, stored.trainable)

    def optional(self, name: str) -> Parameter | None:
        return self.parameter(name) if name in self.tensors else None

    # -- embeddings -----------------------------------------------------------------------------------------------------------------

    def embedding(self, name: str, extent: Extent, *, scaled: bool = False) -> Value:
        """An embedding with its adapter, if it has one.

        Args:
            scaled: whether the module multiplies what it looks up by a number; what an adapter adds is then multiplied too.

        Source: peft, tuners/lora/layer.py, Embedding.forward; tuners/trainable_tokens/layer.py, TrainableTokensLayer.forward_adapters.
        """
        outer, self.tape.scope = self.tape.scope, name
        weight: Value = self.parameter(f"{name}.weight")
        if self.has(f"{name}.{_TRAINED_TOKENS}"):
            weight = self._with_trained_tokens(name, weight)
        result = embedding(weight, extent)
        if scaled:
            result = scale(result)
        if self.has(f"{name}.lora_embedding_A"):
            result = self._adapted_embedding(name, result, extent, scaled=scaled)
        self.tape.scope = outer
        return result

    def _adapted_embedding(self, name: str, result: Value, extent: Extent, *, scaled: bool) -> Value:
        if self._has_magnitude(name):
            raise NotImplementedError("DoRA on embeddings")
        width = self.tensors[f"{name}.weight"].shape[1]
        a, b = self.parameter(f"{name}.lora_embedding_A"), self.parameter(f"{name}.lora_embedding_B")
        rank = b.extent.coefficient // width
        looked_up = embedding(relaid(a), extent.scaled(rank, width))
        added = scale(linear(looked_up, transposed(b), None, rank, width))
        if scaled:
            added = scale(added)
        return cast(add(result, added), result.dtype)

    def _with_trained_tokens(self, name: str, weight: Value) -> Value:
        """`trainable_token_indices`: a copy of the whole weight with the trained rows put in."""
        rows = cast(self.parameter(f"{name}.{_TRAINED_TOKENS}"), weight.dtype)
        return with_rows(weight, rows)

    # -- linear layers --------------------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Value) -> Value:
        """A linear layer with its adapter, if it has one."""
        outer, self.tape.scope = self.tape.scope, name
        result = self._linear(name, x)
        self.tape.scope = outer
        return result

    def _linear(self, name: str, x: Value) -> Value:
        if self.has(f"{name}.{_TRAINED_TOKENS}"):
            return linear(x, self._with_trained_tokens(name, self.parameter(f"{name}.weight")), None, *self.sizes(name))
        if f"{name}.lora_A.weight" not in self.tensors:
            return self._base(name, x)
        if self.tensors[f"{name}.weight"].quantization is None:
            return self._lora_on_plain(name, x)
        return self._lora_on_quantized(name, x)

    def sizes(self, name: str) -> tuple[int, int]:
        """(in, out) of a linear layer; Conv1D stores them the other way round."""
        stored = self.tensors[f"{name}.weight"]
        first, second = stored.shape
        return (first, second) if stored.module_kind is ModuleKind.CONV1D else (second, first)

    def _base(self, name: str, x: Value) -> Value:
        stored = self.tensors[f"{name}.weight"]
        fan_in, fan_out = self.sizes(name)
        quantization = self.recipe.quantization
        if (stored.quantization is None or quantization is None) and stored.module_class == _FALCON_LINEAR:
            product = linear(x, transposed(self.parameter(f"{name}.weight")), None, fan_in, fan_out)
            bias = self.optional(f"{name}.bias")
            return product if bias is None else add(product, bias)
        if stored.quantization is None or quantization is None:
            return linear(x, self.parameter(f"{name}.weight"), self.optional(f"{name}.bias"), fan_in, fan_out)
        is_8bit = stored.quantization is QuantizationKind.INT8
        follows_input = is_8bit or self.recipe.stack.linear_4bit_casts_bias_to_input
        bias = self._cast_bias(name, x.dtype if follows_input else quantization.compute_dtype)
        if is_8bit:
            return linear_8bit(x, fan_in, fan_out, bias=bias)
        if self.tape.few_rows and self.tape.cuda_kernels and fan_in % _BLOCK == 0:
            return fused_4bit(x, fan_in, fan_out, quantization, unpacks_scales=self.recipe.stack.fused_4bit_unpacks_scales)
        keeps_input = self.recipe.stack.linear_4bit_keeps_input
        return linear_4bit(x, fan_in, fan_out, quantization, self.recipe.dtype, bias=bias, keeps_input=keeps_input)

    def _cast_bias(self, name: str, dtype: DType) -> Parameter | None:
        """The bias of a quantized layer: `self.bias.data = self.bias.data.to(…)` leaves it in the type of its last use, for good.

        Source: bitsandbytes, nn/modules.py, Linear4bit.forward and Linear8bitLt.forward.
        """
        stored = self.tensors.get(f"{name}.bias")
        if stored is None:
            return None
        self.tape.recast[stored.pattern] = dtype
        return Parameter(self.tape, f"{self.prefix}{name}.bias", stored.num_elements, dtype, stored.trainable)

    def _branch(self, name: str, x: Value) -> Value:
        """The adapter's path: dropout, A, B, scaling."""
        adapter = self.recipe.adapter
        assert adapter is not None
        fan_in, fan_out = self.sizes(name)
        a, b = self.parameter(f"{name}.lora_A.weight"), self.parameter(f"{name}.lora_B.weight")
        rank = a.extent.coefficient // fan_in
        bias = self.optional(f"{name}.lora_B.bias")
        return scale(linear(linear(dropout(x, adapter.dropout), a, None, fan_in, rank), b, bias, rank, fan_out))

    def _adapter_dtype(self, name: str) -> DType:
        return self.tensors[f"{name}.lora_A.weight"].dtype

    def _lora_on_plain(self, name: str, x: Value) -> Value:
        """Source: peft, tuners/lora/layer.py, Linear.forward: the input is cast to the adapter's type, under autocast too."""
        result = self._base(name, x)
        dtype = result.dtype
        converted = cast(x, self._adapter_dtype(name))
        adapted = self._dora(name, converted, result) if self._has_magnitude(name) else add(result, self._branch(name, converted))
        return cast(adapted, dtype)

    def _lora_on_quantized(self, name: str, x: Value) -> Value:
        """Source: peft, tuners/lora/bnb.py, Linear4bit.forward (which clones the base result) and Linear8bitLt.forward."""
        result = self._base(name, x)
        if self.tensors[f"{name}.weight"].quantization is not QuantizationKind.INT8:
            result = clone(result)
        if self._has_magnitude(name):
            converted = x if self.tape.autocast_enabled else cast(x, self._adapter_dtype(name))
            adapted = self._dora(name, converted, result)
            return adapted if self.tape.autocast_enabled else cast(adapted, result.dtype)
        if self.tape.autocast_enabled:
            output = self._branch(name, x)
        else:
            converted = cast(x, self._adapter_dtype(name))
            output = self._branch(name, converted)
            output = cast(output, result.dtype)
        return add(result, output)

    def _has_magnitude(self, name: str) -> bool:
        return f"{name}.lora_magnitude_vector.weight" in self.tensors

    def _dora(self, name: str, x: Value, result: Value) -> Value:
        """The weight's norm is computed from the whole weight at each call; results are scaled column by column.

        With dropout the base product is repeated on the dropped input, with the unpacked weight.

        Source: peft, tuners/lora/variants.py, DoraLinearVariant.forward; tuners/lora/dora.py, DoraLinearLayer.forward.
        """
        adapter = self.recipe.adapter
        assert adapter is not None
        base = result if adapter.dropout == 0.0 else None
        dropped = dropout(x, adapter.dropout)
        return add(result, self._dora_difference(name, dropped, base))

    def _dora_difference(self, name: str, x: Value, base: Value | None) -> Value:
        fan_in, fan_out = self.sizes(name)
        a, b = self.parameter(f"{name}.lora_A.weight"), self.parameter(f"{name}.lora_B.weight")
        rank = a.extent.coefficient // fan_in
        product = self._adapter_product(a, b, fan_in, rank, fan_out)
        product = cast(product, x.dtype)
        weight = cast(self._unpacked(name), x.dtype)
        norm = self._column_norm(weight, fan_out)
        magnitude = _quotient(self.parameter(f"{name}.lora_magnitude_vector.weight"), norm)
        low_rank = linear(linear(x, a, None, fan_in, rank), b, None, rank, fan_out)
        if base is None:
            base = linear(x, weight, None, fan_in, fan_out)
        scaled_base = multiply(add_number(magnitude), base)
        difference = add(scaled_base, scale(multiply(magnitude, low_rank)))
        del product, scaled_base
        return difference

    def _adapter_product(self, a: Parameter, b: Parameter, fan_in: int, rank: int, fan_out: int) -> Value:
        """B·A, by sending the unit matrix through both."""
        eye = self.tape.new(Extent(fan_in * fan_in), a.dtype)
        return linear(linear(eye, a, None, fan_in, rank), b, None, rank, fan_out)

    def _unpacked(self, name: str) -> Value:
        """Source: peft, utils/integrations.py, dequantize_bnb_weight."""
        stored = self.tensors[f"{name}.weight"]
        if stored.quantization is None:
            return self.parameter(f"{name}.weight")
        dtype = DType.FLOAT32 if stored.quantization is QuantizationKind.INT8 else self.recipe.dtype
        return self.tape.new(Extent(stored.num_elements), dtype)

    def _column_norm(self, weight: Value, fan_out: int) -> Value:
        """`linalg.norm(weight + scaling * product)`: float32 under autocast."""
        tape = self.tape
        scaled = tape.new(weight.extent, weight.dtype)
        total = tape.new(weight.extent, weight.dtype)
        del scaled
        converted = tape.new(total.extent, DType.FLOAT32) if tape.autocast_enabled and total.dtype.is_half else total
        norm = tape.new(Extent(fan_out), weight.dtype)
        del total, converted
        return norm

    # -- norms ----------------------------------------------------------------------------------------------------------------------

    def rms_norm(self, name: str, x: Value, width: int) -> Value:
        """The root-mean-square norm of Llama and most others: float32 inside, then the input's type, then the weight.

        Source: transformers, models/llama/modeling_llama.py, LlamaRMSNorm.
        """
        outer, self.tape.scope = self.tape.scope, name
        before = x.dtype
        hidden = cast(x, DType.FLOAT32)
        variance = mean(square(hidden), width)
        hidden = multiply(hidden, rsqrt(add_number(variance)))
        self.tape.scope = outer
        return multiply(self.parameter(f"{name}.weight"), cast(hidden, before))

    def layer_norm(self, name: str, x: Value, width: int) -> Value:
        return layer_norm(x, self.parameter(f"{name}.weight"), self.optional(f"{name}.bias"), width)


def _quotient(x: Value, divisor: Value) -> Value:
    """`x / divisor` with a constant divisor, which is saved."""

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(gradient.extent, gradient.dtype)
        del saved
        return [result]

    return custom([x], x.extent, promoted(x.dtype, divisor.dtype), backward, saved=[divisor])


def add_number(x: Value) -> Value:
    """`x + number`: a new tensor, the gradient passes through."""
    return clone(x)


# -- quantized linear layers ------------------------------------------------------------------------------------------------------------


def linear_4bit(
    x: Value,
    fan_in: int,
    fan_out: int,
    quantization: Quantization,
    weight_dtype: DType,
    *,
    bias: Value | None = None,
    keeps_input: bool = False,
) -> Value:
    """`bitsandbytes.nn.Linear4bit`: nothing but the packed weight is kept; the weight is unpacked forward (many rows) and backward
    (always).

    Args:
        weight_dtype: type of the weight when it was quantized: what the backward pass unpacks to before it casts.
        keeps_input: whether the input (in the compute type) hangs on the context of the autograd function.

    Source: bitsandbytes, nn/modules.py, Linear4bit.forward; autograd/_functions.py, MatMul4Bit; backends/cuda/ops.py,
    _dequant_linear_fallback.
    """
    before = x.dtype
    tape = x.tape
    argument = cast(x, quantization.compute_dtype)
    extent = argument.extent
    weight = Extent(fan_in * fan_out)
    inputs = [argument] if bias is None else [argument, bias]
    num_inputs = len(inputs)
    scales = Extent(ceil_div(fan_in * fan_out, _BLOCK))

    def backward(node: Node, gradient: Value) -> Gradients:
        bias_gradient = _bias_gradient(bias, gradient)
        nested = tape.new(scales, DType.FLOAT32) if quantization.double_quant else None
        unpacked = tape.new(weight, weight_dtype)
        del nested
        converted = unpacked if gradient.dtype is weight_dtype else tape.new(weight, gradient.dtype)
        del unpacked
        result = tape.new(extent, gradient.dtype)
        del converted
        return [result, bias_gradient][:num_inputs]

    nested = [tape.new(scales, DType.FLOAT32) for _ in range(2)] if quantization.double_quant else []
    unpacked = tape.new(weight, argument.dtype)
    dtype = argument.dtype
    lowered: list[Value] = []
    if tape.autocast_enabled and tape.autocast_dtype is not None and dtype is not tape.autocast_dtype:
        # The product inside is one more F.linear, which autocast lowers whatever the compute type is.
        dtype = tape.autocast_dtype
        lowered = [tape.new(e, dtype) for e in (extent, weight)]
    stash = [argument] if keeps_input and argument.requires_grad else []
    y = custom(inputs, extent.scaled(fan_out, fan_in), dtype, backward, stash=stash)
    del nested, unpacked, lowered
    return cast(y, before)


def fused_4bit(x: Value, fan_in: int, fan_out: int, quantization: Quantization, *, unpacks_scales: bool) -> Value:
    """`bitsandbytes.nn.Linear4bit` on few rows, without gradients: the kernel reads packed weights and adds the bias.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, _gemm_4bit_kernel_impl; 0.49, functional.py, gemv_4bit.
    """
    before = x.dtype
    argument = cast(x, quantization.compute_dtype)
    scales = Extent(ceil_div(fan_in * fan_out, _BLOCK))
    nested = [x.tape.new(scales, DType.FLOAT32) for _ in range(2)] if quantization.double_quant and unpacks_scales else []
    y = x.tape.new(argument.extent.scaled(fan_out, fan_in), argument.dtype)
    del nested
    return cast(y, before)


def _bias_gradient(bias: Value | None, gradient: Value) -> Value | None:
    """Summed over the batch alone; autograd then sums what is left, since it does not have the bias's shape.

    Source: bitsandbytes, autograd/_functions.py, MatMul4Bit.backward and MatMul8bitLt.backward.
    """
    if bias is None or bias.node is None:
        return None
    return bias.tape.new(Extent(bias.extent.coefficient, 0, gradient.extent.sequence), bias.dtype)


def linear_8bit(x: Value, fan_in: int, fan_out: int, *, bias: Value | None = None) -> Value:
    """`bitsandbytes.nn.Linear8bitLt` without outliers: keeps its input on the context of its autograd function.

    Source: bitsandbytes, autograd/_functions.py, MatMul8bitLt; backends/cuda/ops.py, int8_vectorwise_quant; backends/default/ops.py,
    int8_scaled_mm.
    """
    tape = x.tape
    extent, dtype = x.extent, x.dtype
    rows = extent.scaled(1, fan_in)
    result = extent.scaled(fan_out, fan_in)
    weight = Extent(fan_in * fan_out)

    inputs = [x] if bias is None else [x, bias]
    num_inputs = len(inputs)

    def backward(node: Node, gradient: Value) -> Gradients:
        bias_gradient = _bias_gradient(bias, gradient)
        unpacked = tape.new(weight, dtype)
        converted = gradient if gradient.dtype is dtype else tape.new(gradient.extent, dtype)
        grad = tape.new(extent, dtype).reshaped()
        del unpacked, converted
        return [grad, bias_gradient][:num_inputs]

    half = x if dtype is DType.FLOAT16 else tape.new(extent, DType.FLOAT16)
    quantized, row_scales = tape.new(extent, DType.INT8), tape.new(rows, DType.FLOAT32)
    magnitudes = tape.new(extent, DType.FLOAT16)
    outliers = tape.new(extent, DType.BOOL)
    del magnitudes, outliers, half
    accumulated = tape.new(result, DType.INT32)
    product = None if dtype is DType.FLOAT16 else tape.new(result, DType.FLOAT16)
    y = custom(inputs, result, dtype, backward, stash=[x] if x.requires_grad else [])
    del quantized, row_scales, accumulated, product
    return y

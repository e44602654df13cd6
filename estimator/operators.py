"""PyTorch's operators as far as memory goes: what each returns, saves for the backward pass, and allocates there.

Unless a docstring says otherwise the rules are those of torch, tools/autograd/derivatives.yaml (the inputs that a formula names are
saved) and autograd/FunctionsManual.cpp; casts under autocast follow ATen/autocast_mode.h.

Legend: B micro-batch, S sequence length, T = B·S tokens, d head size.
"""

from collections.abc import Callable, Sequence

from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.phases import Item
from estimator.tape import Backward, Gradients, Leaf, Node, Value

_WIDTH_ORDER = (DType.BOOL, DType.INT64, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32, DType.FLOAT64)


def promoted(first: DType, second: DType) -> DType:
    """Type of the result of two tensors. bfloat16 with float16 gives float32."""
    if first is second:
        return first
    if first.is_half and second.is_half:
        return DType.FLOAT32
    return max(first, second, key=_WIDTH_ORDER.index)


def _larger(first: Extent, second: Extent) -> Extent:
    return max(first, second, key=lambda e: (e.batch, e.sequence + e.keys, e.coefficient))


# -- casts ------------------------------------------------------------------------------------------------------------------------------


def cast(x: Value, dtype: DType) -> Value:
    """`x.to(dtype)`: nothing where the type is right already."""
    if x.dtype is dtype:
        return x
    before = x.dtype

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(gradient.extent, before)]

    node = x.tape.node([x], backward)
    y = x.tape.new(x.extent, dtype)
    y.node = node
    return y


def lower_precision(x: Value) -> Value:
    """What autocast does to the arguments of matrix products.

    The cast of a float32 leaf that is trained is kept until autocast ends; that of a frozen one is made at each use.

    Source: torch, ATen/autocast_mode.cpp, cached_cast.
    """
    tape = x.tape
    dtype = tape.autocast_dtype
    if not tape.autocast_enabled or dtype is None or x.dtype is dtype:
        return x
    if x.dtype is not DType.FLOAT32 or not isinstance(x.node, Leaf):
        return cast(x, dtype)
    if x.node.name not in tape.autocast_cache:
        with tape.recording():
            tape.autocast_cache[x.node.name] = cast(x, dtype)
    return tape.autocast_cache[x.node.name]


def all_lower_precision(*values: Value | None) -> list[Value]:
    """What autocast does to all arguments of a call: the last is cast first, in the order in which GCC evaluates them.

    Source: torch, ATen/autocast_mode.h, WrapFunction_ (`(*F)(cached_cast(…)...)`).
    """
    return [lower_precision(x) for x in reversed(values) if x is not None][::-1]


def full_precision(x: Value) -> Value:
    """What autocast does to the arguments of norms, softmax, pow, rsqrt and their like."""
    return cast(x, DType.FLOAT32) if x.tape.autocast_enabled and x.dtype.is_half else x


# -- element by element -----------------------------------------------------------------------------------------------------------------


def _unary(x: Value, *, saves_input: bool) -> Value:
    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(gradient.extent, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward, [x] if saves_input else [])
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def negate(x: Value) -> Value:
    """`-x`"""
    return _unary(x, saves_input=False)


def scale(x: Value) -> Value:
    """`x * number`"""
    return _unary(x, saves_input=False)


def clone(x: Value) -> Value:
    """`x.clone()`: the gradient passes through."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def alias(x: Value) -> Value:
    """The same storage under another node."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.view()
    y.node = node
    return y


def clamp(x: Value) -> Value:
    """`x.clamp(…)`: saves its input; the backward pass compares before it selects."""

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        tape = gradient.tape
        inside = tape.new(gradient.extent, DType.BOOL)
        result = tape.new(gradient.extent, gradient.dtype)
        del saved, inside
        return [result]

    node = x.tape.node([x], backward, [x])
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def masked_fill(x: Value, mask: Value) -> Value:
    """`x.masked_fill(mask, number)`: saves the mask."""

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(gradient.extent, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward, [mask])
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def clamp_in_place(x: Value) -> Value:
    """`x.clamp_(…)`: the backward pass needs what was there before, so a copy of it is saved first."""

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        tape = gradient.tape
        inside = [tape.new(gradient.extent, DType.BOOL) for _ in range(3)]
        result = tape.new(gradient.extent, gradient.dtype)
        del saved, inside
        return [result]

    before = x.tape.new(x.extent, x.dtype) if x.requires_grad and x.tape.grad_enabled else None
    node = x.tape.node([x], backward, [] if before is None else [before])
    y = x.view()
    y.node = node
    return y


def activation(x: Value) -> Value:
    """`silu`, `gelu` (exact or tanh), `relu`-like functions that save their input."""
    return _unary(x, saves_input=True)


def _times_output(node: Node, gradient: Value) -> Gradients:
    saved = node.unpacked()
    result = gradient.tape.new(gradient.extent, gradient.dtype)
    del saved
    return [result]


def saving_output(x: Value, backward: Callable[[Node, Value], Gradients] = _times_output) -> Value:
    """`tanh`, `relu`, `sigmoid`, `exp`: functions that save their result."""
    node = x.tape.node([x], backward)
    y = x.tape.new(x.extent, x.dtype)
    x.tape.save_output(node, y)
    y.node = node
    return y


def add(x: Value, y: Value) -> Value:
    """`x + y`, also with mixed types: no copy is made of either."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(), gradient.view()]

    node = x.tape.node([x, y], backward)
    z = x.tape.new(_larger(x.extent, y.extent), promoted(x.dtype, y.dtype))
    z.node = node
    return z


def add_in_place(x: Value, y: Value) -> Value:
    """`x += y`: the sum takes the place of `x`."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(), gradient.view()]

    return Value(x.tape, x.extent, x.dtype, x.storage, x.tape.node([x, y], backward))


def subtract(x: Value, y: Value) -> Value:
    """`x - y`: the gradient of `y` is a negated copy."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(), gradient.tape.new(gradient.extent, gradient.dtype)]

    node = x.tape.node([x, y], backward)
    z = x.tape.new(_larger(x.extent, y.extent), promoted(x.dtype, y.dtype))
    z.node = node
    return z


def multiply(x: Value, y: Value) -> Value:
    """`x * y`: each is saved if the other is trained."""
    x_trained, y_trained = x.requires_grad, y.requires_grad
    saved = ([y] if x_trained else []) + ([x] if y_trained else [])

    def backward(node: Node, gradient: Value) -> Gradients:
        others = node.unpacked()
        tape = gradient.tape
        results: list[Value | None] = [None, None]
        if x_trained:
            results[0] = tape.new(gradient.extent, promoted(gradient.dtype, others[0].dtype))
        if y_trained:
            results[1] = tape.new(gradient.extent, promoted(gradient.dtype, others[-1].dtype))
        return results

    node = x.tape.node([x, y], backward, saved)
    z = x.tape.new(_larger(x.extent, y.extent), promoted(x.dtype, y.dtype))
    z.node = node
    return z


def power(x: Value) -> Value:
    """`x.pow(n)`; the backward formula makes `x.pow(n - 1)` and its n-fold before the result."""
    x = full_precision(x)

    def backward(node: Node, gradient: Value) -> Gradients:
        (saved,) = node.unpacked()
        tape = gradient.tape
        lower = tape.new(saved.extent, saved.dtype)
        multiple = tape.new(saved.extent, saved.dtype)
        result = tape.new(saved.extent, promoted(gradient.dtype, saved.dtype))
        del lower, multiple
        return [result]

    node = x.tape.node([x], backward, [x])
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def square(x: Value) -> Value:
    """`x.pow(2)`"""
    return power(x)


def mean(x: Value, width: int) -> Value:
    """Mean over the last dimension of `width`, kept as 1."""
    extent = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(extent, gradient.dtype)]

    node = x.tape.node([x], backward)
    y = x.tape.new(extent.scaled(1, width), x.dtype)
    y.node = node
    return y


def rsqrt(x: Value) -> Value:
    """`torch.rsqrt(x)`: saves its result, of which the backward formula makes the cube, and −½ of the gradient, before it multiplies."""

    def backward(node: Node, gradient: Value) -> Gradients:
        (saved,) = node.unpacked()
        tape = gradient.tape
        half = tape.new(gradient.extent, gradient.dtype)
        cube = tape.new(saved.extent, saved.dtype)
        result = tape.new(gradient.extent, promoted(gradient.dtype, saved.dtype))
        del saved, half, cube
        return [result]

    return saving_output(full_precision(x), backward)


def dropout(x: Value, probability: float) -> Value:
    """On CUDA the mask is one byte an element; with probability 0, and outside training, nothing happens.

    Source: torch, ATen/native/Dropout.cpp, is_fused_kernel_acceptable; derivatives.yaml, native_dropout.
    """
    if probability == 0.0 or not x.tape.training:
        return x

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(gradient.extent, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward)
    y = x.tape.new(x.extent, x.dtype)
    mask = x.tape.new(x.extent, DType.BOOL)
    x.tape.save_output(node, mask)
    y.node = node
    return y


# -- parts and joins --------------------------------------------------------------------------------------------------------------------


def part(x: Value, numerator: int, denominator: int) -> Value:
    """A slice along the last dimension: a view; its gradient is a full tensor of zeros with the part copied in."""
    whole = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(whole, gradient.dtype)]

    node = x.tape.node([x], backward)
    y = x.view(whole.scaled(numerator, denominator))
    y.node = node
    return y


def split(x: Value, numerators: Sequence[int], denominator: int) -> list[Value]:
    """`x.split(…)` or `x.chunk(n)` along the last dimension: views whose gradients wait for each other and are then joined by one copy."""
    whole = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(whole, gradient.dtype)]

    joint = x.tape.node([x], backward)
    parts = [x.view(whole.scaled(numerator, denominator)) for numerator in numerators]
    if joint is not None:
        joint.collects = True
        for y in parts:
            y.node = _output_of(joint, y)
    return parts


def _output_of(joint: Node, view: Value) -> Node | None:
    carrier = Value(view.tape, view.extent, view.dtype, None, joint)

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    return view.tape.node([carrier], backward)


def concatenate(parts: Sequence[Value]) -> Value:
    """`torch.cat`: the widest type wins, and the kernel converts while it copies; gradients are views."""
    dtype = parts[0].dtype
    for x in parts[1:]:
        dtype = promoted(dtype, x.dtype)
    extents = [x.extent for x in parts]

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(e).reshaped() for e in extents]

    tape = parts[0].tape
    node = tape.node(parts, backward)
    y = tape.new(extents[0]._replace(coefficient=sum(e.coefficient for e in extents)), dtype)
    y.node = node
    return y


def contiguous_copy(x: Value, extent: Extent | None = None) -> Value:
    """A copy in another layout, or of an expanded view; the gradient of an expansion is summed back."""
    if extent is None or extent == x.extent:
        return clone(x)

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.tape.new(extent, x.dtype)
    y.node = node
    return y


def expanded_view(x: Value, extent: Extent) -> Value:
    """`x.expand(…)`: the same storage seen larger; the gradient is summed back."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.view(extent)
    y.node = node
    return y


def transposed(x: Value) -> Value:
    """`x.T`: a view, and no leaf any more, so that autocast casts it anew at every use."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.view()
    y.node = node
    return y


def relaid(x: Value) -> Value:
    """`x.T` of a leaf whose gradient is made in the transposed layout: what the leaf keeps is a copy in its own.

    Source: torch, csrc/autograd/functions/accumulate_grad.h, accumulateGrad (clone_obey_contract).
    """

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(gradient.extent, gradient.dtype)]

    node = x.tape.node([x], backward)
    y = x.view()
    y.node = node
    return y


def heads_ahead(x: Value) -> Value:
    """`x.view(B, S, a, d).transpose(1, 2)` before rotary positions: a view, whose gradient comes back head after head and is copied.

    The gradients of halves of heads are written into zeros that lie head after head, and the rest is added to those.

    Source: torch, ATen/native/TensorShape.cpp, slice_backward; derivatives.yaml, view (`grad.reshape`).
    """

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(gradient.extent, gradient.dtype)]

    node = x.tape.node([x], backward)
    y = x.view()
    y.node = node
    return y


def with_rows(x: Value, rows: Value) -> Value:
    """`x.index_copy(0, index, rows)` on a constant: a second tensor of its size; saves the rows, and picks theirs out of the gradient."""
    extent = rows.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(extent, gradient.dtype)
        del saved
        return [None, result]

    node = x.tape.node([x, rows], backward, [rows])
    y = x.tape.new(x.extent, x.dtype)
    y.node = node
    return y


def gathered(x: Value, rows: Extent, index: Value) -> Value:
    """`x[index]` along the first dimension: saves the index; the gradient is added into zeros of the input's size."""
    before = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(before, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward, [index])
    y = x.tape.new(rows, x.dtype)
    y.node = node
    return y


# -- matrix products --------------------------------------------------------------------------------------------------------------------


def linear(x: Value, weight: Value, bias: Value | None, fan_in: int, fan_out: int) -> Value:
    """`F.linear`: the input is saved if the weight is trained, the weight if the input is.

    Formulas run in the order of their arguments' names: `mat2` before `self` without a bias (mm), `mat1` before `mat2` with one (addmm).
    So the weight's gradient is made first where there is no bias, and the input's where there is.

    Args:
        x: (…, fan_in); weight: (fan_out, fan_in); bias: (fan_out) or None.

    Source: torch, tools/autograd/load_derivatives.py, create_differentiability_info (arguments sorted by name); ATen/native/Linear.cpp.
    """
    inputs = all_lower_precision(x, weight, bias)
    x, weight = inputs[:2]
    x_trained, weight_trained = x.requires_grad, weight.requires_grad
    x_extent, weight_extent = x.extent, weight.extent
    saved = ([weight] if x_trained else []) + ([x] if weight_trained else [])
    num_inputs = len(inputs)

    def backward(node: Node, gradient: Value) -> Gradients:
        operands = node.unpacked()
        tape = gradient.tape
        results: list[Value | None] = [None] * num_inputs
        if num_inputs == 3:
            results[2] = gradient.view()
        trained = (0, x_trained, x_extent), (1, weight_trained, weight_extent)
        for place, is_trained, extent in trained if num_inputs == 3 else reversed(trained):
            if is_trained:
                # The products are of matrices; views make rows tokens again, and transpose the weight's.
                results[place] = tape.new(extent, gradient.dtype).reshaped()
        del operands
        return results

    node = x.tape.node(inputs, backward, saved)
    y = x.tape.new(x.extent.scaled(fan_out, fan_in), x.dtype)
    y.node = node
    return y


def batched_product(x: Value, y: Value, result: Extent) -> Value:
    """`torch.matmul` of two batched tensors: both are saved."""
    x, y = all_lower_precision(x, y)
    x_trained, y_trained = x.requires_grad, y.requires_grad
    extents = x.extent, y.extent
    saved = ([y] if x_trained else []) + ([x] if y_trained else [])

    def backward(node: Node, gradient: Value) -> Gradients:
        operands = node.unpacked()
        tape = gradient.tape
        results = [
            tape.new(extents[0], gradient.dtype).reshaped() if x_trained else None,
            tape.new(extents[1], gradient.dtype).reshaped() if y_trained else None,
        ]
        del operands
        return results

    node = x.tape.node([x, y], backward, saved)
    z = x.tape.new(result, x.dtype)
    z.node = node
    return z


def softmax(x: Value, dtype: DType | None = None) -> Value:
    """`F.softmax(x, dtype=…)`: saves its result. Only float16 is turned into float32 inside the kernel, other types by a copy.

    Under autocast a softmax without `dtype` gives float32.

    Source: torch, ATen/native/SoftMax.cpp, softmax.
    """
    if x.tape.autocast_enabled and dtype is None:
        dtype = DType.FLOAT32
    if dtype is not None and (x.dtype is not DType.FLOAT16 or dtype is not DType.FLOAT32):
        x = cast(x, dtype)
    before = x.dtype

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(gradient.extent, before)
        del saved
        return [result]

    node = x.tape.node([x], backward)
    y = x.tape.new(x.extent, dtype or x.dtype)
    x.tape.save_output(node, y)
    y.node = node
    return y


def layer_norm(x: Value, weight: Value | None, bias: Value | None, width: int) -> Value:
    """`F.layer_norm`: saves input, weight and bias (if it has them), mean and reciprocal deviation (float32, one per token); float32
    under autocast."""
    return _norm(x, weight, bias, width, num_statistics=2)


def _norm(x: Value, weight: Value | None, bias: Value | None, width: int, num_statistics: int) -> Value:
    x = full_precision(x)
    weights = [full_precision(v) for v in (weight, bias) if v is not None]
    inputs = [x, *weights]
    extents = [v.extent for v in inputs]
    trained = [v.requires_grad for v in inputs]

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [gradient.tape.new(e, gradient.dtype) if t else None for e, t in zip(extents, trained, strict=True)]
        del saved
        return results

    node = x.tape.node(inputs, backward, inputs)
    y = x.tape.new(x.extent, x.dtype)
    for _ in range(num_statistics):
        x.tape.save_output(node, x.tape.new(x.extent.scaled(1, width), DType.FLOAT32))
    y.node = node
    return y


# -- looking up and starting ------------------------------------------------------------------------------------------------------------


def embedding(weight: Value, extent: Extent) -> Value:
    """`F.embedding`: saves the indices (counted as an input of the step); a trained weight gets a dense gradient."""
    whole = weight.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(whole, gradient.dtype)]

    node = weight.tape.node([weight], backward)
    y = weight.tape.new(extent, weight.dtype)
    y.node = node
    return y


def custom(
    inputs: Sequence[Value],
    result: Extent,
    dtype: DType,
    backward: Backward,
    *,
    saved: Sequence[Value] = (),
    stash: Sequence[Value] = (),
    item: Item = Item.TEMPORARY,
) -> Value:
    """A Python autograd function: `saved` through save_for_backward, `stash` as attributes of its context."""
    tape = inputs[0].tape
    node = tape.node(inputs, backward, saved)
    y = tape.new(result, dtype, item)
    if node is not None:
        tape.stash(node, stash)
    y.node = node
    return y

"""Bytes of quantized weights, equal to those of real bitsandbytes modules on the CPU; what the public guides claim."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.quantization import check_packing, packed_bytes, quantization_state, quantized_bytes, state_bits_per_parameter
from estimator.recipe import Quantization, QuantizationKind
from estimator.sources.catalogue import load

pytestmark = pytest.mark.filterwarnings("ignore")

# (in, out): whole blocks, partial blocks, odd products, one row, fewer weights than a block, partial second-level blocks.
SHAPES = (
    *((64, 64), (512, 384), (100, 33), (97, 31), (3, 5), (1, 7), (7, 1), (63, 1), (65, 1), (257, 129), (128, 4)),
    *((4096, 9), (16384, 1), (16385, 1), (333, 77), (1000, 260)),
)
MODES = [(kind, dq) for kind in (QuantizationKind.NF4, QuantizationKind.FP4) for dq in (True, False)]


def real_4bit(shape: tuple[int, int], quantization: Quantization) -> dict[str, torch.Tensor]:
    """Every tensor of a real 4-bit layer."""
    layer = Linear4bit(
        *shape,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.kind.value,
        quant_storage=getattr(torch, quantization.storage_dtype.value),
    ).to("cpu")
    state = layer.weight.quant_state
    tensors = {"packed": layer.weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    return tensors


def storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "double_quant"), MODES)
def test_every_tensor_of_a_4bit_weight_has_the_real_size(shape: tuple[int, int], kind: QuantizationKind, double_quant: bool) -> None:
    quantization = Quantization(kind=kind, double_quant=double_quant)
    real = real_4bit(shape, quantization)
    n = shape[0] * shape[1]
    ours = {part.name: (part.raw_bytes, part.dtype.value) for part in quantization_state(quantization, n, shape[1])}
    ours["packed"] = (packed_bytes(quantization, n), "uint8")
    assert ours == {name: (storage_bytes(t), str(t.dtype).removeprefix("torch.")) for name, t in real.items()}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] * shape[1] % 8 == 0])
@pytest.mark.parametrize("storage", [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
def test_other_storage_types_pack_into_the_same_bytes(shape: tuple[int, int], storage: DType) -> None:
    quantization = Quantization(kind=QuantizationKind.NF4, double_quant=True, storage_dtype=storage)
    real = real_4bit(shape, quantization)
    assert storage_bytes(real["packed"]) == packed_bytes(quantization, shape[0] * shape[1])
    assert str(real["packed"].dtype) == f"torch.{storage.value}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64])
def test_a_storage_type_is_refused_where_packed_bytes_are_no_whole_elements_of_it(shape: tuple[int, int], storage: DType) -> None:
    quantization = Quantization(kind=QuantizationKind.NF4, double_quant=True, storage_dtype=storage)
    n = shape[0] * shape[1]
    try:
        real = real_4bit(shape, quantization)
    except RuntimeError:  # self.size(-1) must be divisible by … to view Byte as …
        with pytest.raises(RequestError, match=rf"bnb_4bit_quant_storage: '{storage}' cannot hold q_proj.*{(n + 1) // 2} bytes.*uint8"):
            check_packing(quantization, "q_proj", n)
        return
    check_packing(quantization, "q_proj", n)
    assert storage_bytes(real["packed"]) == packed_bytes(quantization, n)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_weight_is_a_byte_per_scalar_and_a_scale_per_row(shape: tuple[int, int]) -> None:
    layer = Linear8bitLt(*shape, bias=False, has_fp16_weights=False).to("cpu")
    real = storage_bytes(layer.weight.data) + storage_bytes(layer.weight.SCB)
    assert quantized_bytes(Quantization(kind=QuantizationKind.INT8), (shape[1], shape[0])) == real


def test_a_conv1d_is_transposed_before_it_is_quantized() -> None:
    int8 = Quantization(kind=QuantizationKind.INT8)
    assert quantized_bytes(int8, (768, 2304), is_conv1d=True) == 768 * 2304 + 4 * 2304


def test_code_tables_are_not_shared_between_layers() -> None:
    first, second = (real_4bit((64, 64), Quantization(kind=QuantizationKind.NF4, double_quant=True)) for _ in range(2))
    assert all(first[name].data_ptr() != second[name].data_ptr() for name in ("code", "nested_code", "offset"))


def test_seventy_billion_parameters_take_280_140_70_and_35_gigabytes() -> None:
    n = 70 * 10**9
    nf4 = Quantization(kind=QuantizationKind.NF4)
    assert [n * DType.FLOAT32.itemsize, n * DType.BFLOAT16.itemsize] == [280 * 10**9, 140 * 10**9]
    assert packed_bytes(Quantization(kind=QuantizationKind.INT8), n) == 70 * 10**9
    assert packed_bytes(nf4, n) == 35 * 10**9


def test_double_quantization_brings_half_a_bit_down_to_an_eighth_and_saves_3_3_gigabytes_at_70b() -> None:
    # QLoRA, arXiv 2305.14314, section 3: 0.5 bit → 0.127 bit per parameter.
    single, double = state_bits_per_parameter(double_quant=False), state_bits_per_parameter(double_quant=True)
    assert single == 0.5
    assert double == pytest.approx(0.127, abs=5e-4)
    assert single - double == pytest.approx(0.373, abs=5e-4)
    assert (single - double) / 8 * 70e9 == pytest.approx(3.3e9, rel=0.02)


def test_bits_per_parameter_of_a_large_weight_approach_the_formula() -> None:
    n = 8192 * 28672
    for double_quant in (False, True):
        state = quantization_state(Quantization(kind=QuantizationKind.NF4, double_quant=double_quant), n, 8192)
        assert sum(part.raw_bytes for part in state) * 8 / n == pytest.approx(state_bits_per_parameter(double_quant=double_quant), rel=1e-3)


def test_the_default_block_size_of_the_library_is_ours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Linear4bit(64, 64).to("cpu")
    assert layer.weight.blocksize == 64
    assert layer.weight.quant_state.state2.blocksize == 256
    assert bnb.functional.get_4bit_type("nf4", device="cpu").numel() == 16


def test_the_catalogue_is_read_for_llama() -> None:
    assert load("meta-llama-llama-3.1-8b.json").inventory.num_parameters == 8_030_261_248

"""The GPU catalogue: facts are consistent, names are found, ambiguous ones are refused."""

import pytest

from estimator.device import context_bytes
from estimator.dtypes import DType
from estimator.errors import RequestError, UnknownNameError
from estimator.gpus import Vendor, all_gpus, find_gpu
from estimator.units import GIB, MIB


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090", "nvidia-rtx-4090"])
def test_a_card_is_found_by_id_alias_and_nvml_name(name: str) -> None:
    assert find_gpu(name).id == "rtx4090"


def test_every_id_finds_its_own_card() -> None:
    assert [find_gpu(gpu.id).id for gpu in all_gpus()] == [gpu.id for gpu in all_gpus()]


def test_ids_are_unique() -> None:
    assert len({gpu.id for gpu in all_gpus()}) == len(all_gpus()) >= 60


@pytest.mark.parametrize(("name", "ids"), [("A100", ["a100-40", "a100-80"]), ("NVIDIA GeForce RTX 3080", ["rtx3080-10", "rtx3080-12"])])
def test_a_name_of_several_cards_is_refused_with_the_candidates(name: str, ids: list[str]) -> None:
    with pytest.raises(UnknownNameError) as error:
        find_gpu(name)
    assert all(one in error.value.message for one in ids)


def test_the_total_decides_between_cards_of_one_name() -> None:
    assert find_gpu("NVIDIA GeForce RTX 3080", total_bytes=12_100 * MIB).id == "rtx3080-12"


@pytest.mark.parametrize(
    ("name", "total_mib", "gpu"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx4060ti-8"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx4060ti-16"),
        ("NVIDIA GeForce RTX 4060 Ti", 7806, "rtx4060ti-8"),  # what CUDA says
        ("NVIDIA GeForce RTX 4090", 24564, "rtx4090"),
        ("NVIDIA GeForce RTX 4090", 49140, "rtx4090-48"),
        ("A100", 40536, "a100-40"),
        ("A100", 81920, "a100-80"),
        ("H200", 143771, "h200-sxm"),
        ("NVIDIA H100", 95830, "h100-nvl"),
        ("NVIDIA GeForce RTX 3060 Ti", 7833, "rtx3060ti"),
        ("NVIDIA GeForce RTX 3060", 12288, "rtx3060-12"),
        ("NVIDIA GeForce RTX 4070 SUPER", 12282, "rtx4070s"),
        ("NVIDIA RTX A5500", 24564, "a5500"),
    ],
)
def test_a_name_and_the_total_of_nvidia_smi_or_cuda_are_one_card(name: str, total_mib: int, gpu: str) -> None:
    assert find_gpu(name, total_bytes=total_mib * MIB).id == gpu


def test_a_card_whose_memory_was_changed_is_not_meant_by_its_name_alone() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4090").id == "rtx4090"
    assert find_gpu("rtx4090-48").is_modified


@pytest.mark.parametrize("name", ["m3 max", "M2", "Apple M4 Pro", "mps", "apple silicon", "MacBook Pro", "m1 ultra 64GB"])
def test_apple_silicon_gets_the_answer_of_mlx(name: str) -> None:
    with pytest.raises(RequestError, match=r"mlx_lm\.lora") as error:
        find_gpu(name)
    assert error.value.errors[0].field == "hardware.gpu"


def test_cards_outside_cuda_are_marked() -> None:
    assert [gpu.id for gpu in all_gpus() if gpu.vendor is not Vendor.NVIDIA] == ["mi300x"]


def test_every_card_of_the_guides_is_there() -> None:
    wanted = (
        "t4 p100-16 v100-16 v100-32 rtx2080ti rtx3060-12 rtx3060ti rtx3070 rtx3070ti rtx3080-10 rtx3080-12 rtx3080ti rtx3090 rtx3090ti "
        "rtx4060ti-16 rtx4070 rtx4070s rtx4070ti rtx4070tis rtx4080 rtx4080s rtx4090 rtx5070ti rtx5080 rtx5090 a10g a16 a40 a4000 a4500 "
        "a5000 a5500 a6000 l4 l40s rtxpro4000 rtxpro4500 rtxpro5000-48 rtxpro6000 a100-40 a100-80 h100-pcie h100-sxm h100-nvl h200-sxm "
        "b200 b300 gh200-96 mi300x"
    )
    assert set(wanted.split()) <= {gpu.id for gpu in all_gpus()}


def test_speeds_are_in_the_order_that_their_kind_asks_for() -> None:
    for gpu in all_gpus():
        assert gpu.spec_source
        assert gpu.spec_certainty in {"high", "medium", "low"}
        assert gpu.memory_bandwidth is not None
        assert 150e9 < gpu.memory_bandwidth <= 8e12
        assert 2e12 < gpu.dense_flops[DType.FLOAT32] < 200e12
        assert (DType.BFLOAT16 in gpu.dense_flops) <= gpu.bf16
        half = gpu.dense_flops.get(DType.BFLOAT16)
        assert half is None or half >= 1.9 * gpu.dense_flops[DType.FLOAT32]


def test_an_unknown_name_is_refused_with_what_would_be_accepted() -> None:
    with pytest.raises(UnknownNameError, match="rtx4090"):
        find_gpu("rtx9999")


def test_cuda_gives_less_than_nvidia_smi_shows_and_less_than_the_label() -> None:
    for gpu in all_gpus():
        assert gpu.capacity_bytes < gpu.label_gb * GIB * 1.01
        assert gpu.nvidia_smi_bytes is None or gpu.capacity_bytes < gpu.nvidia_smi_bytes


def test_bfloat16_is_native_from_compute_capability_8_and_fp8_from_8_9() -> None:
    for gpu in all_gpus():
        assert gpu.bf16 == (gpu.compute_capability >= (8, 0))
        assert gpu.fp8 == (gpu.compute_capability >= (8, 9))


def test_every_card_says_where_its_capacity_was_seen_and_how_certain_it_is() -> None:
    for gpu in all_gpus():
        assert gpu.source
        assert gpu.certainty in {"high", "medium", "low"}
        assert gpu.capacity_basis in {"measured", "estimated"}


def test_a_context_not_measured_follows_the_formula() -> None:
    for gpu in all_gpus():
        if gpu.context_basis == "estimated":
            assert abs(gpu.context_bytes - context_bytes(gpu.num_sms)) <= MIB


def test_the_formula_is_within_3_percent_of_every_measured_context() -> None:
    measured = [gpu for gpu in all_gpus() if gpu.context_basis == "measured"]
    assert len(measured) == 4
    for gpu in measured:
        assert context_bytes(gpu.num_sms) == pytest.approx(gpu.context_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("a100 40gb", "a100-40"),
        ("A100-SXM4-40GB", "a100-40"),
        ("A100-PCIE-80GB", "a100-80"),
        ("A100 80 G", "a100-80"),
        ("h100 94gb", "h100-nvl"),
        ("H100 SXM5 80GB", "h100-sxm"),
        ("H100 PCIe 80GB", "h100-pcie"),
        ("RTX 4060 Ti 8GB", "rtx4060ti-8"),
        ("4060ti 16gb", "rtx4060ti-16"),
        ("rtx 3060 12gb", "rtx3060-12"),
        ("RTX 4090 24GB", "rtx4090"),
        ("4090 48GB", "rtx4090-48"),
        ("V100 32GB", "v100-32"),
        ("T4 16GB", "t4"),
        ("11GB", "rtx2080ti"),
        ("94", "h100-nvl"),
        ("10 gb", "rtx3080-10"),
    ],
)
def test_a_name_with_the_size_on_its_label_is_one_card(name: str, gpu: str) -> None:
    assert find_gpu(name).id == gpu


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("24", ["rtx3090", "rtx4090", "l4"]),
        ("24GB", ["rtx3090", "rtx4090", "a10g"]),
        ("80 G", ["a100-80", "h100-sxm", "h100-pcie"]),
        ("h100 80gb", ["h100-sxm", "h100-pcie"]),
        ("a100 sxm4", ["a100-40", "a100-80"]),
        ("a100 24gb", ["a100-40", "a100-80"]),
    ],
)
def test_a_size_that_is_not_one_card_s_is_refused_with_the_candidates(name: str, ids: list[str]) -> None:
    with pytest.raises(UnknownNameError) as error:
        find_gpu(name)
    assert error.value.message.startswith(f"hardware.gpu: {name!r}")
    assert all(f"{one} (" in error.value.message for one in ids)
    assert "rtx4090-48" not in error.value.message


@pytest.mark.parametrize("name", ["", "  ", "gb", "999", "7GB", "rtx 9999 24gb"])
def test_what_is_no_card_is_not_taken_for_one(name: str) -> None:
    with pytest.raises(UnknownNameError, match="is not known"):
        find_gpu(name)

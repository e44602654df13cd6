"""The GPU catalogue: facts are consistent, names are found, ambiguous ones are refused."""

import pytest

from estimator.device import context_bytes
from estimator.errors import UnknownNameError
from estimator.gpus import all_gpus, find_gpu
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

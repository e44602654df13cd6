"""What nvidia-smi prints is read back: names, totals, free memory, and who holds some of it."""

from contextlib import suppress
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import RequestError
from estimator.nvidia_smi import identify, read_cards, usage_sentence
from estimator.units import MIB

# The layout of drivers 525 to 580, of which the column widths differ; two cards, one of them in use.
TABLE = """\
Wed Nov 25 06:12:01 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
|   0  NVIDIA GeForce RTX 4090        Off |   00000000:01:00.0 Off |                  Off |
|  0%   40C    P8             18W /  450W |    5121MiB /  24564MiB |      0%      Default |
|                                         |                        |                  N/A |
+-----------------------------------------+------------------------+----------------------+
|   1  NVIDIA GeForce RTX 3080        On  |   00000000:02:00.0  On |                  N/A |
| 30%   35C    P8             20W /  320W |       3MiB /  12288MiB |      0%      Default |
|                                         |                        |                  N/A |
+-----------------------------------------+------------------------+----------------------+

+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI        PID   Type   Process name                              GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
|    0   N/A  N/A      2021      G   /usr/lib/xorg/Xorg                              120MiB |
|    0   N/A  N/A     31337      C   /home/someone/env/bin/python3.11               5000MiB |
+-----------------------------------------------------------------------------------------+
"""

# Drivers before 470 shorten names and have no columns for instances.
OLD_TABLE = """\
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 440.33.01    Driver Version: 440.33.01    CUDA Version: 10.2     |
|-------------------------------+----------------------+----------------------+
| GPU  Name        Persistence-M| Bus-Id        Disp.A | Volatile Uncorr. ECC |
| Fan  Temp  Perf  Pwr:Usage/Cap|         Memory-Usage | GPU-Util  Compute M. |
|===============================+======================+======================|
|   0  A100-SXM4-40GB      On   | 00000000:07:00.0 Off |                    0 |
| N/A   34C    P0    54W / 400W |      0MiB / 40960MiB |      0%      Default |
+-------------------------------+----------------------+----------------------+
|   1  NVIDIA A100-SXM...  On   | 00000000:0F:00.0 Off |                    0 |
| N/A   33C    P0    52W / 400W |  70000MiB / 81920MiB |      0%      Default |
+-------------------------------+----------------------+----------------------+
| Processes:                                                       GPU Memory |
|  GPU       PID   Type   Process name                             Usage      |
|=============================================================================|
|    1      4711      C   python                                    69990MiB |
+-----------------------------------------------------------------------------+
"""

WINDOWS = """\
|===============================+======================+======================|
|   0  NVIDIA GeForce RTX 4060 Ti   WDDM  | 00000000:01:00.0  On |                  N/A |
|  0%   38C    P8    10W / 165W |   1200MiB / 16380MiB |      2%      Default |
|                               |                      |                  N/A |
+-------------------------------+----------------------+----------------------+
| Processes:                                                                  |
|  GPU   GI   CI        PID   Type   Process name                  GPU Memory |
|    0   N/A  N/A      1234    C+G   C:\\Windows\\explorer.exe           N/A      |
+-----------------------------------------------------------------------------+
"""

LISTED = """\
GPU 0: NVIDIA L4 (UUID: GPU-0aa1b2c3-1111-2222-3333-444455556666)
GPU 1: NVIDIA L4 (UUID: GPU-0aa1b2c3-1111-2222-3333-444455556667)
"""

DETAILED = """\
==============NVSMI LOG==============

Timestamp                                 : Wed Nov 25 06:12:01 2026
Driver Version                            : 550.54.15
CUDA Version                              : 12.4

Attached GPUs                             : 1
GPU 00000000:01:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Product Architecture                  : Hopper
    MIG Mode
        Current                           : Disabled
        Pending                           : Disabled
    FB Memory Usage
        Total                             : 81559 MiB
        Reserved                          : 551 MiB
        Used                              : 20001 MiB
        Free                              : 61006 MiB
    BAR1 Memory Usage
        Total                             : 131072 MiB
        Used                              : 4 MiB
        Free                              : 131068 MiB
    Processes
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 99
            Type                          : C
            Name                          : /opt/vllm/bin/python
            Used GPU Memory               : 19992 MiB
"""

VALUES = """\
name, memory.total [MiB], memory.free [MiB]
NVIDIA GeForce RTX 4060 Ti, 8188 MiB, 7900 MiB
NVIDIA GeForce RTX 4090, 49140 MiB, 48500 MiB
"""


def test_the_table_gives_cards_memory_and_processes() -> None:
    first, second = read_cards(TABLE)
    assert (first.name, first.total_bytes, first.used_bytes) == ("NVIDIA GeForce RTX 4090", 24564 * MIB, 5121 * MIB)
    assert [(p.pid, p.name, p.used_bytes) for p in first.processes] == [(2021, "Xorg", 120 * MIB), (31337, "python3.11", 5000 * MIB)]
    assert identify(first).gpu.id == "rtx4090"
    assert identify(second).gpu.id == "rtx3080-12"
    assert second.processes == ()


def test_what_is_in_use_is_missing_from_the_capacity_and_its_holders_are_named() -> None:
    found = identify(read_cards(TABLE)[0])
    assert found.occupied_bytes == 5121 * MIB
    assert "Xorg (pid 2021, 0.12 GiB), python3.11 (pid 31337, 4.88 GiB)" in usage_sentence(found)
    assert "/home/someone" not in usage_sentence(found)


def test_shortened_names_are_told_apart_by_their_total() -> None:
    first, second = map(identify, read_cards(OLD_TABLE))
    assert (first.gpu.id, second.gpu.id) == ("a100-40", "a100-80")
    assert second.read.processes[0].name == "python"
    assert second.occupied_bytes == 70000 * MIB


@pytest.mark.parametrize(
    ("name", "total", "said"), [("NVIDIA GeForce ...", 24259, "rtx3090"), ("Tesla V100-SXM2...", 99999, "not in the catalogue")]
)
def test_a_shortened_name_that_settles_nothing_is_refused_with_a_way_out(name: str, total: int, said: str) -> None:
    line = f"|   0  {name}  On   | 00000000:01:00.0  On |                  N/A |\n"
    text = line + f"| 30%   36C    P8    16W / 350W |    169MiB / {total}MiB |      5%      Default |\n"
    with pytest.raises(RequestError, match=said):
        identify(read_cards(text)[0])


def test_the_total_of_an_old_driver_settles_a_shortened_name() -> None:
    line = "|   0  Tesla V100-SXM2...  On   | 00000000:03:00.0 Off |                    0 |\n"
    (card,) = read_cards(line + "| N/A   31C    P0    41W / 300W |      0MiB / 32510MiB |      0%      Default |\n")
    assert identify(card).gpu.id == "v100-32"


def test_an_indented_output_is_read_as_well() -> None:
    for text in (TABLE, LISTED, DETAILED):
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        assert read_cards(indented) == read_cards(text)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("Tesla V100-PCIE-16GB", "v100-16"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GH200 480GB", "gh200-96"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Quadro RTX 6000", "quadro-rtx6000"),
    ],
)
def test_names_of_the_driver_are_found(name: str, gpu: str) -> None:
    assert identify(read_cards(f"GPU 0: {name} (UUID: GPU-1)")[0]).gpu.id == gpu


def test_windows_says_no_memory_per_process() -> None:
    (card,) = read_cards(WINDOWS)
    assert identify(card).gpu.id == "rtx4060ti-16"
    assert card.processes[0].name == "explorer.exe"
    assert card.processes[0].used_bytes is None
    assert "explorer.exe (pid 1234)" in usage_sentence(identify(card))


def test_the_list_gives_cards_without_memory() -> None:
    cards = read_cards(LISTED)
    assert [identify(card).gpu.id for card in cards] == ["l4", "l4"]
    assert [identify(card).occupied_bytes for card in cards] == [0, 0]


def test_the_long_form_gives_frame_buffer_memory_and_not_the_bar() -> None:
    (card,) = read_cards(DETAILED)
    found = identify(card)
    assert (card.total_bytes, card.free_bytes) == (81559 * MIB, 61006 * MIB)
    assert found.gpu.id == "h100-sxm"
    assert found.occupied_bytes == found.capacity_bytes - 61006 * MIB
    assert card.processes[0].used_bytes == 19992 * MIB


def test_values_are_read_by_their_header() -> None:
    small, modified = map(identify, read_cards(VALUES))
    assert (small.gpu.id, modified.gpu.id) == ("rtx4060ti-8", "rtx4090-48")


@pytest.mark.parametrize(
    "text", ["NVIDIA A40, 46068, 45634", "NVIDIA A40, 46068 MiB, 45634 MiB", "index, name, memory.total [MiB]\n3, NVIDIA A40, 46068 MiB"]
)
def test_values_without_units_or_header_are_read_too(text: str) -> None:
    (card,) = read_cards(text)
    found = identify(card)
    assert (found.gpu.id, found.occupied_bytes, found.is_variant) == ("a40", 0, False)


def test_a_card_with_another_total_is_a_variant_of_its_kind() -> None:
    found = identify(read_cards("NVIDIA A40, 49140 MiB, 48600 MiB")[0])  # error correction switched off
    assert found.is_variant
    assert abs(found.capacity_bytes - 48688 * MIB) < 256 * MIB  # what CUDA gives then: catalogue's source


def test_a_name_of_several_cards_without_a_total_is_refused() -> None:
    with pytest.raises(RequestError, match="rtx3080-10"):
        identify(read_cards("GPU 0: NVIDIA GeForce RTX 3080 (UUID: GPU-1)")[0])


def test_a_card_that_is_not_in_the_catalogue_is_refused_with_a_way_out() -> None:
    with pytest.raises(RequestError, match="capacity_gib"):
        identify(read_cards("NVIDIA GeForce GTX 1050, 4096 MiB, 4000 MiB")[0])


@pytest.mark.parametrize(
    "text", ["", "hello", "a, b", "Failed to initialize NVML: Driver/library version mismatch", "|" * 200_000, " " * 200_000]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no card is recognized"):
        read_cards(text)


@pytest.mark.parametrize(
    "text",
    [
        LISTED + "  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n",
        TABLE + "| MIG devices:                                                                |\n",
        DETAILED.replace("Disabled", "Enabled"),
    ],
    ids=["list", "table", "long"],
)
def test_slices_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="MIG"):
        read_cards(text)


def test_names_of_processes_carry_no_commands_to_terminals() -> None:
    first, _ = read_cards(TABLE.replace("python3.11 ", "py\x1b[31mthon"))
    assert first.processes[1].name == "py?[31mthon"


@given(st.text(alphabet="| \nGPU0123456789:MiB/OffNACG,.x[]", max_size=400))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(RequestError):
        for card in read_cards(text):
            identify(card)


@pytest.mark.parametrize(
    "line", ["|    0   N/A  N/A      1    C   " + "x " * 450, "|   0  " + "a " * 500 + "Off |", "GPU 0: " + "(UUID: " * 140]
)
def test_long_lines_cost_no_more_than_their_length(line: str) -> None:
    text = TABLE + (line + "\n") * 250
    started = perf_counter()
    with suppress(RequestError):
        read_cards(text)
    assert perf_counter() - started < 2  # 250 kB in well under a tenth of this

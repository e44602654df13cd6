"""What NCCL takes on each card, outside torch's allocator. All `modelled`."""

from estimator.units import MIB

# Source: NCCL, src/init.cc, computeBuffSizes, and src/include/device.h: LL 8 lines × 512 threads × 8 steps × 16 B, LL128 120 words × 640
# threads × 8 steps × 8 B, Simple 4 MiB (NCCL_BUFFSIZE).
LL_BYTES = 8 * 512 * 8 * 16
LL128_BYTES = 120 * 640 * 8 * 8
SIMPLE_BYTES = 4 * MIB
# Channels that NCCL opens between cards of one node depend on their links: 2 to 4 over PCIe, up to 24 over NVLink. A middle figure.
NUM_CHANNELS = 8
# A channel receives from one peer in the ring, and from a parent and a child in the tree.
NUM_CONNECTIONS = 3


def communicator_bytes(num_gpus: int) -> int:
    """Receive buffers of one communicator [bytes].

    Args:
        num_gpus: cards that talk to each other; one alone opens no connection.

    Returns:
        8 channels × connections × (LL + LL128 + Simple) [bytes]; two cards have one peer in ring and tree alike.

    Source: NCCL, src/transport/p2p.cc, p2pRecvSetup: every connection has a buffer for each protocol. The number of channels rests on no
    measurement of this project.
    """
    if num_gpus < 2:
        return 0
    connections = min(NUM_CONNECTIONS, 2 * (num_gpus - 1))
    return NUM_CHANNELS * connections * (LL_BYTES + LL128_BYTES + SIMPLE_BYTES)

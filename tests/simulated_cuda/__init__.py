"""Two CUDA devices for machines that have none.

`torch.device("cuda:0")` and `"cuda:1"` work on a CPU build of torch: what torch, accelerate and diffusers do
with a GPU, they do here, with real values, so that training and offloading can be compared with the CPU's.
Mixed devices raise CUDA's sentence, memory is counted and can be limited, autocast lowers what it lowers on
CUDA, pinned memory, streams and events are there.

`device.cpp` is the device, `build.py` compiles it, `installation.py` gives it to a process before torch is
imported, `controls.py` reads its counters and limits its memory. Tests use the fixture of `fixture.py`:

    def test_it(run_on_simulated_cuda):
        run_on_simulated_cuda(\"\"\"
            def check_sum():
                assert torch.ones(2, device=DEVICE).sum().item() == 2

            def check_memory():
                kept = torch.ones(1024, device=DEVICE)
                assert torch.cuda.memory_allocated() == 4096
        \"\"\")

Where there is a GPU, the same snippet runs on it. What it may rely on there, too: memory is counted in steps of
512 bytes, and the numbers of `torch.cuda` are per device.

What the simulation does not do:

- It is not fast, and says nothing about speed. Streams have no effect on order, so a missing synchronisation goes
  unnoticed; events measure 0 ms.
- Memory inside an operator (cuBLAS's and cuDNN's workspaces, the buffers of a kernel) is not counted, and nothing
  is cached: `memory_reserved` is `memory_allocated`.
- An operator with a CPU kernel runs, also where CUDA has none; one with a CUDA kernel alone does not (the fused
  cells of `nn.LSTM` and `nn.GRU`, bitsandbytes, Triton, and so `torch.compile` with inductor).
- Without a generator the CPU's random numbers are drawn. A GPU draws others for the same seed.
- No processes: NCCL, CUDA graphs, sharing of memory.
"""

from simulated_cuda.controls import Counters, counters, is_simulated, memory_limit
from simulated_cuda.installation import install

__all__ = ["Counters", "counters", "install", "is_simulated", "memory_limit"]

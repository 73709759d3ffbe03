"""fla's Triton GLA for one case of kernel_speed.py, given and answered as JSON. Needs torch, fla and a GPU."""

import json
import sys
import time

import torch
import torch.nn.functional as F
import triton
from fla.ops.gla import chunk_gla

GATES = {
    "gla": lambda x: F.logsigmoid(x) / 16,
    "unscaled": F.logsigmoid,
    "strong": lambda x: -60 * torch.rand_like(x),
    "inf": lambda x: torch.where(torch.rand_like(x) < 0.05, -torch.inf, F.logsigmoid(x) / 16),
}


def peak_mib(run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(B, T, H, K, V, gates, packed):
    if packed > 1:
        raise NotImplementedError("documents are not measured with fla")
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    half = lambda x: x.to(torch.bfloat16).requires_grad_()  # noqa: E731
    q, k, v, g = (
        half(new(B, T, H, K)),
        half(new(B, T, H, K)),
        half(new(B, T, H, V)),
        half(GATES[gates](new(B, T, H, K))),
    )
    do = new(B, T, H, V).to(torch.bfloat16)

    @torch.no_grad()
    def forward():
        return chunk_gla(q, k, v, g)[0]

    def both():
        return torch.autograd.grad(chunk_gla(q, k, v, g)[0], (q, k, v, g), do)

    row = {}
    for name, run in (("forward", forward), ("both", both)):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        row[f"{name}_first_call_s"] = time.perf_counter() - start
        row[f"{name}_ms"] = triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median")
        row[f"{name}_mib"] = peak_mib(run)
    print(json.dumps(row))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

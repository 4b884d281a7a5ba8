"""Which kernel attention takes, and how long it takes, on whatever device this runs on.

    python -m rlzoo.benchmarks.perf.attention [--device cuda] [--dtype bfloat16] [--heads 12] [--key-heads 2] [--size 128]
        [--path 3072] [--rows 16] [--repeats 20]

One JSON line per case: `what` (update: blocks of 256 queries over the keys of `--path` tokens, forward and backward; decoding: one token
of each row over its whole path, forward), `form` (see rlzoo/training/attention_forms.py), `chosen` (whether updates take this form on
this device), `kernel` (torch's operator, from its profiler) and `ms` (median of the repeats).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from rlzoo.backends.kvcache import rows_attention
from rlzoo.training.attention_forms import FORMS, attend, form_on
from rlzoo.training.packing import QUERY_BLOCK

KERNELS = ("flash", "efficient", "cudnn", "math", "overrideable")


def kernel_of(work: Callable[[], object]) -> str:
    """torch's operator for attention that `work` calls last, "none" if there is none."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    names = [event.key for event in seen.key_averages() if "attention" in event.key and "backward" not in event.key]
    named = [name for name in names if any(kernel in name for kernel in KERNELS)]
    return named[-1] if named else "none"


def milliseconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times[1:] or times)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kernels and times of attention.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    for name, value in {"heads": 12, "key-heads": 2, "size": 128, "path": 3072, "rows": 16, "repeats": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args(argv)
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    block = min(QUERY_BLOCK, o.path // 2)

    def made(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(o.rows, heads, tokens, o.size, device=device, dtype=dtype, requires_grad=True)

    q, k, v = made(o.heads, block), made(o.key_heads, o.path), made(o.key_heads, o.path)
    mask = torch.arange(o.path, device=device) <= torch.arange(o.path - block, o.path, device=device)[:, None]
    chosen = form_on(device, dtype, o.heads, o.key_heads, o.size)

    def line(what: str, form: str, work: Callable[[], object]) -> None:
        row = {"what": what, "form": form, "chosen": form == chosen, "kernel": kernel_of(work), "ms": milliseconds(work, o.repeats, device)}
        print(json.dumps(row | {"device": str(device), "dtype": o.dtype}), flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in FORMS:

            def update(form: str = form) -> object:
                out = attend(form, q, k, v, mask if form == "masked" else None)  # type: ignore[arg-type]
                return torch.autograd.grad(out.sum(), (q, k, v))

            line("update", form, update)
        last = torch.zeros(o.rows, 1, 1, o.path, device=device, dtype=dtype)
        one = made(o.heads, 1).detach()
        line("decoding", "grouped rows", lambda: rows_attention(torch.nn.Identity(), one, k.detach(), v.detach(), last))


if __name__ == "__main__":
    main()

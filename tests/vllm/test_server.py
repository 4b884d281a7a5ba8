"""The engine behind HTTP, against vLLM's own server on loopback: it is started here, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.backends.protocol import SamplingParams
from rlzoo.backends.select import open_server
from rlzoo.backends.torch import TorchBackend
from rlzoo.cli import main
from rlzoo.config import BackendOptions
from rlzoo.evaluation import job as eval_job
from rlzoo.evaluation.rows import read_row
from rlzoo.evaluation.suites import Suite
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.sampling.nary import Nary
from rlzoo.store.runs import read_rows
from rlzoo.training.models import describe_model, load_model, resolve
from tests.engines import PARAMS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
STARTS_WITHIN_S = 240
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
TOLERANCE = 1e-4


class VllmServer:
    """`vllm serve` on the embedded model in float32; by its module, as the command of the CPU wheel asks for a package of another name."""

    def __init__(self, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve("tiny"), "--served-model-name", "tiny"]
        # With seeds, vLLM on a CPU fails at a prompt that is cut into chunks.
        whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
        command += [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--block-size",
            "32",
            *whole,
            *flags,
        ]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=os.environ | QUIET, stdout=file, stderr=file, start_new_session=True)
        try:
            self._wait(log)
        except BaseException:  # a time limit on the test, too
            self.kill()
            raise

    def _wait(self, log: Path) -> None:
        end = time.monotonic() + STARTS_WITHIN_S
        while "Application startup complete" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"vLLM's server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        """To the server and its engine's processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm") / "log", "--logprobs-mode", "processed_logprobs")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """The embedded model here."""
    torch.set_num_threads(1)
    loaded = load_model("tiny", dtype="float32", device="cpu")
    prompts = [Prompt(f"p{i}", loaded.tokenizer.encode(f"Compute {i + 11} + {3 * i} - 4.\n")) for i in range(6)]
    return SimpleNamespace(backend=TorchBackend(loaded.model, loaded.tokenizer), prompts=prompts)


@pytest.fixture
def connect(vllm: VllmServer) -> Iterator[Any]:
    made = []

    def make(planned: SamplingParams = PARAMS[0], url: str = vllm.url, **options: Any) -> Any:
        made.append(open_server(url, describe_model("tiny"), model="", planned=[planned], options=BackendOptions(**options)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_logprobs_are_those_of_the_model_and_the_distribution(params, connect, reference):
    shared = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    backend = connect(params)
    for sampler in (Chains(group_size=4, max_response_tokens=40, **shared), Nary(branching=2, segment_tokens=(8, 12, 16), **shared)):
        trees = grow(sampler, backend, reference.prompts, seed=0)
        for tree, scores in zip(trees, reference.backend.score(trees, params), strict=True):
            start = len(tree.prompt)
            np.testing.assert_allclose(tree.logprobs[start:], scores[start:], atol=TOLERANCE, rtol=0)
    assert backend.engine.startswith("server:vllm ")


def test_scores_and_seeds(connect, reference):
    sampler = Chains(group_size=4, max_response_tokens=40)
    backend = connect()
    trees = grow(sampler, backend, reference.prompts, seed=0)
    for ours, theirs in zip(backend.score(trees), reference.backend.score(trees), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    again = grow(sampler, connect(capacity=3), reference.prompts, seed=0)
    same = sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(trees, again, strict=True))
    assert same >= len(trees) - 1  # in float32 rounding depends on the batch
    for tree in trees:
        assert len({tuple(tree.path_tokens(leaf).tolist()) for leaf in tree.leaves}) > 1


def test_an_evaluation_is_that_of_the_torch_engine(vllm, tmp_path, capsys):
    rows = {}
    for name, flags in {"server": ["--backend-url", vllm.url, "--served-model", "tiny"], "torch": []}.items():
        job = ["eval", "tiny", "--suite", "mini", "--k", "2", "--greedy", "--max-response-tokens", "128", "--backend.threads", "1"]
        assert main([*job, "--out", str(tmp_path / name), *flags]) == 0
        rows[name] = read_row(tmp_path / name / "summary.json")[0]
    server, here = rows["server"], rows["torch"]
    assert server.protocol.engine.startswith("server:vllm ") and server.ledger.device == "server"
    for name, found in server.results["model"].items():  # greedy decoding is the same but for ties within rounding
        assert sum(a != b for a, b in zip(found.greedy.right, here.results["model"][name].greedy.right, strict=True)) <= 1
    ours, theirs = server.overall["model"].pass_at_1, here.overall["model"].pass_at_1
    assert abs(ours.mean - theirs.mean) < 0.06  # two draws of 800; the standard error of the difference is 0.022


def test_raw_logprobs_are_found_out(tmp_path, connect):
    server = VllmServer(tmp_path / "log")
    try:
        connect(url=server.url)
        with pytest.raises(ValueError, match="has to be started with --logprobs-mode processed_logprobs"):
            connect(SamplingParams(0.7), url=server.url)
    finally:
        server.kill()


@pytest.mark.parametrize(("number", "message"), [(signal.SIGKILL, "no answer from the server"), (signal.SIGSTOP, "has said nothing for")])
def test_a_server_that_dies_or_hangs_ends_the_evaluation_and_it_goes_on(number, message, tmp_path, capsys, monkeypatch):
    server = VllmServer(tmp_path / "log", "--logprobs-mode", "processed_logprobs")
    out, whole = tmp_path / "eval", Suite.load
    monkeypatch.setattr(Suite, "load", lambda self, data_dir=None: {name: p[:30] for name, p in whole(self, data_dir).items()})
    begun: list[float] = []
    written = eval_job.to_json

    def struck(row: Any, **options: Any) -> str:
        if "response" in row and not begun and len(read_rows(out / "samples.jsonl")) > 10:
            begun.append(time.monotonic())
            server.signal(number)
        return str(written(row, **options))

    monkeypatch.setattr(eval_job, "to_json", struck)
    job = ["eval", "tiny", "--k", "4", "--backend.threads", "1", "--backend.capacity", "16", "--backend.timeout-s", "20"]
    try:
        assert main([*job, "--backend-url", server.url, "--out", str(out)]) == 1
        assert time.monotonic() - begun[0] < 60
        said = capsys.readouterr().err.splitlines()[-1]
        assert message in said and said.endswith(f"go on with rlzoo eval --resume --out {out}")
        kept = len(read_rows(out / "samples.jsonl"))
        assert 10 < kept < 480
        if number == signal.SIGSTOP:
            server.signal(signal.SIGCONT)
            assert main(["eval", "--resume", "--out", str(out)]) == 0
            assert len(read_rows(out / "samples.jsonl")) == 480
    finally:
        if number == signal.SIGSTOP:
            server.signal(signal.SIGCONT)
        server.kill()

"""A process that runs the command line in forked children and lets them die where it is told to. Used by test_resume.py.

Requests, one JSON object a line on stdin: {"argv", "log": file, "kill": null or {"target": "module:Name.attribute", "how", "nth",
"signals"}}. Answers, one a line on stdout: the child's exit status, negative for a signal. The child sends itself the signals (real
ones, SIGKILL unless given): `how` is "before" or "after" the n-th call of the target, "items": the target is a generator function,
after n of its items; "half": the target is RunFolder.log, in the middle of the n-th row.
"""

import functools
import importlib
import json
import os
import signal
import sys
import time

SLOW_IMPORTS = ("transformers.models.qwen2.modeling_qwen2", "accelerate.tracking", "torch.utils.tensorboard", "pyarrow.parquet")


def mixed(items):
    """A plug-in reward: right or wrong by the response's length, so that every group has both."""
    return [len(text) % 2 == 0 for _, text in items]


def patch(target, how, nth, signals=("SIGKILL",)):
    module, _, name = target.partition(":")
    owner = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, count = getattr(owner, attribute), 0

    def die():
        for name in signals:
            os.kill(os.getpid(), signal.Signals[name])

    @functools.wraps(real)
    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth and how == "before":
            die()
        if count == nth and how == "half":
            text = json.dumps(args[1])
            with (args[0].path / "metrics.jsonl").open("a") as file:
                file.write(text[: len(text) // 2])
            die()
        result = real(*args, **kwargs)
        if count == nth and how == "after":
            die()
        return result

    def items(*args, **kwargs):
        nonlocal count
        for item in real(*args, **kwargs):
            yield item
            count += 1
            if count == nth:
                die()

    setattr(owner, attribute, items if how == "items" else wrapped)


def small_suite():
    """Two problems of each set of a suite, so that a final evaluation takes a second."""
    from rlzoo.evaluation.suites import Suite

    whole = Suite.load
    Suite.load = lambda self, data_dir=None: {name: problems[:2] for name, problems in whole(self, data_dir).items()}


def run(request):
    """One command in this process; returns its exit status."""
    from rlzoo.cli import main

    if request["kill"]:
        patch(**request["kill"])
    return main(request["argv"])


def run_in_a_child(request):
    """The same in a forked one."""
    pid = os.fork()
    if pid == 0:
        file = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = 70
        try:
            status = run(request)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve():
    for module in SLOW_IMPORTS:  # once for all children
        importlib.import_module(module)
    for line in sys.stdin:
        second = int(time.time())
        status = run_in_a_child(json.loads(line))
        while int(time.time()) == second:  # TensorBoard orders its files by the second of their birth
            time.sleep(0.02)
        print(status, flush=True)


if __name__ == "__main__":
    small_suite()
    serve() if len(sys.argv) == 1 else sys.exit(run(json.loads(sys.argv[1])))

"""Bends files that come from strangers, and reads them: each gives a clear error or a model that runs.

    python tools/fuzz_files.py --cases 100000 --seed 0 --jobs 1
    python tools/fuzz_files.py --target gguf --case 17 --seed 0     # one case again, with its traceback

Targets are config.json, the files of a tokenizer, directories of safetensors, and GGUF files. A case follows from seed,
target and number alone. Cases run in batches, each in a process of its own that may take half a gigabyte more than it
begins with; a case may take a second of processor time. What else than `TokenloomError` comes out of a case, and a
process that dies, is a failure and is printed with what runs it again; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenloom.engine.batch import PAGE_SIZE  # noqa: E402
from tokenloom.engine.engine import Engine, EngineLimits  # noqa: E402
from tokenloom.engine.request import Request  # noqa: E402
from tokenloom.engine.sampling_params import SamplingParams  # noqa: E402
from tokenloom.errors import TokenloomError  # noqa: E402
from tokenloom.kernels.backend import kv_page_bytes  # noqa: E402
from tokenloom.kernels.native import extension  # noqa: E402
from tokenloom.kernels.native.weights import WeightPacker  # noqa: E402
from tokenloom.models.hf_config import read_config, read_generation_defaults  # noqa: E402
from tokenloom.models.loading import describe_model, load_model  # noqa: E402
from tokenloom.models.registry import build_program  # noqa: E402
from tokenloom.models.rope import limit_context, rope_tables  # noqa: E402
from tokenloom.models.weight_sources import roundings  # noqa: E402
from tokenloom.runtime.local import LocalExecutor  # noqa: E402
from tokenloom.text.tokenizer import Tokenizer  # noqa: E402
from tools import fuzz_mutations, fuzz_originals  # noqa: E402

BATCH = 2500
CASE_SECONDS = 1.0
MEMORY = 512 << 20
CONTEXT = 32
MAX_MESSAGE = 1 << 14
_KILL_SECONDS = 10
_TEXT = "hello <s>Once upon\ta time, 12345 é 你好 \U0001f600\n\n  hi</s>"
_CHAT = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"}]


class TooSlow(BaseException):
    """A case took longer than it may. No Exception: nothing may take it for an error of its own."""


class Failure(NamedTuple):
    """A case that ended otherwise than it may."""

    target: str
    case: int
    what: str


# --- what is done with the files ---------------------------------------------------------------------------


def read_configuration(folder: Path, case: int) -> None:
    """config.json and generation_config.json, to the program and its rotary tables."""
    config = limit_context(read_config(folder), None)
    read_generation_defaults(folder)
    build_program(config)
    if config.max_context >= CONTEXT:
        rope_tables(limit_context(config, CONTEXT))


def read_tokenizer(folder: Path, case: int) -> None:
    """A text there and back, and a chat."""
    tokenizer = Tokenizer.from_dir(folder)
    ids = tokenizer.encode(_TEXT)
    tokenizer.decode(ids[:50])
    tokenizer.decode(
        [*range(min(tokenizer.vocab_size, 20)), tokenizer.vocab_size - 1], skip_special_tokens=False
    )
    if tokenizer.chat_template is not None:
        tokenizer.render_chat(_CHAT)


def run_model(path: Path, case: int) -> None:
    """Load the model and generate two tokens; every other case on the native kernels."""
    weights = ("auto", "auto", "float", "int8", "int4")[case // 2 % 5]
    kernels = "native" if case % 2 and extension.missing() is None else "reference"
    described = describe_model(path, max_context=CONTEXT, weights=weights)
    packer = None
    if kernels == "native":
        rounded = roundings(described.program, weights)  # type: ignore[arg-type]
        packer = WeightPacker(described.program, "float32", extension.thread_pool(1), rounded)
    model = load_model(path, weights=weights, max_context=CONTEXT, packer=packer)
    executor = LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=4,
        frame_bytes=kv_page_bytes(model.program.kv, "float32", kernels, PAGE_SIZE),
        pages_per_frame=1,
        kernels=kernels,
    )
    limits = EngineLimits(
        vocab_size=model.program.vocab_size, max_context=model.config.max_context, num_pages=4, debug=True
    )
    engine = Engine(executor, limits)
    try:
        prompt = [token % model.program.vocab_size for token in (5, 3, 0)]
        params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=2, ignore_eos=True)
        engine.add_request(Request(request_id="0", prompt_token_ids=prompt, params=params))
        while engine.has_work:
            engine.step()
    finally:
        engine.close()
        executor.close()


def read_gguf(folder: Path, case: int) -> None:
    """The tokenizer and the model of a GGUF file."""
    path = folder / "model.gguf"
    if case % 3 == 0:
        read_tokenizer(path, case)
    else:
        run_model(path, case)


TARGETS: dict[str, tuple[Callable[[], list[Any]], Callable[[Path, int], None]]] = {
    "config": (fuzz_originals.configs, read_configuration),
    "tokenizer": (fuzz_originals.tokenizer_directories, read_tokenizer),
    "safetensors": (fuzz_originals.checkpoints, run_model),
    "gguf": (fuzz_originals.gguf_files, read_gguf),
}
"""By name: the sound files, and what reads them."""


@cache
def originals(target: str) -> list[Any]:
    return TARGETS[target][0]()


def make_files(target: str, seed: int, case: int) -> fuzz_originals.Files:
    """The files of a case."""
    rng = random.Random(f"{seed}/{target}/{case}")
    sound = originals(target)
    if target == "gguf":
        return {"model.gguf": fuzz_mutations.mutate_gguf(rng, rng.choice(sound), sound)}
    return fuzz_mutations.mutate(rng, rng.choice(sound), sound)


def write_files(files: fuzz_originals.Files, folder: Path) -> None:
    """Into `folder`, in the place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


# --- one batch, in its own process -------------------------------------------------------------------------


def run_case(target: str, seed: int, case: int, folder: Path) -> str:
    """ "refused", "loaded", or what went wrong."""
    write_files(make_files(target, seed, case), folder)
    try:
        with within_limits():
            TARGETS[target][1](folder, case)
    except TokenloomError as error:
        size = len(str(error))
        return "refused" if 0 < size <= MAX_MESSAGE else f"an error of {size} characters: {str(error)[:200]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
    return "loaded"


class within_limits:
    """The time of a case: `TooSlow` after `CASE_SECONDS` of processor time; where that is not heard, the end of the
    process soon after."""

    def __enter__(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = int(used.ru_utime + used.ru_stime) + _KILL_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (hard, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {CASE_SECONDS} s")


def run_batch(target: str, seed: int, start: int, stop: int) -> None:
    """Print a line for each case of [start, stop)."""
    signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="tokenloom-fuzz-") as made:
        folder = Path(made) / "case"
        # What is imported or begun on first use is not counted.
        for case in (0, 1):
            write_files(sound_files(target, case), folder)
            TARGETS[target][1](folder, case)
        begun = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (begun + MEMORY, begun + MEMORY))
        for case in range(start, stop):
            line = " ".join(run_case(target, seed, case, folder).split())
            os.write(1, f"{case} {line}\n".encode("utf-8", "replace"))


def sound_files(target: str, number: int) -> fuzz_originals.Files:
    """Original `number`, as it is."""
    sound = originals(target)[number % len(originals(target))]
    return {"model.gguf": sound.dump()} if target == "gguf" else sound


# --- all batches -------------------------------------------------------------------------------------------


def run_isolated(target: str, seed: int, start: int, stop: int) -> tuple[Counter[str], list[Failure]]:
    """The outcomes of cases in processes of their own; a process that dies is followed by another."""
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    # Stacks of more threads, and traces of what is caught anyway, would count as memory of a case.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    while start < stop:
        command = [
            sys.executable,
            __file__,
            "--target",
            target,
            "--seed",
            str(seed),
            "--batch",
            str(start),
            str(stop),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=600 + stop - start, check=False, env=environment
            )
            out, died = done.stdout, f"died with status {done.returncode}: {_tail(done.stderr)}"
        except subprocess.TimeoutExpired as error:
            out, died = error.stdout or b"", "hung"
        begun = start
        for line in out.decode("utf-8", "replace").splitlines():
            number, _, what = line.partition(" ")
            counts[what if what in ("refused", "loaded") else "failed"] += 1
            if what not in ("refused", "loaded"):
                failures.append(Failure(target, int(number), what))
            start = int(number) + 1
        if start < stop:
            if start == begun and b"Traceback" in (done.stderr if died != "hung" else b"") and not out:
                raise SystemExit(f"{target}: the sound files cannot be read\n{done.stderr.decode()}")
            counts["failed"] += 1
            failures.append(Failure(target, start, died))
            start += 1
    return counts, failures


def _tail(stderr: bytes) -> str:
    return " ".join(stderr.decode("utf-8", "replace").split())[-300:]


def run_all(targets: list[str], cases: int, seed: int, jobs: int) -> int:
    """Print the outcomes of `cases`, spread evenly over `targets`, and every failure; the number of failures."""
    batches = []
    for i, target in enumerate(targets):
        count = cases // len(targets) + (i < cases % len(targets))
        batches += [(target, seed, start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    counts = {target: Counter[str]() for target in targets}
    failures: list[Failure] = []
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for batch, (found, failed) in zip(
            batches, pool.map(lambda batch: run_isolated(*batch), batches), strict=True
        ):
            counts[batch[0]] += found
            failures += failed
            for failure in failed:
                print(
                    f"FAILED --target {failure.target} --case {failure.case} --seed {seed}: {failure.what}",
                    flush=True,
                )
    seconds = time.monotonic() - begun
    for target, found in counts.items():
        print(
            f"{target:12} {found['refused']:7} clear errors {found['loaded']:7} loaded {found['failed']:5} failed"
        )
    print(f"{cases} cases in {seconds:.0f} s, {cases / seconds:.0f} a second")
    return len(failures)


def show(target: str, seed: int, case: int) -> None:
    """Run one case here, without limits of memory, and leave its files."""
    folder = Path(tempfile.mkdtemp(prefix="tokenloom-fuzz-")) / "case"
    write_files(make_files(target, seed, case), folder)
    print(folder)
    TARGETS[target][1](folder, case)
    print("loaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this one")
    parser.add_argument("--case", type=int, help="one case, with its traceback")
    parser.add_argument("--batch", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.batch:
        run_batch(given.target, given.seed, *given.batch)
    elif given.case is not None:
        show(given.target or parser.error("--case needs --target"), given.seed, given.case)
    else:
        targets = [given.target] if given.target else list(TARGETS)
        sys.exit(1 if run_all(targets, given.cases, given.seed, given.jobs) else 0)


if __name__ == "__main__":
    main()

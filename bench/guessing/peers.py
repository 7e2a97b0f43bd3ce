"""`--peers`: stories with a draft model and repeated texts with look-up, beside other engines that guess.

Every engine gets the same token ids, greedily, one request at a time, and the same weights in bf16; where the texts of
`copy` come from an adapter, that is merged into the weights first. An engine's gain is its tokens/s with guessing over
its own without, both after the first token; ours is that of the adaptive pace with all else left at its default, a
peer's that of the best of its settings.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import install
from rounds import Case, Figures, Referee, Rounds, say

from guessing.embedded import copies, stories
from guessing.engines import engine_parts, serve, speculate
from guessing.merged import merge_adapter
from guessing.peer_engines import ENGINES, PLAIN, Decoded, Models, Peer
from tokenloom import SamplingParams
from tokenloom.embedded import ADAPTERS, DRAFT
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.speculator import Speculator
from tokenloom.serving.assembly import EngineParts

OURS: Final = "tokenloom"
ADAPTIVE: Final = "adaptive"
TARGET: Final = DRAFT.with_name("target")


@dataclass(frozen=True)
class Workload:
    """What every engine is asked for. `warm` are other prompts of the same kind, from which we learn our pace."""

    prompts: list[list[int]]
    warm: list[list[int]]
    max_tokens: int


def measure_peers(spec: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Both workloads with each of the engines `names`: our gain over theirs."""
    found = {}
    for name, models_of in WORKLOADS.items():
        models = models_of()
        for engine in names:
            for checkpoint in (models.target, models.draft):
                if checkpoint is not None:
                    say(f"  {checkpoint.name} for {engine}")
                    install.convert(engine, checkpoint.name, "bf16")
        with ExitStack() as stack:
            peers = {
                engine: stack.enter_context(closing(ENGINES[engine](models, spec["threads"])))
                for engine in names
            }
            found[name] = measure_workload(spec, name, models, peers)
        gains = ", ".join(f"{engine} {gain:.2f}" for engine, gain in found[name]["gains"].items())
        say(f"  {name}: tokens/s with guessing over those without: {gains}")
    return {f"{name}_over_peers": min(result["over"].values()) for name, result in found.items()} | found


def measure_workload(
    spec: dict[str, Any], name: str, models: Models, peers: Mapping[str, Peer]
) -> dict[str, Any]:
    """All engines in alternating rounds. Raises RuntimeError if our text is another one with guessing."""
    proposer = "draft" if models.draft else "ngram"
    options: dict[str, Any] = {"model": str(models.target), "speculate": (proposer,), "prefix_cache": False}
    if models.draft:
        options["draft_model"] = str(models.draft)
    kept: dict[str, Decoded] = {}
    with engine_parts(spec, **options) as parts:
        engine = parts.engine
        work = _workload(name, parts, spec["quick"])
        settings = _our_settings(engine)
        texts = _ours(engine, settings[PLAIN])(work.prompts, work.max_tokens).token_ids
        cases: dict[str, Case] = {}
        for setting, speculator in settings.items():
            decode = _ours(engine, speculator)
            decode(work.warm, work.max_tokens)
            cases[f"{OURS} {setting}"] = _case(f"{OURS} {setting}", decode, work, kept, texts)
        for peer_name, peer in peers.items():
            for setting in (PLAIN, *peer.settings):
                decode = _theirs(peer, setting)
                decode(work.warm[:2], work.max_tokens)
                cases[f"{peer_name} {setting}"] = _case(f"{peer_name} {setting}", decode, work, kept)
        found = Referee.of(spec).measure(cases)
    return summarise(found, kept, {peer_name: peer.settings for peer_name, peer in peers.items()}) | {
        "requests": len(work.prompts),
        "versions": {key: value for peer in peers.values() for key, value in peer.versions().items()},
    }


def summarise(
    found: Rounds, kept: Mapping[str, Decoded], settings: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Gains, the best setting of each peer, our gain over theirs, and what the texts say: the part of a peer's texts
    that guessing left as they were, and how far its plain texts go with ours before the first other token."""
    plain = kept[f"{OURS} {PLAIN}"].token_ids
    gains = {OURS: found.ratio(f"{OURS} {ADAPTIVE}", f"{OURS} {PLAIN}", "decode_tok_s")}
    best, unchanged, like_ours = {}, {}, {}
    for peer, names in settings.items():
        of = {name: found.ratio(f"{peer} {name}", f"{peer} {PLAIN}", "decode_tok_s") for name in names}
        best[peer] = max(of, key=of.__getitem__)
        gains[peer] = of[best[peer]]
        theirs = kept[f"{peer} {PLAIN}"].token_ids
        for name in names:
            pairs = zip(kept[f"{peer} {name}"].token_ids, theirs, strict=True)
            unchanged[f"{peer} {name}"] = sum(a == b for a, b in pairs) / len(theirs)
        like_ours[peer] = sum(map(_common, plain, theirs)) / sum(map(len, plain))
    return {
        "gains": gains,
        "best": best,
        "over": {peer: gains[OURS] / gains[peer] for peer in settings},
        "texts_unchanged": unchanged,
        "like_ours": like_ours,
        "output_tokens": sum(map(len, plain)),
        **found.summary(),
    }


def _common(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    return next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )


# --- what is asked for -----------------------------------------------------------------------------------


def _workload(name: str, parts: EngineParts, quick: bool) -> Workload:
    """Half of the requests are measured, the other half warms up."""
    if name == "story":
        requests = stories(parts, 8 if quick else 48, 64 if quick else 160)
    else:
        requests = copies(parts, 8 if quick else 32, "")
    prompts = [list(request.prompt_token_ids) for request in requests]
    half = len(prompts) // 2
    return Workload(prompts[:half], prompts[half:], requests[0].params.max_tokens)


def _story_models() -> Models:
    return Models(
        _kept("target", [TARGET], lambda folder: _copy(TARGET, folder)),
        _kept("draft", [DRAFT], lambda folder: _copy(DRAFT, folder)),
    )


def _copy_models() -> Models:
    adapter = ADAPTERS["repeat"]
    target = _kept("repeat", [TARGET, adapter], lambda folder: merge_adapter(TARGET, adapter, folder))
    return Models(target, None)


WORKLOADS: Final[dict[str, Callable[[], Models]]] = {"story": _story_models, "copy": _copy_models}


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)


def _kept(name: str, sources: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """The checkpoint among the models of the peers, made where it is not there: conversions lie beside it. Its name
    has a hash of what it is made of, so that another state of the embedded models is converted anew."""
    digest = hashlib.sha256()
    for path in (path for source in sources for path in sorted(source.iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    folder = install.MODELS / f"embedded-{name}-{digest.hexdigest()[:8]}"
    if not folder.exists():
        part = folder.with_name(f"part-{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(folder)
    return folder


# --- measuring -------------------------------------------------------------------------------------------

Decode = Callable[[Sequence[list[int]], int], Decoded]


def _case(
    name: str, decode: Decode, work: Workload, kept: dict[str, Decoded], texts: list[list[int]] | None = None
) -> Case:
    """What it gave last is kept under its name; where `texts` are given, it must be those."""

    def run(seed: str) -> Figures:
        found = kept[name] = decode(work.prompts, work.max_tokens)
        if texts is not None and found.token_ids != texts:
            raise RuntimeError(f"{name}: the text changed")
        return {
            "decode_tok_s": found.num_tokens / found.seconds,
            "tokens_per_step": found.num_tokens / found.steps,
        }

    return run


def _theirs(peer: Peer, setting: str) -> Decode:
    return lambda prompts, max_tokens: peer.decode(setting, prompts, max_tokens)


def _our_settings(engine: Engine) -> dict[str, Speculator]:
    """Plain, the adaptive pace, and chains of fixed lengths, which is what the peers do."""
    adaptive = engine.speculator
    proposers = [source.proposer for source in adaptive.sources]
    chains = {
        f"chain {depth}": speculate(
            engine, proposers, pace="fixed", max_depth=depth, max_nodes=depth, width=1
        )
        for depth in (2, 4, 8)
    }
    return {PLAIN: speculate(engine, []), ADAPTIVE: adaptive, **chains}


def _ours(engine: Engine, speculator: Speculator) -> Decode:
    def decode(prompts: Sequence[list[int]], max_tokens: int) -> Decoded:
        engine.speculate(speculator)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs, seconds, steps = [], 0.0, 0
        for number, prompt in enumerate(prompts):
            request = Request(request_id=f"p{number}", prompt_token_ids=prompt, params=params.with_seed(0))
            served = serve(engine, [request])
            outputs += served.texts().values()
            seconds += served.decode_seconds
            steps += len(served.decoding)
        return Decoded(outputs, seconds, steps)

    return decode

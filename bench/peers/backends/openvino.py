"""OpenVINO GenAI: its continuous-batching pipeline on a converted model, prefix cache on."""

from __future__ import annotations

import os
import sys

import numpy as np
import openvino
import openvino_genai
from workloads import Request

from backends import Engine

CACHE_GB = 2


class Backend:
    """Defaults, but for the size of the cache, the prefix cache, and the number of threads."""

    def __init__(self, engine: Engine) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        properties = {"INFERENCE_NUM_THREADS": engine.threads} | engine.options
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(engine.model, scheduler, "CPU", properties)

    def generate(self, requests: list[Request]) -> list[list[int]]:
        inputs = [openvino.Tensor(np.array([request.prompt], dtype=np.int64)) for request in requests]
        results = self._pipeline.generate(inputs, [_config(request) for request in requests])
        return [list(result.m_generation_ids[0]) for result in results]

    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "openvino_genai": openvino_genai.__version__}

    def close(self) -> None:
        # Its destructors sometimes hang when the interpreter ends; there is nothing left to save.
        sys.stderr.flush()
        os._exit(0)


def _config(request: Request) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = request.num_output
    config.ignore_eos = True
    config.do_sample = False
    config.eos_token_id = 2
    return config

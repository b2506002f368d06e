"""mergekit's side of a search step; runs in mergekit's environment, and knows nothing of AutoMerge.

Arguments: the model's configuration as JSON, and the files of the base and two sources. Then each line of the standard
input is a merge, ``[technique, weights, density]``; its seconds are printed: `merge_state_dicts`, `load_state_dict`.
"""

import json
import sys
import time

import torch
from mergekit.merge_methods import merge_state_dicts  # type: ignore[import-not-found]
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def main(config: str, base: str, first: str, second: str) -> None:
    """Merge until the standard input ends."""
    model = LlamaForCausalLM(LlamaConfig(**json.loads(config))).eval()
    sources = {"a": load_file(first), "b": load_file(second)}
    states = {"base": load_file(base), **sources}
    for line in sys.stdin:
        technique, weights, density = json.loads(line)
        with torch.no_grad():
            begin = time.perf_counter()
            if technique == "linear":
                merged = merge_state_dicts(sources, "linear", parameters={"weight": weights})
            else:
                parameters = {"weight": weights, "density": density, "lambda": 1.0}
                if technique == "task_arithmetic":
                    del parameters["density"]
                merged = merge_state_dicts(states, technique, base="base", parameters=parameters)
            model.load_state_dict(merged, strict=False)  # the tied head is in no file
            seconds = time.perf_counter() - begin
        print(seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""VLLM_PYTHON -P kit/vllm_worker.py ASK.json: greedy replies by vLLM, run by kit.external in the Python that has vLLM; needs nothing of the kit.

vLLM and Unsloth pin other versions of torch and transformers, so that one environment cannot hold both.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    ask = json.loads(path.read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams

    model = LLM(
        model=ask["model"], revision=ask["revision"], dtype=ask["dtype"], max_model_len=ask["max_model_len"], seed=0, trust_remote_code=False,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=ask["max_new_tokens"], stop_token_ids=ask["stop"], detokenize=False)
    made = model.generate([{"prompt_token_ids": ids} for ids in ask["prompts"]], greedy)
    path.with_name("replies.json").write_text(json.dumps({"replies": [list(m.outputs[0].token_ids) for m in made]}), encoding="utf-8")


if __name__ == "__main__":
    main()

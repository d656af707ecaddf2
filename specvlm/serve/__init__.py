"""A server of a pair that speaks OpenAI's chat completions: `python -m specvlm.serve`."""

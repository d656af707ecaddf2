"""Serve a pair over OpenAI's chat completions API: `python -m specvlm.serve`."""

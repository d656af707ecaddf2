"""Print the folder of the tasks: `lmms-eval --include_path "$(python -m specvlm_lmms_eval)" …`."""

from specvlm_lmms_eval import TASKS

print(TASKS)

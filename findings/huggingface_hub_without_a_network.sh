#!/usr/bin/env bash
# huggingface_hub 2.4.0: the same refused connection (a compute node without a network, played by a closed port of this
# machine) met by asking for a model and by downloading its file.
#
# Guess: both raise something that "except OSError" catches, as a refused connection is one in Python.
# Seen: model_info and create_repo raise httpx2's ConnectError, which is neither an OSError nor an error of
# huggingface_hub; hf_hub_download turns the same failure into LocalEntryNotFoundError, which is a FileNotFoundError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check huggingface_hub==2.4.0
seen=$(HF_HOME=$folder HF_ENDPOINT=http://127.0.0.1:9 "$folder/venv/bin/python" -W ignore -c '
import huggingface_hub
calls = {
    "model_info": lambda: huggingface_hub.HfApi().model_info("lab/model"),
    "create_repo": lambda: huggingface_hub.HfApi(token="none").create_repo("lab/model"),
    "hf_hub_download": lambda: huggingface_hub.hf_hub_download("lab/model", "model.safetensors"),
}
for name, call in calls.items():
    try:
        call()
    except Exception as error:
        kind = type(error)
        print(name, kind.__module__.split(".")[0] + "." + kind.__name__, "is an OSError:", isinstance(error, OSError))')
echo "$seen"
[ "$(echo $seen)" = "model_info httpx2.ConnectError is an OSError: False create_repo httpx2.ConnectError is an OSError: False hf_hub_download huggingface_hub.LocalEntryNotFoundError is an OSError: True" ]

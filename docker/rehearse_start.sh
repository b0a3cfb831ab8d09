#!/usr/bin/env bash
# Plays how the platform's agent starts the app, without Docker and without a platform:
#
#   docker/rehearse_start.sh [--pip-only] [ENVIRONMENT]
#
# ENVIRONMENT is a virtual environment with requirements.txt installed, in place of the image's; none
# makes one (2 GB). The variables come from docker/Dockerfile, the command from config.json, and the
# platform is the one that the tests use. --pip-only stops before the app is started. PORT names
# another port than config.json. Exit codes: 0 it would start, 1 it would not.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
pip_only=
if [[ ${1:-} == --pip-only ]]; then
    pip_only=1
    shift
fi
scene=$(mktemp -d)
children=()
clean_up() {
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    rm -rf "$scene"
}
trap clean_up EXIT

fail() {
    printf 'It would not start: %s\n' "$1" >&2
    exit 1
}

# Runs a command, shows the end of what it printed, its seconds and its status, and gives the latter.
timed() {
    local status=0 began=$EPOCHREALTIME
    "$@" >"$scene/output" 2>&1 || status=$?
    tail -n 2 "$scene/output" | cut -c -160 | sed 's/^/    /'
    awk -v a="$began" -v b="$EPOCHREALTIME" -v s="$status" \
        'BEGIN { printf "    %.1f s, exit status %d\n", b - a, s }'
    return "$status"
}

# The last stage's variables, with those of the stages it is made from.
image_variables() {
    python3 - "$root/docker/Dockerfile" <<'PYTHON'
import shlex, sys

lines = [line for line in open(sys.argv[1]) if not line.startswith("#")]
stages, variables = {}, {}
for line in "".join(lines).replace("\\\n", " ").splitlines():
    keyword, *words = shlex.split(line) or [""]
    if keyword == "FROM":
        variables = dict(stages.get(words[0], {}))
        stages[words[2] if len(words) > 2 else ""] = variables
    elif keyword == "ENV":
        variables.update(word.split("=", 1) for word in words)
print(*(f"{name}={value}" for name, value in variables.items()), sep="\n")
PYTHON
}

environment=${1:-}
if [[ -z $environment ]]; then
    environment=$scene/environment
    printf 'Making an environment like the image ...\n'
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --requirement "$root/requirements.txt"
fi
environment=$(cd "$environment" && pwd)

mapfile -t image < <(image_variables)
printf 'The image sets:\n'
printf '    %s\n' "${image[@]}"
[[ " ${image[*]} " == *" PIP_NO_INDEX=1 "* ]] || fail "pip would reach for an index."
grep -q 'mkdir -p /root/.cache/pip' "$root/docker/Dockerfile" || fail "there is no cache folder."
mkdir -p "$scene/home/.cache/pip" "$scene/data" "$scene/bin" "$scene/repo"
# A container's commands, whatever their names in the environment.
printf '#!/bin/sh\nexec "%s" "$@"\n' "$environment/bin/python" >"$scene/bin/python3"
printf '#!/bin/sh\nexec "%s" -m pip "$@"\n' "$environment/bin/python" >"$scene/bin/pip3"
chmod +x "$scene/bin/"*

# The repository as the agent unpacks it, with what is not committed yet.
(cd "$root" && git ls-files -z --cached --others --exclude-standard |
    tar --create --null --ignore-failed-read --files-from - 2>/dev/null) |
    tar --extract --directory "$scene/repo"

in_container() {
    env -i "${image[@]}" PATH="$scene/bin:$environment/bin:/usr/local/bin:/usr/bin:/bin" \
        HOME="$scene/home" LANG=C.UTF-8 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 \
        "${session[@]}" "$@"
}
session=()

packages=$(in_container pip3 freeze --all)
printf 'pip3 install --upgrade setuptools==69.0.0 (its status is ignored):\n'
timed in_container pip3 install --disable-pip-version-check --upgrade setuptools==69.0.0 || true
printf 'pip3 install -r requirements.txt:\n'
timed in_container pip3 install --disable-pip-version-check -r "$scene/repo/requirements.txt" ||
    fail "requirements.txt is not what is installed."
[[ $(in_container pip3 freeze --all) == "$packages" ]] || fail "pip changed what is installed."
printf 'Copy of the cache folder:\n'
timed cp -r "$scene/home/.cache/pip" "$scene/cache" || fail "there is no cache folder."
[[ -z $pip_only ]] || exit 0

# A platform that remembers that a model was deployed here before: the demo checkpoint, as a
# published one is more than a rehearsal should download.
(
    cd "$scene/repo/tests/contract"
    export PYTHONPATH="$scene/repo:$scene/repo/src"
    exec "$environment/bin/python" -
) >"$scene/platform" <<'PYTHON' &
import threading
from platform_double import TASK_ID, TOKEN, PlatformDouble

demo = {"model_name": "demo", "model_files": {"checkpoint": "demo"}}
params = {
    "model_source": "Pretrained models",
    "model_files": demo["model_files"],
    "model_info": {"Model": "demo", "meta": {**demo, "task_type": "prompt-based object detection"}},
    "device": None,
    "runtime": "PyTorch",
}
platform = PlatformDouble()
platform.start()
platform.state.task_fields["autoRestartInfo"] = {"deployParams": params}
print(platform.address, TOKEN, TASK_ID, flush=True)
threading.Event().wait()
PYTHON
children+=($!)
for _ in {1..300}; do
    [[ -s $scene/platform ]] && break
    sleep 0.1
done
read -r address token task <"$scene/platform" || fail "the stand-in of the platform did not start."

read_manifest() { python3 -c "import json; print(json.load(open('$root/config.json'))['$1'])"; }
port=${PORT:-$(read_manifest port)}
# Nobody else is to reach a rehearsal; in a container the platform has to.
command=$(read_manifest entrypoint | sed "s/--host [^ ]*/--host 127.0.0.1/; s/--port [^ ]*/--port $port/")
session=(
    ENV=production APP_MODE=production APP_NAME="$(read_manifest name)" LOG_LEVEL=INFO LOGLEVEL=INFO
    SERVER_ADDRESS="$address" API_TOKEN="$token" TASK_ID="$task" TEAM_ID=1 WORKSPACE_ID=1 USER_ID=1
    SLY_APP_DATA_DIR="$scene/data" SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK=true
    "modal.state.autostart=true"
)
printf '%s:\n' "$command"
in_container bash -c "cd $scene/repo && exec $command" >"$scene/log" 2>&1 &
app=$!
children+=("$app")

timed "$environment/bin/python" - "http://127.0.0.1:$port" "$scene/repo" "$app" <<'PYTHON' ||
import os, sys, time
import requests

url, repository, process = sys.argv[1:]
began = time.monotonic()
while True:
    try:
        if requests.get(f"{url}/is_ready", timeout=5).ok:
            break
    except requests.RequestException:
        pass
    try:
        os.kill(int(process), 0)
    except OSError:
        sys.exit("the app ended before it was ready")
    if time.monotonic() - began > 300:
        sys.exit("the app was not ready in 300 s")
    time.sleep(0.1)
print(f"ready after {time.monotonic() - began:.1f} s", end="; ")
with open(f"{repository}/demo/images/scene_bike.png", "rb") as image:
    answer = requests.post(f"{url}/inference_image", files={"files": image}, timeout=60)
answer.raise_for_status()
print(len(answer.json()["annotation"]["objects"]), "objects in the demo image")
requests.post(f"{url}/sly/shutdown", json={}, timeout=60)
PYTHON
    { tail -n 20 "$scene/log" | cut -c -300 >&2; fail "see the log above."; }
status=0
wait "$app" || status=$?
printf '    ended with exit status %d\n' "$status"
[[ $status == 0 ]] || fail "a session that is stopped would look failed."

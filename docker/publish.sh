#!/usr/bin/env bash
# Builds and pushes both images under the tag that config.json names. CI does the same for the first.
set -euo pipefail
cd "$(dirname "$0")/.."
image=$(python3 -c 'import json; print(json.load(open("config.json"))["docker_image"])')
docker build --file docker/Dockerfile --tag "$image" .
docker build --file docker/Dockerfile.deploy --tag "$image-deploy" .
docker push "$image"
docker push "$image-deploy"

#!/usr/bin/env bash
# Build the wheel of this commit and try it in an empty folder: bash tools/release.sh [OUT, by default build/release]
# PYTHON names the interpreter, which has bushpc's dependencies; the wheel is installed beside them, not over them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
python=$(realpath --no-symlinks "$(command -v "$python")")
out=$(realpath --canonicalize-missing "${1:-build/release}")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
fail() { echo "release: $*" >&2; exit 2; }

[ -z "$(git status --porcelain)" ] || fail "the tree has changes that no commit holds; commit or remove them"
grep -q "^## $version" CHANGELOG.md || fail "CHANGELOG.md has no section '## $version'; write it"
grep -q "^version: $version$" CITATION.cff || fail "CITATION.cff names another version than pyproject.toml ($version)"
"$python" -m tools.docs.pictures --check || fail "pictures of the documentation are out of date"
case "${GITHUB_REF_NAME:-v$version}" in "v$version") ;; *) fail "the tag is ${GITHUB_REF_NAME}, the version $version" ;; esac

rm -rf "$out"
mkdir -p "$out"
"$python" -m pip wheel . --quiet --no-deps --no-build-isolation -w "$out"
rm -rf build/lib build/bdist.*

try=$(mktemp -d)
trap 'rm -rf "$try"' EXIT
"$python" -m pip install --quiet --no-deps --no-index --target "$try/site" "$out"/*.whl
mkdir "$try/empty"
cd "$try/empty"
export PYTHONPATH=$try/site
bushpc() { "$python" -m bushpc.cli "$@"; }
bushpc --version | tee version
grep -q "^bushpc $version, commit $(git -C "$OLDPWD" rev-parse HEAD)" version || fail "the wheel names another version or commit"
bushpc pack data=phantom count=10 out=shards/phantom >/dev/null
bushpc shards list --json >/dev/null
bushpc config model=xbusnet data=breast --json >/dev/null
echo "$out: $(ls "$out")"

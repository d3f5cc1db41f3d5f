# shellcheck shell=bash
# For the scripts of the examples, which set OUT, their folder. `step NAME COMMAND...` runs a command from the repository's
# folder, once: what is done is not run again, and its log is $OUT/logs/NAME.log. `beside NAME COMMAND...` starts one
# beside what follows, and `join` waits for those. With LIST_STEPS=1 names and commands are printed, and nothing runs.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

step() {
  python -m examples.stages "$OUT" "$@"
}

# exec, so that what the trap ends is the step itself; cat, since another step may have the terminal's last line.
beside() {
  { exec python -m examples.stages "$OUT" "$@"; } | cat &
}

join() {
  while [[ -n $(jobs -p) ]]; do wait -n; done  # whichever ends first: a failure is not kept waiting
}

if [[ -n ${LIST_STEPS:-} ]]; then
  step() {
    printf '%s\0' "$@"
    printf '\n'
  }
  beside() { step "$@"; }
elif ! python -c "import rich, pydantic" 2> /dev/null; then
  echo "error: \`python\` is not that of this repository; run: make install && source .venv/bin/activate" >&2
  exit 1
fi

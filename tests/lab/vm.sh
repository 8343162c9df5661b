#!/bin/sh
# Run the fault lab under a stock kernel: tests/lab/vm.sh VERSION [ARGUMENT OF THE LAB]...
# The report goes into .lab, as that of the own kernel does.
set -eu
cd "$(dirname "$0")/../.."

[ $# -gt 0 ] || { echo "usage: tests/lab/vm.sh VERSION [ARGUMENT]..." >&2; exit 2; }
version=$1 && shift
# With a counted clock (tests/vm.sh) a busy machine takes no processor from this one; with one processor, which all three
# kernels start so, the lab causes one at a time of the failures that load it. SHOAL_VM_OPTIONS is for something else.
clock=${SHOAL_VM_OPTIONS--i 2 -c 1}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
status=0
# shellcheck disable=SC2086 # words, or none
SHOAL_VM_TIMEOUT=${SHOAL_VM_TIMEOUT:-7200} tests/vm_disk.sh $clock "$version" "$out" -- \
    .venv/bin/python -m tests.lab run --output "$out" --interval 30 --patience 1200 "$@" || status=$?
mkdir -p .lab
cp -r "$out/." .lab/
exit $status

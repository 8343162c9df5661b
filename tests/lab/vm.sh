#!/bin/sh
# Run the fault lab under a stock kernel: tests/lab/vm.sh VERSION [ARGUMENT OF THE LAB]...
#
# What the lab needs of this machine goes onto a disk image: read file by file from this machine's root (9p, which keeps
# nothing in memory) a Python takes minutes to start. The report goes into .lab, as that of the own kernel does.
set -eu
cd "$(dirname "$0")/../.."

[ $# -gt 0 ] || { echo "usage: tests/lab/vm.sh VERSION [ARGUMENT]..." >&2; exit 2; }
version=$1 && shift
for tool in mksquashfs busybox; do
    command -v $tool >/dev/null || { echo "lab: $tool is missing: apt-get install squashfs-tools busybox-static" >&2; exit 2; }
done
work=$(mktemp -d)
tail=
trap '[ -z "$tail" ] || kill "$tail" 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# Programs, libraries and the repository, without what is large and not run.
python=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
case $python in /usr) python= ;; esac
{
    find /usr/bin /usr/sbin /usr/lib -xdev -type f -size +20M ! -name 'prometheus*'
    find "$PWD/.venv" ${python:+"$python"} -xdev -type f \( -size +4M -o -name '*.a' \) ! -path '*/lib/libpython*'
    find /usr/lib/x86_64-linux-gnu -xdev -name '*.a'
    printf '%s\n' /usr/lib/jvm /usr/lib/google-cloud-sdk /usr/lib/llvm-* /usr/lib/gcc /usr/lib/node_modules /usr/lib/debug \
        /usr/lib/postgresql /usr/lib/python3/dist-packages /usr/lib/x86_64-linux-gnu/dri /usr/lib/x86_64-linux-gnu/vdpau
    [ -z "$python" ] || printf '%s\n' "$python"/lib/python3*/site-packages "$python"/lib/python3*/test
} | sed 's|^/||' >"$work/without"
tar -C / --exclude-from="$work/without" --one-file-system -cf - \
    bin sbin lib lib64 etc usr/bin usr/sbin usr/lib usr/lib64 usr/share/prometheus "${PWD#/}/exporter" "${PWD#/}/rules" "${PWD#/}/tests/lab" \
    "${PWD#/}/.venv" ${python:+"${python#/}"} 2>/dev/null |
    mksquashfs - "$work/image" -tar -noI -noD -noF -noX -no-xattrs -quiet -no-progress >/dev/null

# What the lab says is shown as it comes; what the machine's start says, only if it fails.
mkdir -p .lab "$work/out"
: >"$work/out/said"
tail -f "$work/out/said" &
tail=$!
status=0
SHOAL_VM_TIMEOUT=${SHOAL_VM_TIMEOUT:-3600} tests/vm.sh -w "$work/out" -d "$work/image" -m 3G "$version" -- \
    busybox sh "$PWD/tests/lab/vm_init.sh" "$PWD" "$work/out" "$@" >"$work/vm" 2>&1 || status=$?
sleep 1
kill $tail
tail=
[ $status != 125 ] || cat "$work/vm" >&2
rm "$work/out/said"
cp -r "$work/out/." .lab/
exit $status

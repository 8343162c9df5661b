#!/bin/sh
# As vm.sh, for commands that start many programs: what they need of this machine's files is on a disk that the kernel caches.
#
#   tests/vm_disk.sh [-k PATH]... [-c CPUS] [-i SHIFT] [-m MEMORY] [-a KERNEL_ARGUMENT]... VERSION OUT -- COMMAND [ARGUMENT]...
#
# Over 9p, which keeps nothing in memory, a Python takes minutes to start. The machine's root is that disk with a layer in
# memory above it, so everything can be written to; what is written to OUT outlives the machine. The command runs in this
# repository, and what it says is shown as it comes. PATH is something that is large and otherwise left out, such as a
# compiler. The other options are those of vm.sh.
set -eu
cd "$(dirname "$0")/.."

usage() {
    sed -n '3,4s/^# *//p' "$0" >&2
    exit 2
}

keep=
memory=3G
options=
while getopts k:c:i:m:a: option; do
    case $option in
    k) keep="$keep
${OPTARG#/}" ;;
    m) memory=$OPTARG ;;
    *) [ "$option" != '?' ] && options="$options -$option $OPTARG" || usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 3 ] && [ "$3" = -- ] || usage
version=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 3
for tool in mksquashfs busybox; do
    command -v $tool >/dev/null || { echo "vm_disk.sh: $tool is missing: apt-get install squashfs-tools busybox-static" >&2; exit 2; }
done
work=$(mktemp -d)
tail=
trap '[ -z "$tail" ] || kill "$tail" 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# Programs, libraries and the repository, without what is large and not run.
python=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
case $python in /usr) python= ;; esac
printf '%s\n' "$keep" >"$work/keep"
{
    find /usr/bin /usr/sbin /usr/lib -xdev -type f -size +20M ! -name 'prometheus*'
    find "$PWD/.venv" ${python:+"$python"} -xdev -type f \( -size +4M -o -name '*.a' \) ! -path '*/lib/libpython*'
    find /usr/lib/x86_64-linux-gnu -xdev -name '*.a'
    printf '%s\n' /usr/lib/jvm /usr/lib/google-cloud-sdk /usr/lib/llvm-* /usr/lib/gcc /usr/lib/node_modules /usr/lib/debug \
        /usr/lib/postgresql /usr/lib/python3/dist-packages /usr/lib/x86_64-linux-gnu/dri /usr/lib/x86_64-linux-gnu/vdpau
    [ -z "$python" ] || printf '%s\n' "$python"/lib/python3*/site-packages "$python"/lib/python3*/test
} | sed 's|^/||' | grep -vxFf "$work/keep" >"$work/without"
tar -C / --exclude-from="$work/without" --one-file-system -cf - \
    bin sbin lib lib64 etc usr/bin usr/sbin usr/lib usr/lib64 usr/share/prometheus "${PWD#/}/exporter" "${PWD#/}/rules" \
    "${PWD#/}/tests" "${PWD#/}/pyproject.toml" "${PWD#/}/.venv" ${python:+"${python#/}"} 2>/dev/null |
    mksquashfs - "$work/image" -tar -noI -noD -noF -noX -no-xattrs -quiet -no-progress >/dev/null

# What the command says is shown as it comes; what the machine's start says, only if it fails.
: >"$out/said"
tail -f "$out/said" &
tail=$!
status=0
# shellcheck disable=SC2086 # options are separate words
tests/vm.sh -w "$out" -d "$work/image" -m "$memory" $options "$version" -- \
    busybox sh "$PWD/tests/vm_disk_init.sh" "$PWD" "$out" "$@" >"$work/vm" 2>&1 || status=$?
sleep 1
kill $tail
tail=
[ $status != 125 ] || cat "$work/vm" >&2
rm "$out/said"
exit $status

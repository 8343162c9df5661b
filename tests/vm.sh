#!/bin/sh
# Run a command under a stock Debian kernel, in a virtual machine without KVM, with this machine's files (read-only).
#
#   tests/vm.sh [-w DIR] [-d IMAGE] [-m MEMORY] [-c CPUS] [-i SHIFT] [-a KERNEL_ARGUMENT]... VERSION -- COMMAND [ARGUMENT]...
#   tests/vm.sh 6.1 -- uname -r
#   tests/vm.sh -w /tmp/out -a psi=0 6.12 -- python3 tests/record_fixtures.py /tmp/out/6.12
#
# VERSION is 5.10, 6.1 or 6.12, MEMORY what the machine has (1G), CPUS how many processors (2), IMAGE a disk that it sees as
# /dev/vda. DIR is the only directory that the command can write to and that outlives the machine. The command runs as root
# with SHOAL_VM=1 set; its output and its exit status become this script's. Kernels are fetched once, with apt as it is
# configured here, into a cache outside the repository.
# With SHIFT the machine's clock counts its instructions, each as 2^SHIFT nanoseconds, and skips the time in which it is idle: it
# has as much of a processor as ever, however busy this machine is. Waiting for this machine's disk is idle too, so that seems
# slower then. 5.10 and 6.1 hang with it when they start their second processor.
# SHOAL_VM_TIMEOUT is in seconds (180); SHOAL_VM_CACHE moves the cache.
set -eu

cache=${SHOAL_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/shoal-vm}
limit=${SHOAL_VM_TIMEOUT:-180}

fail() {
    echo "vm.sh: $*" >&2
    exit 125
}

share=
# Without KVM the check of the timer fails now and then, when the machine is busy, and the kernel panics.
arguments="--append no_timer_check"
memory=1G
cpus=2
while getopts w:a:d:m:c:i: option; do
    case $option in
    d) arguments="$arguments --disk $OPTARG" ;;
    w) mkdir -p "$OPTARG" && share=$(cd "$OPTARG" && pwd) ;;
    m) memory=$OPTARG ;;
    c) cpus=$OPTARG ;;
    i) arguments="$arguments --qemu-opts=-icount --qemu-opts=shift=$OPTARG,sleep=off" ;;
    a) arguments="$arguments --append $OPTARG" ;;
    *) fail "usage: vm.sh [-w DIR] [-d IMAGE] [-m MEMORY] [-c CPUS] [-i SHIFT] [-a KERNEL_ARGUMENT]... VERSION -- COMMAND..." ;;
    esac
done
shift $((OPTIND - 1))
version=${1:-}
case $version in
5.10) suite=bullseye ;;
6.1) suite=bookworm ;;
6.12) suite=trixie ;;
*) fail "no kernel '$version': 5.10, 6.1 and 6.12 are known" ;;
esac
[ "${2:-}" = -- ] && [ $# -gt 2 ] || fail "a command is missing after: $version --"
shift 2

[ "$(id -u)" = 0 ] || fail "must be root, so that the command is root inside"
for tool in qemu-system-x86_64 depmod busybox dpkg-deb apt-get; do
    command -v $tool >/dev/null || fail "$tool is missing: apt-get install qemu-system-x86 kmod busybox-static"
done
tools=$(dirname "$(readlink -f "$0")")/../.venv/bin
[ -x "$tools/vng" ] || fail "virtme-ng is missing: make .venv/dev installs it, from the lock"
mkdir -p "$cache"

# An apt of its own beside the machine's: same mirror, keys and proxy, another suite, other lists.
suite_apt() {
    tool=$1 && shift
    "$tool" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$cache/apt/$suite/parts" \
        -o Dir::State::lists="$cache/apt/$suite/lists" -o Dir::Cache="$cache/apt/$suite/cache" \
        -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}

fetch_kernel() {
    # shellcheck source=/dev/null
    own=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$own" ] || fail "this machine's own Debian suite is unknown: /etc/os-release has no VERSION_CODENAME"
    mkdir -p "$cache/apt/$suite/parts" "$cache/apt/$suite/lists/partial" "$cache/apt/$suite/cache/archives/partial"
    for list in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
        case $list in
        *.sources) grep -qx "Suites:.*\b$own\b.*" "$list" || continue ;;
        *) grep -qs "^deb .*debian.* ${own}[ /-]" "$list" || continue ;;
        esac
        sed "s/\b$own\b/$suite/g" "$list" >"$cache/apt/$suite/parts/$(basename "$list")"
    done
    suite_apt apt-get update -qq >&2 || fail "apt cannot read the lists of $suite"
    # The newest stock image of the series by name: the meta package may name a newer series.
    for package in $(suite_apt apt-cache pkgnames "linux-image-$version." |
        grep -- '-amd64$' | grep -Ev -- '-(cloud|rt)-' | sort -rV); do
        (cd "$cache" && suite_apt apt-get download -qq "$package" >&2) || continue
        release=${package#linux-image-}
        rm -rf "$cache/partial" && mkdir "$cache/partial"
        dpkg-deb -x "$cache/${package}_"*.deb "$cache/partial" && rm "$cache/${package}_"*.deb
        [ -e "$cache/partial/lib" ] || ln -s usr/lib "$cache/partial/lib"
        depmod -b "$cache/partial" "$release"
        mv "$cache/partial" "$cache/$version"
        echo "$release" >"$cache/$version/release"
        return
    done
    fail "no stock kernel $version could be fetched from $suite"
}

(
    flock 9
    [ -e "$cache/$version/release" ] || fetch_kernel
) 9>"$cache/lock" || exit 125

# The guest's console carries kernel messages too, so the command's own output and status come back in files.
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
{
    echo "export SHOAL_VM=1"
    printf 'cd %s\n' "'$PWD'"
    for word in "$@"; do
        printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
    done
} >"$run/command"
kernel=$cache/$version/boot/vmlinuz-$(cat "$cache/$version/release")
# vng looks for its other half on the path.
# shellcheck disable=SC2086 # kernel arguments are separate words
PATH=$tools:$PATH timeout --kill-after=10 "$limit" vng --verbose --disable-kvm --memory "$memory" --cpus "$cpus" --run "$kernel" --user root $arguments \
    --rwdir "$run" ${share:+--rwdir "$share"} \
    -- "sh $run/command >$run/output 2>&1; echo \$? >$run/status" </dev/null >"$run/console" 2>&1 || true
cat "$run/output" 2>/dev/null || true
if [ ! -s "$run/status" ]; then
    tail -n 30 "$run/console" >&2
    fail "the machine did not finish within $limit s or did not start; the end of its console is above"
fi
exit "$(cat "$run/status")"

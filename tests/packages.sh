#!/bin/sh
# See to it that the programs which the tests run are there: as root they are installed, otherwise they are named.
set -eu

# Debian keeps some of them where only root's path looks.
PATH=$PATH:/usr/sbin:/sbin
missing=
need() { # program package
    command -v "$1" >/dev/null || missing="$missing $2"
}
need promtool prometheus
need amtool prometheus-alertmanager
need prometheus-node-exporter prometheus-node-exporter
need prometheus-redis-exporter prometheus-redis-exporter
need redis-server redis-server
need redis-cli redis-tools
need ip iproute2
need nft nftables
need conntrack conntrack
need iptables-nft iptables
need setpriv util-linux
need nstat iproute2
need sysctl procps
need arping iputils-arping
need ping iputils-ping
need mkfs.ext4 e2fsprogs
need dmsetup dmsetup
need qemu-system-x86_64 qemu-system-x86
need depmod kmod
need mksquashfs squashfs-tools
need openssl openssl
need curl curl
need dockerd docker.io
need busybox busybox-static
need gcc gcc
need systemd-analyze systemd
need systemd-nspawn systemd-container
[ -e /usr/lib/"$(uname -m)"-linux-gnu/libseccomp.so.2 ] || missing="$missing libseccomp2"
[ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the tests need these Debian packages:$missing" >&2
    exit 1
fi
# Debian starts a service when it installs its package; the tests start their own and want the ports free.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
# shellcheck disable=SC2086 # a list of packages, meant to be split
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null

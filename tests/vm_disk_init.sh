#!/bin/sh
# Inside the virtual machine of vm_disk.sh: make the image the root, and run a command there.
# Arguments: DIRECTORY OUT COMMAND [ARGUMENT]...
set -eu
directory=$1 out=$2
shift 2

# The machine's own programs come over 9p; busybox is one of them, and does all that must be done before the change.
for module in virtio_blk squashfs overlay loop; do
    busybox modprobe $module 2>/dev/null || true
done
root=/run/root
busybox mkdir -p $root /run/image /run/changes
busybox mount -t squashfs -o ro /dev/vda /run/image
busybox mount -t tmpfs tmpfs /run/changes
busybox mkdir /run/changes/upper /run/changes/work
busybox mount -t overlay -o lowerdir=/run/image,upperdir=/run/changes/upper,workdir=/run/changes/work overlay $root
# No file system on /tmp: the repository may be below it. What is changed is in memory all the same.
busybox mkdir -p $root/run $root/tmp $root/var/log $root/root
for place in /proc /sys /dev "$out"; do
    busybox mkdir -p "$root$place"
    busybox mount --rbind "$place" "$root$place"
done
# The modules are a link to where they were unpacked.
modules=/lib/modules/$(busybox uname -r)
busybox mkdir -p "$root$modules"
busybox mount --bind "$(busybox readlink -f "$modules")" "$root$modules"
cd $root
exec busybox chroot . /bin/sh -c 'cd "$0" && exec "$@"' "$directory" "$@" >"$out/said" 2>&1

#!/usr/bin/env bash
# First process of a pretend host (see pretend.py), in namespaces of its own: private folders, an address, then sshd.
#   host.sh FOLDER NAME ADDRESS GATEWAY [VISIBLE ...]
set -euo pipefail
folder=$1 name=$2 address=$3 gateway=$4
shift 4

mount --make-rprivate /
hostname "$name"
mkdir -p "$folder"/tmp "$folder"/root
chmod 1777 "$folder/tmp"
for kept in "$@"; do # what lies under /tmp or /root would vanish behind the private ones
  case $kept in
    /tmp/* | /root/*) mkdir -p "$folder$kept" && mount --bind "$kept" "$folder$kept" ;;
  esac
done
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/lock
cp "$folder/../hostkey" "$folder/../authorized_keys" /run/sshd/
mount -t tmpfs -o size=1500m,mode=1777 tmpfs /dev/shm
mount --rbind "$folder/root" /root
mount --rbind "$folder/tmp" /tmp # last, since $folder may lie there
mount -t proc proc /proc
cd /

until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done # which pretend.py hands over
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$gateway" # Ray finds its own address by the way to the outside

exec /usr/sbin/sshd -D -e -f /dev/null -h /run/sshd/hostkey -p 22 -o AuthorizedKeysFile=/run/sshd/authorized_keys \
  -o StrictModes=no -o PermitRootLogin=yes -o UsePAM=no -o PidFile=none -o Subsystem="sftp internal-sftp" \
  -o MaxStartups=100 -o MaxSessions=100

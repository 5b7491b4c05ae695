#!/bin/bash
# A Ceph cluster on loopback to compare Ogee with: one monitor, one manager, three OSDs on plain files of one file system.
# scripts/bench/install-deps.sh installs its packages.
#
#   ceph.sh run DIR        start it (making it in DIR the first time), print `ready`, and stop it at the end of standard
#                          input; so it ends with its caller, however that ends. The data stays
#   ceph.sh up DIR         start it and leave it running: for trying things by hand
#   ceph.sh stop DIR       stop it; the data stays
#   ceph.sh purge DIR      stop it and remove DIR
#
# DIR/ceph.conf is a client's configuration with Ceph's defaults, DIR/ceph-nocache.conf the same with `rbd_cache = false`,
# DIR/run/*.pid name the daemons. OGEE_BENCH_OSD_GIB sets the size of an OSD's file (6).
#
# What is not Ceph's default, and why: cephx, checksums and messenger are as installed; the OSDs get the settings that Ceph
# itself chooses on a disk that calls itself non-rotational, because virtio disks call themselves rotational; each OSD is its own
# failure domain; a file is written in full before its first use, so that no write has to allocate space in the file system.
set -euo pipefail

OSDS=3
PGS=64
MARK=ogee-bench-ceph # a file that says that DIR is ours
OSD_GIB=${OGEE_BENCH_OSD_GIB:-6}

die() { echo "ceph.sh: $*" >&2; exit 1; }

ceph_() { timeout 60 ceph -c "$DIR/ceph.conf" --connect-timeout 20 "$@"; }

free_port() { # a listening port below the range of outgoing connections
    local port taken
    taken=$(ss -Htln | awk '{ sub(/.*:/, "", $4); print $4 }')
    for _ in $(seq 100); do
        port=$((20000 + RANDOM % 10000))
        grep -qx "$port" <<<"$taken" || { echo "$port"; return; }
    done
    die "no free port"
}

empty_ours() { # nothing of a stranger is ever removed
    [ -e "$DIR/$MARK" ] || [ -z "$(ls -A "$DIR")" ] || die "$DIR holds something else"
    find "$DIR" -mindepth 1 -delete
}

new_keyring() { # FILE ENTITY CAP...
    local file=$1 entity=$2
    shift 2
    ceph-authtool --create-keyring "$file" --gen-key -n "$entity" "$@" >/dev/null
}

write_config() {
    local fsid=$1 mon=$2
    cat >"$DIR/ceph.conf" <<CONF
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$mon]
mon_initial_members = m
public_network = 127.0.0.0/8
ms_bind_ipv6 = false
run_dir = $DIR/run
pid_file = $DIR/run/\$name.pid
admin_socket = $DIR/run/\$name.asok
log_file = $DIR/log/\$name.log
keyring = $DIR/admin.keyring
osd_pool_default_size = 3
osd_pool_default_min_size = 2
osd_pool_default_pg_autoscale_mode = off
[client]
pid_file =
admin_socket =
log_file = $DIR/log/client.log
[mon]
mon_data = $DIR/mon
keyring = $DIR/mon/keyring
mon_data_avail_warn = 2
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
[mgr]
mgr_data = $DIR/mgr
keyring = $DIR/mgr/keyring
mgr_initial_modules =
[osd]
osd_data = $DIR/osd\$id
keyring = $DIR/osd\$id/keyring
bluestore_block_size = $((OSD_GIB << 30))
bluestore_block_preallocate_file = false
osd_memory_target = 1610612736
osd_class_update_on_start = false
bluestore_debug_enforce_settings = ssd
osd_op_num_shards = 8
osd_op_num_threads_per_shard = 2
CONF
    for ((i = 0; i < OSDS; i++)); do printf '[osd.%d]\ncrush_location = root=default host=failure-domain-%d\n' $i $i; done >>"$DIR/ceph.conf"
    { cat "$DIR/ceph.conf"; printf '[client]\nrbd_cache = false\n'; } >"$DIR/ceph-nocache.conf"
}

start_mon() { ceph-mon -c "$DIR/ceph.conf" -i m >"$DIR/log/mon.start" 2>&1; }
start_mgr() { ceph-mgr -c "$DIR/ceph.conf" -i x >"$DIR/log/mgr.start" 2>&1; }
start_osd() { ceph-osd -c "$DIR/ceph.conf" -i "$1" >"$DIR/log/osd$1.start" 2>&1; }

make_cluster() {
    local fsid mon i uuid secret
    empty_ours
    mkdir -p "$DIR"/{run,log,mon,mgr}
    : >"$DIR/$MARK"
    fsid=$(</proc/sys/kernel/random/uuid)
    mon=$(free_port)
    write_config "$fsid" "$mon"
    new_keyring "$DIR/admin.keyring" client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    new_keyring "$DIR/first.keyring" mon. --cap mon 'allow *'
    ceph-authtool "$DIR/first.keyring" --import-keyring "$DIR/admin.keyring" >/dev/null
    monmaptool --create --fsid "$fsid" --addv m "[v2:127.0.0.1:$mon]" "$DIR/monmap" >/dev/null
    ceph-mon -c "$DIR/ceph.conf" --mkfs -i m --monmap "$DIR/monmap" --keyring "$DIR/first.keyring"
    start_mon
    ceph_ auth get-or-create mgr.x mon 'allow profile mgr' osd 'allow *' mds 'allow *' -o "$DIR/mgr/keyring"
    start_mgr
    for ((i = 0; i < OSDS; i++)); do
        mkdir "$DIR/osd$i"
        uuid=$(</proc/sys/kernel/random/uuid)
        secret=$(ceph-authtool --gen-print-key)
        printf '{"cephx_secret": "%s"}' "$secret" | ceph_ osd new "$uuid" $i -i - >/dev/null
        ceph-authtool --create-keyring "$DIR/osd$i/keyring" -n "osd.$i" --add-key "$secret" >/dev/null
        dd if=/dev/zero of="$DIR/osd$i/block" bs=4M count=$((OSD_GIB * 256)) oflag=direct conv=fsync status=none
        ceph-osd -c "$DIR/ceph.conf" -i $i --mkfs --osd-uuid "$uuid" >"$DIR/log/mkfs$i" 2>&1 || die "mkfs of OSD $i: $(tail -n 3 "$DIR/log/mkfs$i")"
        start_osd $i
    done
    ceph_ osd pool create rbd $PGS $PGS replicated >/dev/null 2>&1
    ceph_ osd pool application enable rbd rbd >/dev/null 2>&1
    wait_clean
    : >"$DIR/made"
}

all_clean() { # all placement groups of the pool, each on three OSDs
    ceph_ pg stat -f json 2>/dev/null | python3 -c '
import json, sys
stat = json.load(sys.stdin)
stat = stat.get("pg_summary", stat)
clean = sum(s["num"] for s in stat["num_pg_by_state"] if s["name"] == "active+clean")
sys.exit(0 if clean == stat["num_pgs"] >= int(sys.argv[1]) else 1)' "$PGS"
}

wait_clean() {
    for _ in $(seq 180); do
        if all_clean; then return 0; fi
        sleep 0.5
    done
    ceph_ -s >&2 || true
    die "not clean in time"
}

wait_osds_up() { # after a restart the manager remembers the state of before; the map of OSDs is the monitor's
    for _ in $(seq 180); do
        if [ "$(ceph_ osd stat -f json 2>/dev/null | python3 -c 'import json,sys; print(json.load(sys.stdin)["num_up_osds"])')" = $OSDS ]; then return 0; fi
        sleep 0.5
    done
    die "OSDs not up in time"
}

start_cluster() {
    [ "$(live_pids | wc -l)" -eq 0 ] || die "it runs already in $DIR"
    if [ ! -e "$DIR/made" ]; then make_cluster; return; fi
    start_mon
    start_mgr
    for ((i = 0; i < OSDS; i++)); do start_osd $i; done
    wait_osds_up
    wait_clean
}

live_pids() { # the daemons of DIR by their pid files, checked to be what they say
    local file pid
    for file in "$DIR"/run/*.pid; do
        [ -e "$file" ] || continue
        pid=$(<"$file")
        if [ -e "/proc/${pid:-none}/cmdline" ] && tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qxF "$DIR/ceph.conf"; then echo "$pid"; fi
    done
}

stop_pids() { # PID...
    local signal pid alive
    for signal in TERM KILL; do
        for pid in "$@"; do kill -$signal "$pid" 2>/dev/null || true; done
        for _ in $(seq 60); do
            alive=0
            for pid in "$@"; do if kill -0 "$pid" 2>/dev/null; then alive=1; fi; done
            if [ $alive = 0 ]; then return 0; fi
            sleep 0.25
        done
    done
    die "still alive: $*"
}

stop_cluster() {
    local pids
    mapfile -t pids < <(live_pids)
    [ ${#pids[@]} -eq 0 ] || stop_pids "${pids[@]}"
}

run_cluster() {
    trap '' INT HUP TERM
    start_cluster </dev/null
    local pids
    # Known by heart: whoever ends our input may have removed DIR as well.
    mapfile -t pids < <(live_pids)
    [ ${#pids[@]} -eq $((OSDS + 2)) ] || { stop_pids "${pids[@]}"; die "only ${#pids[@]} daemons live"; }
    echo "ready ${pids[*]}"
    while read -r _; do :; done
    stop_pids "${pids[@]}"
}

command=${1:-}
case $command in
    run | up | stop | purge) [ -n "${2:-}" ] || die "which DIR?" ;;
    *) sed -n '2,13p' "$0" >&2; exit 2 ;;
esac
mkdir -p "$2"
DIR=$(cd "$2" && pwd -P)
case $command in
    run) trap stop_cluster EXIT; run_cluster ;;
    up) start_cluster; echo "ready; try: rbd -c $DIR/ceph.conf ls" ;;
    stop) stop_cluster ;;
    purge) stop_cluster; empty_ours; rmdir "$DIR" ;;
esac

#!/usr/bin/env bash
# Two hosts, one dies for a moment: two network namespaces joined by a cable (a veth pair) train one model
# with torchrun; the worker of the second is killed with SIGKILL in the midst of it.
#
#     sudo benchmarks/two_hosts.sh [PYTHON]      # needs root for the namespaces; a few minutes
#
# Shown: both hosts restart, go on from the last state, and end with the bits of the run that nobody killed.
# The namespaces share this machine's file system, as hosts of a cluster share the output folder.
set -euo pipefail

python=${1:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
a=localvit-a-$$ b=localvit-b-$$
export OMP_NUM_THREADS=1 PYTHONPATH="$root" PYTHONUNBUFFERED=1 GLOO_SOCKET_IFNAME=cable

cleanup() {
    for host in "$a" "$b"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$host" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT

ip netns add "$a"
ip netns add "$b"
ip link add cable netns "$a" type veth peer name cable netns "$b"
for pair in "$a 10.77.0.1" "$b 10.77.0.2"; do
    read -r host address <<<"$pair"
    ip -n "$host" addr add "$address/24" dev cable
    ip -n "$host" link set cable up
    ip -n "$host" link set lo up
done

settings=(
    model.args.embed_dim=24 model.args.depth=2 model.args.num_heads=2 "model.locality={}"
    model.args.drop_path_rate=0.2 augment.mixup=0.8 ema_decay=0.95 epochs=8 schedule.warmup_epochs=2
    batch_size=64 workers=1 save_seconds=0.5 device=cpu
)

# host NAMESPACE ADDRESS IS_MEETING_POINT FOLDER LOG: one of the two launchers, in the background.
host() {
    local words=()
    for setting in "${settings[@]}"; do words+=(--set "$setting"); done
    ip netns exec "$1" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29577 --rdzv-id=two-hosts --local-addr="$2" \
        --rdzv-conf="is_host=$3" -m localvit train --recipe digits "${words[@]}" --output "$4" >"$5" 2>&1 &
}

echo "== nobody is killed"
host "$a" 10.77.0.1 1 "$work/whole" "$work/whole-a.log"; first=$!
host "$b" 10.77.0.2 0 "$work/whole" "$work/whole-b.log"; second=$!
wait "$first" "$second" || { tail -n 20 "$work"/whole-*.log; exit 1; }
tail -n 1 "$work/whole-a.log"

echo "== the worker of the second host is killed"
host "$a" 10.77.0.1 1 "$work/run" "$work/a.log"; first=$!
host "$b" 10.77.0.2 0 "$work/run" "$work/b.log"; second=$!
until compgen -G "$work/run/state/step-0000000[3-9]*.state" >/dev/null; do
    kill -0 "$first" || { tail -n 20 "$work"/[ab].log; exit 1; }
    sleep 0.1
done
worker=$(pgrep -P "$second" | head -n 1)
kill -9 "$worker"
echo "killed process $worker in $b at $(cd "$work/run/state" && ls | tail -n 1)"
wait "$first" "$second" || { tail -n 20 "$work"/[ab].log; exit 1; }
grep -h -E "going on after|exitcode: -9|another process|best epoch" "$work"/[ab].log | cut -c 1-160

PYTHONPATH="$root:$root/benchmarks" "$python" - "$work/whole" "$work/run" <<'EOF'
import sys
from pathlib import Path

from chaos import story

whole, run = (story(Path(folder)) for folder in sys.argv[1:])
for name in whole:
    print(f"{name}: {'the same bits' if whole[name] == run[name] else 'DIFFERENT'}")
sys.exit(whole != run)
EOF

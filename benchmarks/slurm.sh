#!/usr/bin/env bash
# A study on a real SLURM of one node, set up here: two arms, two seeds; its jobs are requeued, told that their
# time is over, cancelled, and left alone by an interrupted command.
#
#     sudo benchmarks/slurm.sh [PYTHON]      # Debian; installs slurm-wlm and munge; a few minutes
#
# Shown: every run ends with the weights and metrics of the same study in local processes, bit for bit. All of
# SLURM's files are in a temporary folder (SLURM_CONF), a configuration in /etc/slurm is not touched.
set -euo pipefail

python=${1:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
host=$(hostname -s)
command=
export OMP_NUM_THREADS=1 PYTHONPATH="$root:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 SLURM_CONF="$work/slurm.conf"

if ! command -v slurmctld munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
fi

cleanup() {
    [ -n "$command" ] && kill "$command" 2>/dev/null || true
    scancel --me 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        [ -f "$work/$name.pid" ] && kill "$(cat "$work/$name.pid")" 2>/dev/null || true
    done
    sleep 2
    rm -rf "$work"
}
trap cleanup EXIT

# until_true SECONDS COMMAND...: wait for a command to succeed.
until_true() {
    local end=$((SECONDS + $1)); shift
    until "$@"; do
        ((SECONDS < end)) || { echo "it did not happen: $*"; tail -n 20 "$work"/*.log; exit 1; }
        sleep 0.2
    done
}

echo "== a SLURM of one node"
chmod 755 "$work"
mkdir -m 700 "$work/munge"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 600 "$work/munge/key"
munged --force --key-file="$work/munge/key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munge/log" --seed-file="$work/munge/seed"
cat >"$SLURM_CONF" <<CONF
ClusterName=localvit
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((20000 + RANDOM % 10000))
SlurmdPort=$((30000 + RANDOM % 10000))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How long a requeued job must wait, too: by default two minutes.
AuthInfo=socket=$work/munge.socket,cred_expire=10
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$work/state" "$work/spool"
slurmctld
slurmd -N "$host"
is_idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }
until_true 60 is_idle
sinfo --version

cat >"$work/question.yaml" <<'QUESTION'
question: Does locality help?
control: plain
arms:
  local: {model.locality: {}, resources: {minutes: 20}}
scales:
  tiny: {recipe: digits}
QUESTION
settings=(
    model.args.embed_dim=24 model.args.depth=2 model.args.num_heads=2 epochs=16 schedule.warmup_epochs=2
    batch_size=64 workers=0 save_seconds=5 device=cpu
)
words=(-m localvit study run "$work/question.yaml" --scale tiny --seeds 2)
for setting in "${settings[@]}"; do words+=(--set "$setting"); done
cluster=("${words[@]}" --output "$work/slurm" --cluster slurm --minutes 10 --jobs 2 --memory 0.9)

echo "== the study in local processes"
"$python" "${words[@]}" --output "$work/here" >"$work/here.log" 2>&1 || { cat "$work/here.log"; exit 1; }

# The runs in the order in which their jobs start: an array for each arm, because one asks for more time.
read -ra keys < <("$python" - "$work/here" <<'KEYS'
import sys
from pathlib import Path
from localvit.studies.execution.folder import read_study
runs = read_study(Path(sys.argv[1])).runs()
print(*(run.key for arm in ("plain", "local") for run in runs if run.arm == arm))
KEYS
)
folders=("${keys[@]/#/$work/slurm/runs/}")

echo "== the same study on SLURM"
"$python" "${cluster[@]}" --dry-run | grep "^slurm:"

has_jobs() { [ "$(grep -c '"id"' "$work/slurm/jobs/jobs.json" 2>/dev/null)" = 4 ]; }
# trained FOLDER EPOCHS: whether a run has got so far, and is not done.
trained() { [ "$(wc -l 2>/dev/null <"$1/metrics.jsonl")" -ge "$2" ] 2>/dev/null && [ ! -f "$1/record.json" ]; }

# The shell has its background jobs ignore SIGINT.
env --default-signal=INT "$python" "${cluster[@]}" >"$work/first.log" 2>&1 & command=$!
until_true 300 has_jobs
ids=()
for key in "${keys[@]}"; do
    ids+=("$("$python" -c "import json, sys; print(json.load(open(sys.argv[1]))['$key']['id'])" \
        "$work/slurm/jobs/jobs.json")")
done

until_true 300 trained "${folders[0]}" 2
scontrol requeue "${ids[0]}"
echo "job 1: requeued after $(wc -l <"${folders[0]}/metrics.jsonl") epochs"
until_true 300 trained "${folders[1]}" 2
scancel --signal=USR2 "${ids[1]}"
echo "job 2: told that its time is over (SIGUSR2) after $(wc -l <"${folders[1]}/metrics.jsonl") epochs"

kill -INT "$command"
wait "$command" && exit 1
tail -n 1 "$work/first.log" | sed "s|$work|DIR|g"
before=$(squeue --me --noheader --array | wc -l)
"$python" "${cluster[@]}" >"$work/second.log" 2>&1 & command=$!
is_followed() { ! flock --nonblock "$work/slurm/.lock" true; }
until_true 300 is_followed
sleep 5
until_true 300 trained "${folders[2]}" 2
scancel "${ids[2]}"
echo "job 3: cancelled after $(wc -l <"${folders[2]}/metrics.jsonl") epochs"
wait "$command" && exit 1
tail -n 1 "$work/second.log" | sed "s|$work|DIR|g"
[ "$(ls "$work"/slurm/jobs/*_submission.sh | wc -l)" = 2 ]
echo "the interrupted command left $before jobs; the second one submitted none, only followed"

"$python" "${cluster[@]}" >"$work/third.log" 2>&1 || { cat "$work/third.log"; exit 1; }
[ "$(ls "$work"/slurm/jobs/*_submission.sh | wc -l)" = 3 ]
echo "the third one submitted the run whose job was cancelled, and wrote the report"

"$python" - "$work" "${keys[@]}" <<'COMPARE'
import dataclasses, sys
from pathlib import Path
from localvit.studies.execution.folder import StudyFolder, read_study

TIMES = ("seconds", "images_per_second", "data_wait")
work = Path(sys.argv[1])
here, slurm = (StudyFolder(work / name, read_study(work / name)) for name in ("here", "slurm"))
logs = {p.name.removesuffix("_0_log.out"): p.read_text() for p in (slurm.path / "jobs").glob("*_0_log.out")}
fates = dict(zip(sys.argv[2:], ("requeued", "time over", "cancelled", "nothing"), strict=True))

def results(folder, run):
    record = folder.finished()[run]
    history = [{k: v for k, v in epoch.items() if not k.endswith(TIMES)} for epoch in record.history]
    metrics = [dataclasses.replace(m, images_per_second=0.0) for m in (record.validation, record.test)]
    return history, record.best_epoch, metrics

def weights(folder, run):
    return [(folder.of(run) / name / "model.safetensors").read_bytes() for name in ("best", "last")]

print("\n| run | what happened to its job | processes | epochs | test top-1, % | weights | metrics |")
print("|---|---|---:|---:|---:|---|---|")
equal = True
for run in sorted(slurm.study.runs(), key=lambda run: list(fates).index(run.key)):
    starts = sum(log.count(f"localvit: run {run.key}\n") for log in logs.values())
    same = [a(here, run) == a(slurm, run) for a in (weights, results)]
    equal &= all(same)
    record = slurm.finished()[run]
    words = " | ".join("the same" if each else "DIFFERENT" for each in same)
    print(f"| {run.arm}, seed {run.seed} | {fates[run.key]} | {starts} | {len(record.history)} | {record.test.top1:.2f} | {words} |")
sys.exit(not equal)
COMPARE

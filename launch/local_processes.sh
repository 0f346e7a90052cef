#!/usr/bin/env bash
# Runs one command as several processes on this machine, as on a pod.
#
#   PROCESSES=2 DEVICES_PER_PROCESS=2 bash launch/local_processes.sh \
#     --config=configs/digits.py --workdir=runs/digits
#
# Any flags of the command may follow. Variables:
#   PROCESSES            number of processes (default: 2)
#   DEVICES_PER_PROCESS  virtual CPU devices of each process (default: 1)
#   COMMAND              module of clop_jax to run (default: train)
#   GRACE                seconds from the failure of a process to SIGTERM for
#                        the others, and from SIGTERM to SIGKILL (default: 120,
#                        more than the heartbeat timeout of JAX)
#   JAX_PLATFORMS        default: cpu
#
# SIGTERM, SIGINT and SIGHUP are forwarded as SIGTERM: every process saves and
# exits.
# The exit status is that of the first process that failed, otherwise 0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
case "${1:-}" in
-h | --help)
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
  ;;
esac

PROCESSES="${PROCESSES:-2}"
DEVICES_PER_PROCESS="${DEVICES_PER_PROCESS:-1}"
GRACE="${GRACE:-120}"
for name in PROCESSES DEVICES_PER_PROCESS GRACE; do
  [[ "${!name}" =~ ^[1-9][0-9]{0,5}$ ]] ||
    fail "$name must be a positive integer, got '${!name}'; for example $name=2"
done
check_command
ensure_venv report,track

port="$("$PYTHON" -c '
import socket

with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])
')"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# XLA uses the last of equal flags.
devices="--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$devices"

launch=("$PYTHON")
# On Linux every process has its own group, to kill its workers with it, and
# gets SIGTERM if this script is killed.
if setsid setpriv --pdeathsig TERM true 2>/dev/null; then
  launch=(setsid setpriv --pdeathsig TERM "$PYTHON")
fi

pids=()
signalled=''

terminate() {
  signalled=1
  local pid
  # Not the groups: processes need their workers to save.
  for pid in $(jobs -rp); do
    kill -s TERM "$pid" 2>/dev/null || true
  done
}

kill_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]/#/-}"} $(jobs -rp); do
    kill -s KILL -- "$pid" 2>/dev/null || true
  done
}

trap terminate TERM INT HUP
trap kill_all EXIT

for ((i = 0; i < PROCESSES; i++)); do
  [ -z "$signalled" ] || break
  "${launch[@]}" -m "clop_jax.$COMMAND" "$@" \
    --coordinator_address="127.0.0.1:$port" --num_processes="$PROCESSES" \
    --process_id="$i" </dev/null &
  pids+=("$!")
done

# Hides messages of bash about killed processes.
exec 3>&2 2>/dev/null
status=0
deadline=''
asked=''
running=(${pids[@]+"${!pids[@]}"})
while [ "${#running[@]}" -gt 0 ]; do
  left=()
  for i in "${running[@]}"; do
    if kill -s 0 "${pids[$i]}" 2>/dev/null; then
      left+=("$i")
      continue
    fi
    code=0
    wait "${pids[$i]}" || code=$?
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status="$code"
      deadline=$((SECONDS + GRACE))
      # 75 means preempted after saving a checkpoint.
      [ "$code" -eq 75 ] || echo "error: process $i of $PROCESSES ended with" \
        "exit status $code; the others have $GRACE s to exit" >&3
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    if [ -n "$asked" ]; then kill_all; else terminate; fi
    asked=1
    deadline=$((SECONDS + GRACE))
  fi
  # Ctrl-C also ends the sleep.
  [ "${#running[@]}" -eq 0 ] || sleep 0.2 || true
done
# A signal arrived before the first process started.
[ "${#pids[@]}" -gt 0 ] || status=143
exit "$status"

#!/usr/bin/env bash
# Runs one command as several processes on this machine, joined over loopback:
# what happens on a pod, without one.
#
#   PROCESSES=2 DEVICES_PER_PROCESS=2 bash launch/local_processes.sh \
#     --config=configs/digits.py --workdir=runs/digits
#
# Any flags of the command may follow. Variables:
#   PROCESSES            how many processes (default: 2)
#   DEVICES_PER_PROCESS  virtual CPU devices of each (default: 1)
#   COMMAND              module of clop_jax to run (default: train)
#   GRACE                seconds that the others have to end by themselves after
#                        one has failed, and again after SIGTERM, before SIGKILL
#                        (default: 120, more than JAX's heartbeat timeout)
#   JAX_PLATFORMS        default: cpu
#
# SIGTERM, SIGINT and SIGHUP reach every process as SIGTERM: it saves and ends.
# The exit status is that of the first process that failed, otherwise 0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
case "${1:-}" in
-h | --help)
  sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
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
# Of two equal flags XLA takes the later one.
devices="--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$devices"

launch=("$PYTHON")
# On Linux every process leads a group of its own, so that what it has started
# can be ended with it, and hears of it if this script is killed by SIGKILL.
if setsid setpriv --pdeathsig TERM true 2>/dev/null; then
  launch=(setsid setpriv --pdeathsig TERM "$PYTHON")
fi

pids=()
signalled=''

terminate() {
  signalled=1
  local pid
  # Not its group: a process that is saving needs its workers.
  for pid in $(jobs -rp); do
    kill -s TERM "$pid" 2>/dev/null || true
  done
}

leave_nobody() {
  local pid
  for pid in ${pids[@]+"${pids[@]/#/-}"} $(jobs -rp); do
    kill -s KILL -- "$pid" 2>/dev/null || true
  done
}

trap terminate TERM INT HUP
trap leave_nobody EXIT

for ((i = 0; i < PROCESSES; i++)); do
  # A signal that came before everybody has started ends the start.
  [ -z "$signalled" ] || break
  "${launch[@]}" -m "clop_jax.$COMMAND" "$@" \
    --coordinator_address="127.0.0.1:$port" --num_processes="$PROCESSES" \
    --process_id="$i" </dev/null &
  pids+=("$!")
done

# Bash would tell here of signals that ended a process; we do, below.
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
      # 75 is no error: preempted, and a checkpoint was saved.
      [ "$code" -eq 75 ] || echo "error: process $i of $PROCESSES ended with" \
        "exit status $code; the others have $GRACE s to end" >&3
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    if [ -n "$asked" ]; then leave_nobody; else terminate; fi
    asked=1
    deadline=$((SECONDS + GRACE))
  fi
  # Ctrl-C reaches the sleep as well, and must not end this script with it.
  [ "${#running[@]}" -eq 0 ] || sleep 0.2 || true
done
# A signal that came before the first process.
[ "${#pids[@]}" -gt 0 ] || status=143
exit "$status"

#!/usr/bin/env bash
# What each host of a TPU slice does; launch/tpu/queued_resource.py copies the sources and calls it.
#
#   worker.sh install [COMMAND]  makes the environment, after COMMAND
#   worker.sh start FLAGS...     launch/main.py in the background, unless it is running
#   worker.sh follow             prints its log until it ends, and exits with its code
#   worker.sh running            exits with 0 while it runs
#   worker.sh stop               SIGTERM, and SIGKILL when it has not ended after 10 minutes
#
# It outlives the connection that started it. The run's code is 137 where it was killed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=.launch
mkdir -p "$here"

running() {
  [[ -s $here/pid ]] && kill -0 "$(<"$here/pid")" 2>/dev/null
}

case "${1:-}" in
  install)
    if [[ -n ${2:-} ]]; then bash -euc "$2"; fi
    # Python 3.11 or newer, whatever the image has.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,postgres]'
    ;;
  start)
    if running; then
      echo "already running on $(hostname)"
      exit 0
    fi
    shift
    rm -f "$here/code"
    # shellcheck disable=SC2016  # the inner shell expands it
    setsid nohup bash -c 'trap : TERM; code=0; "$@" || code=$?; echo "$code" > .launch/code' run \
      .venv/bin/python launch/main.py "$@" >> "$here/log" 2>&1 < /dev/null &
    echo $! > "$here/pid"
    echo "started on $(hostname)"
    ;;
  running)
    running
    ;;
  stop)
    running || exit 0
    pid=$(<"$here/pid")  # of a session of its own: all that the run started
    kill -TERM -- "-$pid"
    timeout 600 tail --sleep-interval=0.2 --pid="$pid" --follow /dev/null || kill -KILL -- "-$pid"
    ;;
  follow)
    [[ -s $here/pid ]] || { echo "nothing was started on $(hostname)" >&2; exit 1; }
    tail --lines=200 --sleep-interval=0.2 --pid="$(<"$here/pid")" --follow=name "$here/log"
    if [[ -s $here/code ]]; then exit "$(<"$here/code")"; fi
    echo "the run on $(hostname) was killed" >&2
    exit 137
    ;;
  *)
    sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed 1d >&2
    exit 2
    ;;
esac

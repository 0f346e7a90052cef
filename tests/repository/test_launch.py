"""The launch scripts, with stubs instead of a cluster.

A checkout in a temporary folder has the real scripts and a `clop_jax` that
records how it was started. Stubs of srun, scontrol and gcloud are on PATH.
"""

import configparser
import contextlib
import copy
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import yaml

from tests import small

LAUNCH = small.ROOT / 'launch'
SCRIPTS = ['local_processes.sh', 'quickstart.sh', 'slurm.sbatch', 'tpu_pod.sh']
# Flags that a script could split, expand or lose.
HARD = [
  '--config=configs/digits.py',
  '--workdir=runs/with a space',
  '--b="quoted" $HOME `id` \\ *',
  "--c=it's",
  '--d=two\nlines',
  '',
  '*',
]

# Instead of clop_jax.train: records its start, then follows BEHAVIOUR_<id>.
FAKE_TRAIN = """
import json, os, signal, subprocess, sys, time

flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv if '=' in a)
i = flags.get('process_id', '0')
behaviour, *value = os.environ.get(f'BEHAVIOUR_{i}', 'exit 0').split()
pids = [os.getpid()]
if behaviour == 'save':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if behaviour == 'stubborn':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  pids.append(subprocess.Popen(['sleep', '60']).pid)
record = {'argv': sys.argv[1:], 'pids': pids, 'environ': dict(os.environ)}
path = os.path.join(os.environ['RECORDS'], f'{i}.json')
with open(path + '~', 'w') as file:
  json.dump(record, file)
os.rename(path + '~', path)
if behaviour == 'exit':
  sys.exit(int(value[0]))
time.sleep(60)
"""
PYTHON = f"""#!/bin/sh
case "$1 $2" in "-m pip") echo "$@" >>"$RECORDS/pip"; exit ;; esac
PYTHONPATH="$(dirname "$0")/../.." exec {sys.executable} "$@"
"""
STUBS = {
  'srun': """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$RECORDS/srun"; shift; done
"$@"
""",
  'scontrol': '#!/bin/bash\necho "$@" >>"$RECORDS/scontrol"\n',
  # A worker is a home folder and a shell that parses the line from ssh.
  'gcloud': """#!/bin/bash
echo "$*" >>"$RECORDS/gcloud"
[ "$4" != "${GCLOUD_FAILS:-}" ] || exit 5
case "$4" in
scp) mkdir -p "$RECORDS/home" && cp "$5" "$RECORDS/home/${6#*:}" ;;
ssh) cd "$RECORDS/home" && HOME="$PWD" exec bash -c "${!##--command=}" ;;
esac
""",
  'python3.99': """#!/bin/bash
[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin" && cp "$STUB" "$3/bin/python"; }
""",
}


class Checkout:
  """The real scripts around a fake package."""

  def __init__(self, folder):
    self.folder = folder / 'check out'
    self.records = folder / 'records'
    shutil.copytree(LAUNCH, self.folder / 'launch')
    for name in metadata_files():
      shutil.copy(small.ROOT / name, self.folder)
    for name in ('clop_jax', 'configs', '.venv/bin', '../bin', '../records'):
      (self.folder / name).mkdir(parents=True)
    for name in ('train', 'evaluate'):
      (self.folder / 'clop_jax' / f'{name}.py').write_text(FAKE_TRAIN)
    stubs = {folder / 'bin' / name: text for name, text in STUBS.items()}
    stubs[self.folder / '.venv/bin/python'] = PYTHON
    for path, text in stubs.items():
      path.write_text(text)
      path.chmod(0o755)
    self.environ = os.environ | {
      'RECORDS': str(self.records),
      'STUB': str(self.folder / '.venv/bin/python'),
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
      'XLA_FLAGS': '--xla_flag_of_the_user=1',
      'SLURM_JOB_ID': '77',
      'SLURM_SUBMIT_DIR': str(self.folder),
      'SLURM_CPUS_PER_TASK': '32',
    }
    self.environ |= {'TPU_NAME': 'pod', 'ZONE': 'us-b', 'PROJECT': 'mine'}
    for name in ('JAX_PLATFORMS', 'PROCESSES', 'COMMAND', 'EXTRA', 'GRACE'):
      self.environ.pop(name, None)

  def start(self, script, *arguments, **variables):
    path = self.folder / 'launch' / script
    if script == 'slurm.sbatch':  # Slurm runs a copy, somewhere else.
      path = shutil.copy(path, self.records.parent / 'slurm_script')
    return subprocess.Popen(
      ['bash', str(path), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=self.folder.parent,
      env=self.environ | variables,
      start_new_session=True,
    )

  def call(self, script, *arguments, **variables):
    """Returns the exit status, stdout and stderr."""
    with self.start(script, *arguments, **variables) as process:
      out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def recorded(self):
    paths = sorted(self.records.glob('*.json'))
    return [json.loads(path.read_text()) for path in paths]

  def calls(self, program):
    path = self.records / program
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def checkout(tmp_path):
  made = Checkout(tmp_path)
  yield made
  for record in made.recorded():
    for pid in filter(alive, record['pids']):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid):
  """Returns True if a process runs and is not a zombie."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def gone(records):
  deadline = time.monotonic() + 20
  pids = [pid for record in records for pid in record['pids']]
  while any(map(alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.05)
  return not any(map(alive, pids))


def metadata_files():
  setup = configparser.ConfigParser()
  setup.read(small.ROOT / 'setup.cfg')
  metadata = setup['metadata']
  return [
    'setup.cfg',
    'pyproject.toml',
    metadata['license_files'],
    metadata['long_description'].removeprefix('file: '),
  ]


def test_shellcheck_finds_nothing():
  folders = ('launch', 'tests', 'docs')
  paths = [x for name in folders for x in small.ROOT.glob(f'{name}/**/*.sh')]
  assert len(paths) > 6
  program = os.path.join(os.path.dirname(sys.executable), 'shellcheck')
  options = ['-x', '--source-path=SCRIPTDIR', '--shell=bash']
  result = subprocess.run(
    [program, *options, *paths, LAUNCH / 'slurm.sbatch'],
    cwd=small.ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_the_header(script, checkout):
  head, _, _ = (LAUNCH / script).read_text().partition('\nset -euo pipefail\n')
  header = [
    re.sub('^# ?', '', x) for x in head.splitlines()[1:] if 'SB' not in x
  ]
  status, out, err = checkout.call(script, '--help')
  assert (status, out.splitlines(), err) == (0, header, '')
  assert not checkout.recorded()


@pytest.mark.parametrize(
  ('script', 'variables', 'message'),
  [
    ('local_processes.sh', {'PROCESSES': '0'}, "PROCESSES .*'0'"),
    ('local_processes.sh', {'GRACE': 'long'}, "GRACE .*'long'"),
    ('local_processes.sh', {'COMMAND': 'trian'}, "COMMAND .*'trian'"),
    ('slurm.sbatch', {'SLURM_SUBMIT_DIR': '/nowhere'}, 'SLURM_SUBMIT_DIR'),
    ('slurm.sbatch', {}, '--config must'),
    ('slurm.sbatch', {'COMMAND': 'evaluate'}, '--workdir must'),
    ('tpu_pod.sh', {'ZONE': 'a; rm b'}, "ZONE must .*'a; rm b'"),
    ('tpu_pod.sh', {'COMMAND': 'train; id'}, "COMMAND .*'train; id'"),
    ('tpu_pod.sh', {'GCLOUD_FAILS': 'scp'}, 'copy the checkout to pod'),
  ],
)
def test_wrong_inputs_are_one_line(script, variables, message, checkout):
  status, _, err = checkout.call(script, '--workdir=', '--x', **variables)
  assert status == 1
  assert re.fullmatch(f'error: .*{message}.*\n', err)
  assert not checkout.recorded()


def test_scripts_wait_longer_than_the_heartbeat_timeout():
  signature = inspect.signature(jax.distributed.initialize)
  heartbeat = signature.parameters['heartbeat_timeout_seconds'].default
  local = (LAUNCH / 'local_processes.sh').read_text()
  assert int(re.search(r'GRACE:-(\d+)', local)[1]) > heartbeat
  slurm = (LAUNCH / 'slurm.sbatch').read_text()
  assert int(re.search(r'--wait=(\d+)', slurm)[1]) > heartbeat


def test_local_processes_get_the_flags_and_one_coordinator(checkout):
  variables = {'PROCESSES': '3', 'DEVICES_PER_PROCESS': '5'}
  status, _, err = checkout.call('local_processes.sh', *HARD, **variables)
  assert (status, err) == (0, '')
  records = checkout.recorded()
  assert len(records) == 3
  address = records[0]['argv'][-3]
  assert re.fullmatch(r'--coordinator_address=127\.0\.0\.1:\d{4,5}', address)
  for i, record in enumerate(records):
    ours = [address, '--num_processes=3', f'--process_id={i}']
    assert record['argv'] == [*HARD, *ours]
    assert record['environ']['JAX_PLATFORMS'] == 'cpu'
    assert record['environ']['XLA_FLAGS'] == (
      '--xla_flag_of_the_user=1 --xla_force_host_platform_device_count=5'
    )


@pytest.mark.skipif(not shutil.which('setpriv'), reason='needs setpriv')
def test_a_failure_ends_a_stubborn_process_and_its_workers(checkout):
  behaviour = {'BEHAVIOUR_0': 'exit 3', 'BEHAVIOUR_1': 'stubborn'}
  status, _, err = checkout.call('local_processes.sh', GRACE='1', **behaviour)
  assert status == 3
  assert re.fullmatch('error: process 0 of 2 .* status 3.*\n', err)
  assert gone(checkout.recorded())


# Ctrl-C and `timeout` signal the whole group, `kill` only the script. A killed
# script cannot forward the signal, but its processes end as well.
@pytest.mark.parametrize(
  ('send', 'sent', 'code'),
  [
    (os.kill, signal.SIGTERM, 75),
    (os.killpg, signal.SIGINT, 75),
    (os.kill, signal.SIGKILL, -signal.SIGKILL),
  ],
)
def test_signals_let_every_process_save(send, sent, code, checkout):
  behaviour = {'BEHAVIOUR_0': 'save', 'BEHAVIOUR_1': 'save'}
  with checkout.start('local_processes.sh', **behaviour) as process:
    deadline = time.monotonic() + 60
    while len(records := checkout.recorded()) < 2:
      assert time.monotonic() < deadline, 'the processes did not start'
      time.sleep(0.05)
    send(process.pid, sent)
    _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (code, '')
  assert gone(records)


def test_sbatch_options_allow_resuming():
  text = (LAUNCH / 'slurm.sbatch').read_text()
  # Slurm ignores options after the first command.
  head = text.partition('\nset ')[0]
  options = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', head, re.M))
  assert len(options) == text.count('\n#SBATCH') > 5
  assert 'requeue' in options and '%j' in options['output']
  assert options['ntasks-per-node'] == '1'
  assert options['open-mode'] == 'append'
  # 'B:TERM@120' would signal only the batch shell.
  assert int(re.fullmatch(r'TERM@(\d+)', options['signal'])[1]) >= 60


@pytest.mark.parametrize(
  ('code', 'requeued'), [(0, []), (75, ['requeue 77']), (1, [])]
)
def test_slurm_requeues_only_preempted_jobs(code, requeued, checkout):
  status, _, err = checkout.call(
    'slurm.sbatch', *HARD, BEHAVIOUR_0=f'exit {code}'
  )
  assert status == code, err
  assert checkout.calls('scontrol') == requeued
  (record,) = checkout.recorded()
  assert record['argv'] == HARD
  assert record['environ']['SRUN_CPUS_PER_TASK'] == '32'
  assert '--kill-on-bad-exit=0' in checkout.calls('srun')
  (pip,) = checkout.calls('pip')
  assert pip.endswith('[cuda,track]')


def test_tpu_workers_run_the_flags_in_a_fresh_checkout(checkout):
  there = checkout.records / 'home' / 'clop_jax_checkout'
  variables = {'PYTHON3': 'python3.99', 'BEHAVIOUR_0': 'exit 75'}
  for _ in range(2):
    status, _, err = checkout.call('tpu_pod.sh', *HARD, **variables)
    assert (status, err) == (75, '')
    (record,) = checkout.recorded()
    assert record['argv'] == HARD
    assert record['environ']['PWD'] == str(there)
    assert not (there / 'clop_jax' / 'removed.py').exists()
    (there / 'clop_jax' / 'removed.py').touch()
    (there / 'runs').mkdir(exist_ok=True)
  for name in (*metadata_files(), 'runs'):
    assert (there / name).exists()
  # The second run had nothing to install.
  (pip,) = checkout.calls('pip')
  assert pip.endswith(f'{there}[tpu,track]')
  calls = checkout.calls('gcloud')
  assert all('--worker=all --zone=us-b --project=mine' in x for x in calls[::2])
  # The archive is removed.
  assert not os.path.exists(calls[0].split()[4])


def test_jobset_fits_the_schema_and_the_image():
  text = (LAUNCH / 'gke_jobset.yaml').read_text()
  spec = yaml.safe_load(text)['spec']
  (replicated,) = spec['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  resource = {'apiVersion': 'batch/v1', 'kind': 'Job', 'spec': job}
  on_gpus = copy.deepcopy(resource)
  # The index of the pod is the index of the process. Preempted pods are
  # replaced; after a failure all pods restart together.
  assert (replicated['replicas'], job['completionMode']) == (1, 'Indexed')
  assert f'--num_processes={job["completions"]}' in container['args']
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [75]
  assert job['backoffLimit'] == 0 < spec['failurePolicy']['maxRestarts']
  dockerfile = (LAUNCH / 'Dockerfile').read_text()
  assert f' -t {container["image"]} .' in dockerfile
  assert f'USER {pod["securityContext"]["runAsUser"]}\n' in dockerfile
  # The change for TPUs in the header is valid as well.
  comment = [x[2:] for x in text.splitlines() if x.startswith('#')]
  change = comment[comment.index('  nodeSelector:') :]
  change = yaml.safe_load('\n'.join(change))
  container.update(change.pop('containers')[0])
  pod.update(change)
  assert 'google.com/tpu' in container['resources']['limits']
  validator = pytest.importorskip('kubernetes_validate')
  for one in (on_gpus, resource):
    validator.validate(one, '1.30', strict=True)


def test_image_has_the_files_of_an_installation():
  text = (LAUNCH / 'Dockerfile').read_text()
  lines = re.findall(r'^COPY (.*) \S+$', text, re.MULTILINE)
  copied = {source for line in lines for source in line.split()}
  assert {'clop_jax', 'configs', *metadata_files()} <= copied
  ignore = (LAUNCH / 'Dockerfile.dockerignore').read_text()
  kept = re.findall('^!(.*)$', ignore, re.MULTILINE)
  assert {*kept} == {source.split('/')[0] for source in copied}


def test_variables_in_the_docs_exist():
  page = (small.ROOT / 'docs' / 'pods.md').read_text()
  text = ''.join((LAUNCH / script).read_text() for script in SCRIPTS)
  for name in re.findall(r'\b([A-Z][A-Z_0-9]+)=', page):
    assert name in text, name

"""The launch scripts, exercised here with what stands in for a cluster.

A checkout in a temporary folder has the real scripts and a `clop_jax` that
records how it was started; fake srun, scontrol and gcloud are first on PATH.
"""

import configparser
import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import shlex
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
# Of every command, beside its own.
CLUSTER_FLAGS = {'coordinator_address', 'num_processes', 'process_id'}
# What a careless script would split, expand or lose.
HARD = [
  '--config=configs/digits.py',
  '--workdir=runs/with a space',
  "--a=it's",
  '--b="quoted" $HOME `id` \\ *',
  '--c=',
  '--d=two\nlines',
  '',
  '*',
  '--e=ü',
]

# Stands in for clop_jax.train: records its start, then does what BEHAVIOUR_<id>
# says. A worker is started as the input's workers are.
FAKE_TRAIN = """
import json, os, signal, subprocess, sys, time

flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv if '=' in a)
i = flags.get('process_id', '0')
behaviour = os.environ.get(f'BEHAVIOUR_{i}', 'exit 0').split()
record = {'argv': sys.argv[1:], 'pids': [os.getpid()]}
record['environ'] = dict(os.environ)
if behaviour[0] == 'save':
  def save(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    time.sleep(0.5)
    sys.exit(75)

  signal.signal(signal.SIGTERM, save)
if behaviour[0] == 'stubborn':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour[0] in ('stubborn', 'crash'):
  worker = subprocess.Popen(['sleep', '60'])
  record['pids'].append(worker.pid)
path = os.path.join(os.environ['RECORDS'], f'{i}.json')
with open(path + '~', 'w') as file:
  json.dump(record, file)
os.rename(path + '~', path)
if behaviour[0] == 'exit':
  time.sleep(float(behaviour[2]) if len(behaviour) > 2 else 0)
  sys.exit(int(behaviour[1]))
if behaviour[0] == 'crash':
  os._exit(134)
time.sleep(60)
"""


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


class Checkout:
  """The real scripts around a fake package."""

  def __init__(self, folder):
    self.folder = folder / 'check out'
    self.records = folder / 'records'
    self.bin = folder / 'bin'
    for made in (self.folder, self.records, self.bin):
      made.mkdir()
    shutil.copytree(LAUNCH, self.folder / 'launch')
    for name in ('LICENSE', 'README.md', 'pyproject.toml', 'setup.cfg'):
      shutil.copy(small.ROOT / name, self.folder)
    for name in ('clop_jax', 'configs'):
      (self.folder / name).mkdir()
    (self.folder / 'clop_jax' / 'train.py').write_text(FAKE_TRAIN)
    self.python = self.folder / '.venv' / 'bin' / 'python'
    executable(
      self.python,
      f"""#!/bin/sh
case "$1 $2" in "-m pip") echo "$@" >>{shlex.quote(str(folder / 'pip'))}
  exit 0;; esac
PYTHONPATH="$(dirname "$0")/../.." exec {sys.executable} "$@"
""",
    )
    self.environ = os.environ | {
      'RECORDS': str(self.records),
      'PATH': f'{self.bin}:{os.environ["PATH"]}',
      'XLA_FLAGS': '--xla_flag_of_the_user=1',
    }
    for name in ('JAX_PLATFORMS', 'PROCESSES', 'COMMAND', 'EXTRA'):
      self.environ.pop(name, None)

  def start(self, script, *arguments, **variables):
    return subprocess.Popen(
      ['bash', str(self.folder / 'launch' / script), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=self.folder.parent,
      env=self.environ | variables,
      start_new_session=True,
    )

  def call(self, script, *arguments, **variables):
    """Exit status, stdout, stderr."""
    with self.start(script, *arguments, **variables) as process:
      out, err = process.communicate(timeout=30)
    return process.returncode, out, err

  def recorded(self):
    return [json.loads(p.read_text()) for p in sorted(self.records.iterdir())]

  def wait_for(self, count):
    deadline = time.monotonic() + 20
    while len(list(self.records.glob('*.json'))) < count:
      assert time.monotonic() < deadline, 'the processes did not start'
      time.sleep(0.05)
    return self.recorded()


@pytest.fixture
def checkout(tmp_path):
  made = Checkout(tmp_path)
  yield made
  for record in made.recorded():
    for pid in filter(alive, record['pids']):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid):
  """Whether a process runs; one that nobody has waited for does not."""
  stat = pathlib.Path(f'/proc/{pid}/stat')
  if stat.parent.parent.joinpath('self').exists():
    try:
      return stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
      return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def gone(records, within=0.0):
  deadline = time.monotonic() + within
  pids = [pid for record in records for pid in record['pids']]
  while any(map(alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.05)
  return not any(map(alive, pids))


# Every script.


@pytest.mark.parametrize(
  'path',
  [
    *LAUNCH.glob('*.sh'),
    *LAUNCH.glob('*.sbatch'),
    *LAUNCH.glob('../tests/**/*.sh'),
  ],
  ids=lambda path: path.name,
)
def test_shellcheck_finds_nothing(path):
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  result = subprocess.run(
    [shellcheck, '-x', '--source-path=SCRIPTDIR', '--shell=bash', path],
    cwd=small.ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_is_the_whole_header_and_nothing_else(script, flag, checkout):
  lines = (LAUNCH / script).read_text().splitlines()
  assert 'set -euo pipefail' in lines
  code = next(i for i, line in enumerate(lines) if not line.startswith('#'))
  header = [
    line.removeprefix('#').removeprefix(' ')
    for line in lines[:code]
    if not line.startswith(('#!', '#SBATCH'))
  ]
  status, out, err = checkout.call(script, flag)
  assert (status, out.splitlines(), err) == (0, header, '')
  assert not checkout.recorded()


SLURM = {'SLURM_JOB_ID': '77', 'SLURM_SUBMIT_DIR': '{checkout}'}
TPU = {'TPU_NAME': 'pod', 'ZONE': 'us-central2-b', 'PROJECT': 'mine'}


@pytest.mark.parametrize(
  ('script', 'variables', 'message'),
  [
    (
      'local_processes.sh',
      {'PROCESSES': value},
      f"PROCESSES must be a positive integer, got '{value}'; for example",
    )
    for value in ('0', '-1', 'two', '1.5', '2 3', '08')
  ]
  + [
    (
      'local_processes.sh',
      {'DEVICES_PER_PROCESS': '0'},
      'DEVICES_PER_PROCESS ',
    ),
    (
      'local_processes.sh',
      {'GRACE': 'long'},
      'GRACE must be a positive integer',
    ),
    ('slurm.sbatch', {}, 'SLURM_JOB_ID and SLURM_SUBMIT_DIR must be those of'),
    (
      'slurm.sbatch',
      SLURM | {'SLURM_SUBMIT_DIR': '/nowhere'},
      'sbatch launch/',
    ),
    ('slurm.sbatch', SLURM, '--config must be among the flags; add --config='),
    *(
      (
        'tpu_pod.sh',
        {k: v for k, v in TPU.items() if k != name},
        f'{name} must',
      )
      for name in TPU
    ),
    (
      'tpu_pod.sh',
      TPU | {'ZONE': 'a; rm b'},
      "ZONE must be set to the TPU VM's",
    ),
  ]
  + [
    (script, variables | {'COMMAND': command}, 'COMMAND must name a module')
    for script, variables in (
      ('local_processes.sh', {}),
      ('slurm.sbatch', SLURM),
      ('tpu_pod.sh', TPU),
    )
    for command in ('trian', 'train; id')
  ],
)
def test_a_bad_input_is_one_clear_line(script, variables, message, checkout):
  variables = {
    name: value.format(checkout=checkout.folder)
    for name, value in variables.items()
  }
  status, _, err = checkout.call(script, '--workdir=', **variables)
  assert status == 1
  assert err.startswith('error: ') and message in err
  assert len(err.strip().splitlines()) == 1
  assert not checkout.recorded()


def test_what_waits_for_a_dead_peer_waits_longer_than_the_heartbeat():
  heartbeat = (
    inspect.signature(jax.distributed.initialize)
    .parameters['heartbeat_timeout_seconds']
    .default
  )
  local = (LAUNCH / 'local_processes.sh').read_text()
  assert int(re.search(r'GRACE:-(\d+)', local)[1]) > heartbeat
  slurm = (LAUNCH / 'slurm.sbatch').read_text()
  assert int(re.search(r'--wait=(\d+)', slurm)[1]) > heartbeat


# launch/local_processes.sh

LINUX = pytest.mark.skipif(
  not shutil.which('setpriv'), reason='needs process groups by setsid'
)


def test_every_process_gets_the_flags_and_the_same_coordinator(checkout):
  status, _, err = checkout.call(
    'local_processes.sh', *HARD, PROCESSES='3', DEVICES_PER_PROCESS='5'
  )
  assert (status, err) == (0, '')
  records = checkout.recorded()
  addresses = set()
  assert len(records) == 3
  for i, record in enumerate(records):
    *given, address, count, number = record['argv']
    assert given == HARD
    assert (count, number) == ('--num_processes=3', f'--process_id={i}')
    addresses.add(address)
    environ = record['environ']
    assert environ['JAX_PLATFORMS'] == 'cpu'
    assert environ['XLA_FLAGS'] == (
      '--xla_flag_of_the_user=1 --xla_force_host_platform_device_count=5'
    )
  (address,) = addresses
  assert re.fullmatch(r'--coordinator_address=127\.0\.0\.1:\d{4,5}', address)


def test_another_command_and_platform_can_be_chosen(checkout):
  for name in ('evaluate', 'data/prepare'):
    path = checkout.folder / 'clop_jax' / f'{name}.py'
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'print("this is {name}")\n' + FAKE_TRAIN)
    status, out, _ = checkout.call(
      'local_processes.sh',
      COMMAND=name.replace('/', '.'),
      PROCESSES='1',
      JAX_PLATFORMS='cuda',
    )
    assert status == 0
    assert out.splitlines()[-1] == f'this is {name}'
    assert checkout.recorded()[0]['environ']['JAX_PLATFORMS'] == 'cuda'


def test_the_processes_meet_under_jax_itself(checkout):
  (checkout.folder / 'clop_jax' / 'train.py').write_text("""
import sys
import jax

flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
jax.distributed.initialize(
  flags['coordinator_address'],
  int(flags['num_processes']),
  int(flags['process_id']),
  initialization_timeout=20,
)
counts = jax.process_index(), jax.local_device_count(), jax.device_count()
sys.stdout.write(f'process, devices here, of all: {counts}\\n')
jax.distributed.shutdown()
""")
  status, out, err = checkout.call(
    'local_processes.sh', DEVICES_PER_PROCESS='2', XLA_FLAGS=''
  )
  assert status == 0, err
  for i in (0, 1):
    assert f'process, devices here, of all: ({i}, 2, 4)\n' in out


@LINUX
@pytest.mark.parametrize('number', [0, 1])
def test_a_failing_process_ends_a_stubborn_one_in_bounded_time(
  number, checkout
):
  start = time.monotonic()
  status, _, err = checkout.call(
    'local_processes.sh',
    GRACE='1',
    **{
      f'BEHAVIOUR_{number}': 'exit 3 .3',
      f'BEHAVIOUR_{1 - number}': 'stubborn',
    },
  )
  assert status == 3
  assert 1 < time.monotonic() - start < 8
  assert err == (
    f'error: process {number} of 2 ended with exit status 3; the others have 1 '
    's to end\n'
  )
  assert gone(checkout.recorded(), within=1)


def test_the_first_failure_gives_the_status_and_the_others_end_alone(checkout):
  status, _, err = checkout.call(
    'local_processes.sh',
    PROCESSES='3',
    BEHAVIOUR_0='exit 1 1.2',
    BEHAVIOUR_1='exit 0',
    BEHAVIOUR_2='exit 4 .2',
  )
  assert status == 4
  assert err.startswith('error: process 2 of 3 ended') and err.count('\n') == 1


# Ctrl-C and `timeout` signal the script's whole group, `kill` the script alone.
@pytest.mark.parametrize('send', [os.kill, os.killpg])
@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_every_process_save_and_75_comes_back(
  sent, send, checkout
):
  with checkout.start(
    'local_processes.sh', BEHAVIOUR_0='save', BEHAVIOUR_1='save'
  ) as process:
    records = checkout.wait_for(2)
    send(process.pid, sent)
    _, err = process.communicate(timeout=10)
  assert (process.returncode, err) == (75, '')
  assert gone(records)


def test_a_preempted_process_gives_75_though_the_others_are_ended(checkout):
  status, _, err = checkout.call(
    'local_processes.sh',
    GRACE='1',
    BEHAVIOUR_0='exit 75',
    BEHAVIOUR_1='hang',
  )
  assert (status, err) == (75, '')
  assert gone(checkout.recorded())


@LINUX
def test_the_workers_of_a_process_that_crashed_are_ended_too(checkout):
  status, _, _ = checkout.call(
    'local_processes.sh', PROCESSES='1', BEHAVIOUR_0='crash'
  )
  assert status == 134
  assert gone(checkout.recorded(), within=1)


@LINUX
def test_not_even_sigkill_to_the_script_leaves_orphans(checkout):
  with checkout.start(
    'local_processes.sh', BEHAVIOUR_0='save', BEHAVIOUR_1='hang'
  ) as process:
    records = checkout.wait_for(2)
    process.kill()
  assert gone(records, within=5)


# launch/slurm.sbatch


def directives():
  """As sbatch reads them: those before the first command."""
  found = {}
  for line in (LAUNCH / 'slurm.sbatch').read_text().splitlines():
    if line and not line.startswith('#'):
      break
    if line.startswith('#SBATCH'):
      name, _, value = line.removeprefix('#SBATCH --').partition('=')
      assert name not in found
      found[name] = value
  return found


def test_sbatch_is_asked_for_what_resuming_needs():
  found = directives()
  text = (LAUNCH / 'slurm.sbatch').read_text()
  assert len(found) == len(re.findall('^#SBATCH', text, re.MULTILINE))
  assert set(found) == {
    'job-name',
    'nodes',
    'ntasks-per-node',
    'gpus-per-node',
    'cpus-per-task',
    'time',
    'requeue',
    'signal',
    'open-mode',
    'output',
  }
  assert found['requeue'] == ''  # a flag
  assert found['ntasks-per-node'] == '1'
  # Without 'B:', which would send it to the batch shell alone.
  assert re.fullmatch(r'TERM@\d+', found['signal'])
  assert int(found['signal'].split('@')[1]) >= 60
  assert found['open-mode'] == 'append'
  assert '%j' in found['output']
  assert re.fullmatch(r'\d+:\d\d:\d\d', found['time'])


@pytest.fixture
def slurm(checkout):
  """Calls the job as Slurm does: a copy of the script, somewhere else."""
  executable(
    checkout.bin / 'srun',
    """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$RECORDS/../srun"; shift; done
"$@"
""",
  )
  executable(
    checkout.bin / 'scontrol',
    '#!/bin/bash\necho "$@" >>"$RECORDS/../scontrol"\nexit "${SCONTROL:-0}"\n',
  )
  spool = checkout.folder.parent / 'slurm_script'
  shutil.copy(LAUNCH / 'slurm.sbatch', spool)

  def call(*arguments, **variables):
    return subprocess.run(
      ['bash', spool, *arguments],
      capture_output=True,
      text=True,
      cwd=checkout.folder,
      timeout=20,
      env=checkout.environ
      | {'SLURM_JOB_ID': '77', 'SLURM_SUBMIT_DIR': str(checkout.folder)}
      | variables,
    )

  return call


def calls(checkout, program):
  path = checkout.folder.parent / program
  return path.read_text().splitlines() if path.exists() else []


def test_under_slurm_the_flags_arrive_and_all_cores_are_used(slurm, checkout):
  result = slurm(*HARD, SLURM_CPUS_PER_TASK='32')
  assert result.returncode == 0, result.stderr
  (record,) = checkout.recorded()
  assert record['argv'] == HARD
  assert record['environ']['SRUN_CPUS_PER_TASK'] == '32'
  assert '--ntasks-per-node=1' in calls(checkout, 'srun')
  assert '--kill-on-bad-exit=0' in calls(checkout, 'srun')
  (pip,) = calls(checkout, 'pip')
  assert pip.endswith('[cuda]')
  assert not calls(checkout, 'scontrol')


def test_under_slurm_another_extra_can_be_installed(slurm, checkout):
  assert slurm(*HARD, EXTRA='test').returncode == 0
  (pip,) = calls(checkout, 'pip')
  assert pip.endswith('[test]')


@pytest.mark.parametrize(
  ('code', 'requeued'), [(75, ['requeue 77']), (1, []), (137, [])]
)
def test_only_a_preempted_job_is_requeued(code, requeued, slurm, checkout):
  result = slurm(*HARD, BEHAVIOUR_0=f'exit {code}')
  assert result.returncode == code
  assert calls(checkout, 'scontrol') == requeued


def test_a_requeue_that_is_refused_is_told(slurm, checkout):
  result = slurm(*HARD, BEHAVIOUR_0='exit 75', SCONTROL='1')
  assert result.returncode == 1
  assert 'error: scontrol could not requeue job 77; submit it' in result.stderr


def test_flags_may_be_two_words_and_evaluate_needs_no_config(slurm, checkout):
  assert slurm('--config', 'c.py', '--workdir', 'w').returncode == 0
  shutil.copy(
    checkout.folder / 'clop_jax' / 'train.py',
    checkout.folder / 'clop_jax' / 'evaluate.py',
  )
  assert slurm('--workdir=w', COMMAND='evaluate').returncode == 0
  refused = slurm('--figure=f.png', COMMAND='evaluate')
  assert refused.returncode == 1
  assert '--workdir must be among the flags' in refused.stderr


# launch/tpu_pod.sh


@pytest.fixture
def gcloud(checkout):
  """A worker: a home folder, and a shell that parses what ssh sends."""
  home = checkout.folder.parent / 'home'
  home.mkdir()
  executable(
    checkout.bin / 'gcloud',
    f"""#!{sys.executable}
import json, os, shutil, subprocess, sys

home = {str(home)!r}
arguments = sys.argv[1:]
with open({str(checkout.folder.parent / 'gcloud')!r}, 'a') as file:
  file.write(json.dumps(arguments) + chr(10))
assert arguments[:3] == ['compute', 'tpus', 'tpu-vm']
if os.environ.get('GCLOUD') == arguments[3]:
  sys.exit(5)
if arguments[3] == 'scp':
  tpu, name = arguments[5].split(':')
  shutil.copy(arguments[4], os.path.join(home, name))
if arguments[3] == 'ssh':
  (line,) = [a for a in arguments if a.startswith('--command=')]
  line = line.removeprefix('--command=')
  environ = os.environ | {{'HOME': home}}
  sys.exit(subprocess.call(['bash', '-c', line], cwd=home, env=environ))
""",
  )
  executable(
    checkout.bin / 'python3.99',
    f"""#!/bin/bash
[ "$1 $2" != "-m venv" ] && exit
mkdir -p "$3/bin"
cp {shlex.quote(str(checkout.python))} "$3/bin/python"
""",
  )
  checkout.environ |= TPU | {'PYTHON3': 'python3.99'}
  return home


def test_a_tpu_worker_runs_exactly_the_flags_given(gcloud, checkout):
  status, _, err = checkout.call('tpu_pod.sh', *HARD)
  assert (status, err) == (0, '')
  (record,) = checkout.recorded()
  assert record['argv'] == HARD
  # It ran in the worker's checkout, with the worker's environment.
  assert record['environ']['PWD'] == str(gcloud / 'clop_jax_checkout')
  (pip,) = calls(checkout, 'pip')
  assert pip.endswith(f'{gcloud}/clop_jax_checkout[tpu]')
  copied, ran = map(json.loads, calls(checkout, 'gcloud'))
  for call in (copied, ran):
    assert {'--worker=all', '--zone=us-central2-b', '--project=mine'} <= set(
      call
    )
  assert copied[3] == 'scp' and copied[5] == 'pod:clop_jax.tar.gz'
  assert ran[3:5] == ['ssh', 'pod']
  # The archive does not stay behind here.
  assert not pathlib.Path(copied[4]).parent.exists()


def test_a_second_run_on_a_tpu_replaces_the_code_and_keeps_the_rest(
  gcloud, checkout
):
  assert checkout.call('tpu_pod.sh', *HARD)[0] == 0
  there = gcloud / 'clop_jax_checkout'
  (there / 'clop_jax' / 'removed.py').touch()
  (there / 'runs').mkdir()
  assert checkout.call('tpu_pod.sh', *HARD)[0] == 0
  assert not (there / 'clop_jax' / 'removed.py').exists()
  assert (there / 'runs').is_dir()
  assert len(calls(checkout, 'pip')) == 1  # nothing new to install


def test_an_installation_finds_all_its_files_on_a_worker(gcloud, checkout):
  assert checkout.call('tpu_pod.sh', *HARD)[0] == 0
  for name in metadata_files():
    assert (gcloud / 'clop_jax_checkout' / name).exists()


def metadata_files():
  setup = setup_cfg()
  return [
    'setup.cfg',
    'pyproject.toml',
    setup['metadata']['license_files'],
    setup['metadata']['long_description'].removeprefix('file: '),
  ]


def setup_cfg():
  setup = configparser.ConfigParser()
  setup.read(small.ROOT / 'setup.cfg')
  return setup


def test_a_failure_on_the_tpu_comes_back(gcloud, checkout):
  status, _, err = checkout.call('tpu_pod.sh', *HARD, GCLOUD='scp')
  assert status == 1
  assert err == 'error: gcloud could not copy the checkout to pod\n'
  assert not checkout.recorded()
  assert checkout.call('tpu_pod.sh', *HARD, GCLOUD='ssh')[0] == 5
  assert checkout.call('tpu_pod.sh', *HARD, BEHAVIOUR_0='exit 75')[0] == 75


# launch/gke_jobset.yaml

# Of the fields of JobSet v1alpha2, batch/v1 and v1 those that we may use. A
# field that ends in '!' must be there; a dict without fields is free.
CONTAINER = {
  'name!': str,
  'image!': str,
  'env': [
    {'name!': str, 'value': str, 'valueFrom': {'fieldRef': {'fieldPath!': str}}}
  ],
  'command': [str],
  'args': [str],
  'resources': {'limits': {}, 'requests': {}},
  'volumeMounts': [{'name!': str, 'mountPath!': str, 'readOnly': bool}],
}
POD = {
  'restartPolicy!': str,
  'terminationGracePeriodSeconds!': int,
  'nodeSelector': {},
  'securityContext': {'runAsNonRoot': bool, 'runAsUser': int, 'fsGroup': int},
  'containers!': [CONTAINER],
  'volumes': [
    {
      'name!': str,
      'persistentVolumeClaim': {'claimName!': str, 'readOnly': bool},
      'emptyDir': {'medium': str, 'sizeLimit': str},
    }
  ],
}
JOB = {
  'completionMode': str,
  'parallelism': int,
  'completions': int,
  'backoffLimit': int,
  'podFailurePolicy': {
    'rules!': [
      {
        'action!': str,
        'onExitCodes': {
          'containerName': str,
          'operator!': str,
          'values!': [int],
        },
        'onPodConditions': [{'type!': str, 'status': str}],
      }
    ]
  },
  'template!': {'metadata': {}, 'spec!': POD},
}
JOBSET = {
  'apiVersion!': str,
  'kind!': str,
  'metadata!': {'name!': str, 'labels': {}, 'annotations': {}},
  'spec!': {
    'network': {
      'enableDNSHostnames': bool,
      'subdomain': str,
      'publishNotReadyAddresses': bool,
    },
    'coordinator': {'replicatedJob!': str, 'jobIndex': int, 'podIndex': int},
    'failurePolicy': {'maxRestarts': int},
    'replicatedJobs!': [
      {
        'name!': str,
        'replicas': int,
        'template!': {'metadata': {}, 'spec!': JOB},
      }
    ],
  },
}


def check(value, schema, where=''):
  if isinstance(schema, list):
    assert isinstance(value, list) and value, where
    for i, item in enumerate(value):
      check(item, schema[0], f'{where}[{i}]')
  elif isinstance(schema, dict):
    assert isinstance(value, dict) and value, where
    if schema:
      fields = {name.rstrip('!'): s for name, s in schema.items()}
      assert set(value) <= set(fields), where
      needed = {name[:-1] for name in schema if name.endswith('!')}
      assert needed <= set(value), where
      for name, item in value.items():
        check(item, fields[name], f'{where}.{name}')
  else:
    assert type(value) is schema, where


YAML = (LAUNCH / 'gke_jobset.yaml').read_text()


def jobset():
  """The JobSet, its one job, its pod and its container."""
  (loaded,) = yaml.safe_load_all(YAML)
  job = loaded['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  return loaded, job, pod, pod['containers'][0]


def test_the_jobset_has_only_fields_that_exist():
  loaded, _, pod, container = jobset()
  check(loaded, JOBSET)
  assert loaded['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert loaded['kind'] == 'JobSet'
  names = [
    loaded['metadata']['name'],
    container['name'],
    *(volume['name'] for volume in pod['volumes']),
  ]
  for name in names:
    assert re.fullmatch(r'[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?', name)


@pytest.mark.parametrize(
  'change',
  [
    lambda loaded, job, pod, container: loaded.pop('spec'),
    lambda loaded, job, pod, container: job.update(backOffLimit=0),
    lambda loaded, job, pod, container: job.update(completions='2'),
    lambda loaded, job, pod, container: container.pop('image'),
    lambda loaded, job, pod, container: pod.update(containers=[]),
  ],
)
def test_the_schema_refuses_what_a_cluster_would(change):
  parts = jobset()
  change(*parts)
  with pytest.raises(AssertionError):
    check(parts[0], JOBSET)


def test_the_pods_of_the_jobset_find_each_other():
  loaded, job, _, container = jobset()
  (replicated,) = loaded['spec']['replicatedJobs']
  assert loaded['spec']['coordinator'] == {
    'replicatedJob': replicated['name'],
    'jobIndex': 0,
    'podIndex': 0,
  }
  assert loaded['spec']['network']['enableDNSHostnames']
  # One job: its completion index is then the number of the process.
  assert replicated['replicas'] == 1
  assert job['completionMode'] == 'Indexed'
  flags = jobset_flags()
  count = job['parallelism']
  assert count == job['completions'] == int(flags['num_processes'])
  assert flags['process_id'] == '$(PROCESS_ID)'
  assert re.fullmatch(r'\$\(COORDINATOR\):\d+', flags['coordinator_address'])
  paths = {
    env['name']: env['valueFrom']['fieldRef']['fieldPath']
    for env in container['env']
  }
  assert paths == {
    'COORDINATOR': "metadata.annotations['jobset.sigs.k8s.io/coordinator']",
    'PROCESS_ID': (
      "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    ),
  }
  # Kubernetes leaves what it does not know as it stands.
  assert set(re.findall(r'\$\((\w+)\)', str(container['args']))) == set(paths)


def test_a_preempted_pod_is_replaced_and_no_failure():
  loaded, job, pod, container = jobset()
  by_code, by_condition = job['podFailurePolicy']['rules']
  assert by_code == {
    'action': 'Ignore',
    'onExitCodes': {
      'containerName': container['name'],
      'operator': 'In',
      'values': [75],
    },
  }
  assert by_condition == {
    'action': 'Ignore',
    'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}],
  }
  # Kubernetes takes a podFailurePolicy with this one only.
  assert pod['restartPolicy'] == 'Never'
  # The others' peer is lost: they start again together, not one by one.
  assert job['backoffLimit'] == 0
  assert loaded['spec']['failurePolicy']['maxRestarts'] > 0
  assert pod['terminationGracePeriodSeconds'] >= 60


def test_the_workdir_of_the_pods_is_on_the_claim():
  _, _, pod, container = jobset()
  mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
  assert set(mounts) == {volume['name'] for volume in pod['volumes']}
  (claim,) = [v for v in pod['volumes'] if 'persistentVolumeClaim' in v]
  assert jobset_flags()['workdir'].startswith(f'{mounts[claim["name"]]}/')


def test_the_change_for_tpu_fits_into_the_pod():
  comment = '\n'.join(
    line.removeprefix('# ').removeprefix('#')
    for line in YAML.splitlines()
    if line.startswith('#')
  )
  start = comment.index('  nodeSelector:')
  change = yaml.safe_load(comment[start:])
  loaded, _, pod, container = jobset()
  (changed,) = change.pop('containers')
  assert changed.pop('name') == container['name']
  pod.update(change)
  container.update(changed)
  check(loaded, JOBSET)
  assert list(container['resources']['limits']) == ['google.com/tpu']
  assert len(pod['nodeSelector']) == 2


def jobset_flags():
  _, _, _, container = jobset()
  for argument in container['args']:
    assert re.match(r'--\w+=.', argument)
  return dict(a.removeprefix('--').split('=', 1) for a in container['args'])


@functools.cache
def defined_flags():
  """Flags that the commands define."""
  pattern = r"DEFINE(?:_\w+)?\(\s*(?:command\.PATH,\s*)?'(\w+)'"
  return {
    name
    for path in (small.ROOT / 'clop_jax').glob('*.py')
    for name in re.findall(pattern, path.read_text())
  }


def test_the_command_and_the_flags_of_the_jobset_exist():
  _, _, _, container = jobset()
  python, m, module = container['command']
  assert (python, m) == ('python', '-m')
  path = small.ROOT / f'{module.replace(".", "/")}.py'
  assert "if __name__ == '__main__':" in path.read_text()
  flags = jobset_flags()
  assert set(flags) >= CLUSTER_FLAGS
  assert set(flags) <= defined_flags() | CLUSTER_FLAGS
  assert (small.ROOT / flags['config']).exists()


# launch/Dockerfile


def instructions():
  text = (LAUNCH / 'Dockerfile').read_text()
  text = re.sub(r'^#.*\n', '', text, flags=re.MULTILINE).replace('\\\n', ' ')
  return [tuple(line.split(None, 1)) for line in text.splitlines() if line]


def test_the_image_is_small_and_not_run_by_root():
  steps = instructions()
  assert steps[0] == ('FROM', 'python:3.12-slim')
  names = [name for name, _ in steps]
  assert names.count('FROM') == names.count('USER') == 1
  assert 'RUN' not in names[names.index('USER') :]
  user = dict(steps)['USER']
  _, _, pod, _ = jobset()
  assert int(user) == pod['securityContext']['runAsUser'] != 0
  assert any(f'--uid {user} ' in step for name, step in steps if name == 'RUN')
  shell = [step for name, step in steps if name == 'RUN' and 'pip ' in step]
  assert all('--no-cache-dir' in step for step in shell)


def test_the_image_has_what_an_installation_and_a_run_need():
  copied = []
  for name, step in instructions():
    if name == 'COPY':
      *sources, target = step.split()
      copied += sources
      for source in sources:
        assert (small.ROOT / source).exists()
        folder = (small.ROOT / source).is_dir()
        assert target == source if folder else target.endswith('/')
  assert {'clop_jax', 'configs', *metadata_files()} <= set(copied)
  ignore = (LAUNCH / 'Dockerfile.dockerignore').read_text().splitlines()
  kept = {line[1:] for line in ignore if line.startswith('!')}
  assert ignore[1] == '*'
  assert kept == {source.split('/')[0] for source in copied}


@pytest.mark.parametrize('extra', ['cuda', 'tpu', 'cuda13', ''])
def test_the_image_is_built_with_an_extra_that_exists(extra, tmp_path):
  executable(tmp_path / 'pip', '#!/bin/sh\necho "$@"\n')
  (line,) = [s for name, s in instructions() if name == 'RUN' and 'pip ' in s]
  result = subprocess.run(
    ['sh', '-c', line],
    capture_output=True,
    text=True,
    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'EXTRA': extra},
  )
  extras = setup_cfg()['options.extras_require']
  if extra in ('cuda', 'tpu'):
    assert extra in extras
    assert result.stdout.split()[-1] == f'.[{extra}]'
  else:
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr.startswith('error: EXTRA must be cuda or tpu')
  assert dict(instructions())['ARG'] == 'EXTRA=cuda'


def test_the_jobset_runs_an_image_that_the_dockerfile_tells_how_to_build():
  _, _, _, container = jobset()
  tags = re.findall(
    r'^#.* -t (\S+) \.$', (LAUNCH / 'Dockerfile').read_text(), re.M
  )
  assert container['image'] in tags


# docs/pods.md


def test_what_the_page_about_pods_names_exists():
  page = (small.ROOT / 'docs' / 'pods.md').read_text()
  named = re.findall(r'(?:launch|configs|tests|docs|clop_jax)/[\w./]+\w', page)
  assert {f'launch/{s}' for s in SCRIPTS if s != 'quickstart.sh'} <= set(named)
  for path in named:
    assert (small.ROOT / path).exists(), path
  for path in re.findall(r'\]\(([\w/.]+)\)', page):
    assert (small.ROOT / 'docs' / path).exists(), path
  text = ''.join((LAUNCH / script).read_text() for script in SCRIPTS)
  for name in re.findall(r'\b([A-Z][A-Z_0-9]+)=', page):
    assert name in text, name
